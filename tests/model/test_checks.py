"""Every check passes a good model and catches a broken one, naming the site and the remedy."""

import importlib.util
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import nn

import pyro_vi_kit as vi
from pyro_vi_kit.model.checks import Check, Report, check

MODELS = Path(__file__).parents[2] / "models"
NAMES = sorted(path.stem for path in MODELS.glob("*.py"))
CHECKS = [
    "model runs",
    "supports",
    "structure",
    "log density",
    "shapes and plates",
    "data",
    "randomness",
    "improper priors",
    "discrete sites",
    "length",
    "parameters",
]
Y = torch.tensor([0.3, -1.2, 0.8])


def latent(name="m"):
    return pyro.sample(name, dist.Normal(0.0, 1.0))


def observe(loc, obs=Y, size=None):
    with pyro.plate("datum", size or len(obs)):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=obs)


def good():
    observe(latent())


def raises():
    latent()
    raise KeyError("lookup")


def twice():
    latent()
    latent()


def on_a_sphere():
    direction = pyro.sample("direction", dist.ProjectedNormal(torch.ones(3)))
    observe(direction[0])


def nothing_latent():
    observe(0.0)


def changing():
    m = latent()
    if m > 0:
        latent("extra")
    observe(m)


def never_finite():
    m = latent()
    pyro.sample("y", dist.Normal(m, 1.0), obs=Y[0])
    pyro.factor("penalty", m - torch.inf)


def seldom_finite():
    m = latent()
    pyro.factor("wall", torch.where(m < 1, m, -torch.inf))


def cut_off():
    observe(torch.as_tensor(latent().detach().numpy()).expand(3))


def idle():
    pyro.sample("unused", dist.ImproperUniform(constraints.real, (), ()))
    observe(latent())


def batch_without_plate():
    x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0))
    observe(x)


def column_against_row():
    m = latent()
    with pyro.plate("datum", 3):
        pyro.sample("y", dist.Normal(m, 1.0), obs=Y[:, None])


def short_plate():
    observe(latent(), size=2)


def missing():
    observe(latent(), torch.tensor([0.1, float("nan"), float("nan")]))


def infinite():
    observe(latent(), torch.tensor([0.1, float("inf"), 1.0]))


def impossible():
    rate = latent().exp()
    with pyro.plate("datum", 3):
        pyro.sample("y", dist.Exponential(rate), obs=Y)


def noisy():
    observe(latent() + torch.randn(3))


def dropout():
    net = pyro.module("net", nn.Sequential(nn.Linear(1, 3), nn.Dropout(0.5)))
    observe(latent() + net(torch.ones(1)))


def in_vain():
    start = pyro.param("start", torch.randn(3))
    observe(latent() + start)


def improper():
    observe(pyro.sample("flat", dist.ImproperUniform(constraints.real, (), ())))


def discrete():
    k = pyro.sample("k", dist.Poisson(0.5))
    observe(latent() + k)


def switch():
    k = pyro.sample("k", dist.Bernoulli(0.5))
    observe(latent() + (1.0 if k else 0.0))


def mixture():
    m = latent()
    with pyro.plate("datum", len(Y)):
        z = pyro.sample("z", dist.Categorical(torch.ones(3)))
        pyro.sample("y", dist.Normal(m + z, 1.0), obs=Y)


def long_loop():
    m = latent()
    for i in range(200):
        pyro.sample(f"y{i}", dist.Normal(m, 1.0), obs=Y[0])


def outcomes(report):
    return {check.name: check.outcome for check in report.checks}


def test_a_good_model_passes_every_check():
    report = check(vi.Model(good), verbose=False)
    assert report.ok
    assert [check.name for check in report.checks] == CHECKS
    assert set(outcomes(report).values()) == {"pass"}
    assert not any(check.remedy for check in report.checks)


@pytest.mark.parametrize(
    ("model", "name", "outcome", "message", "remedy"),
    [
        (raises, "model runs", "fail", "KeyError: 'lookup'", "run it once in Pyro itself"),
        (twice, "model runs", "fail", "two sites are named 'm'", "run it once"),
        (on_a_sphere, "supports", "fail", "site 'direction'", "ProjectedNormalReparam"),
        (nothing_latent, "supports", "fail", "no latent sites", "leave obs= out"),
        (changing, "structure", "fail", "site(s) extra", "torch.where"),
        (never_finite, "log density", "fail", "0 of 10 starting points", "bound scales"),
        (never_finite, "log density", "fail", "penalty", "init="),
        (seldom_finite, "log density", "note", "wall", "bound scales"),
        (cut_off, "log density", "fail", "cut off", "do not pass latents through NumPy"),
        (idle, "log density", "note", "unused have no influence", "give them a prior"),
        (batch_without_plate, "shapes and plates", "note", "site 'x' has batch dims", "pyro.plate"),
        (column_against_row, "shapes and plates", "fail", "broadcast to (3, 3)", "squeeze(-1)"),
        (short_plate, "shapes and plates", "fail", "'datum' of size 2", "as long as the data"),
        (missing, "data", "fail", "site 'y' hold 2 NaN", "drop the rows"),
        (infinite, "data", "fail", "site 'y' hold 1 infinite", "drop the rows"),
        (impossible, "data", "fail", "1 value(s) outside the support", "correct the values"),
        (noisy, "randomness", "fail", "site 'y' differs", "pyro.sample site"),
        (dropout, "randomness", "fail", "site 'y' differs", "module.eval()"),
        (in_vain, "randomness", "note", "without influence", "lambda: torch.randn(3)"),
        (improper, "improper priors", "note", "flat", "proper priors"),
        (discrete, "discrete sites", "fail", "site(s) k", "sum them out"),
        (switch, "discrete sites", "fail", "site(s) k hold all", "no Python if"),
        (long_loop, "length", "note", "201 sample sites", "dist.DiscreteHMM"),
        (in_vain, "parameters", "note", "start (3,)", ""),
    ],
)
def test_a_broken_model_is_caught(model, name, outcome, message, remedy):
    report = check(vi.Model(model), verbose=False)
    (found,) = [check for check in report.checks if check.name == name]
    assert found.outcome == outcome
    assert message in found.message
    assert remedy in found.remedy
    assert report.ok == ("fail" not in outcomes(report).values())
    if outcome == "fail":
        assert not report.ok


def test_what_can_still_be_checked_is_checked():
    assert [check.name for check in check(vi.Model(raises), verbose=False).checks] == CHECKS
    report = check(vi.Model(missing), verbose=False)
    failed = [check.name for check in report.checks if check.outcome == "fail"]
    assert failed == ["log density", "data"]
    # Without a bijector there are no gradients, but sites, data and parameters are known.
    report = outcomes(check(vi.Model(on_a_sphere), verbose=False))
    assert report["model runs"] == report["data"] == "pass"
    assert report["log density"] == "note"


def test_arguments_with_nan_are_named_also_when_the_model_does_not_run():
    def refuses(x):
        raise ValueError("no")

    x = torch.tensor([1.0, float("nan")])
    report = check(vi.Model(refuses, x), verbose=False)
    (data,) = [check for check in report.checks if check.name == "data"]
    assert data.outcome == "note"
    assert "argument 'x' holds 1" in data.message


def test_discrete_sites_that_are_summed_out_are_named():
    report = check(vi.Model(mixture), verbose=False)
    assert report.ok
    (found,) = [check for check in report.checks if check.name == "discrete sites"]
    assert "drawn afterwards: z (3 values, plate 'datum' of 3)" in found.message
    (density,) = [check for check in report.checks if check.name == "log density"]
    assert "finite with its gradient at 10 of 10" in density.message


def test_the_report_is_printed_as_marks(capsys):
    report = check(vi.Model(discrete))
    printed = capsys.readouterr().out
    assert printed == f"{report}\n"
    lines = printed.splitlines()
    assert lines[0] == "discrete"
    assert "✗ discrete sites: " in printed
    assert "✓ model runs: 3 sites" in printed
    assert any(line.startswith("    → truncate") for line in lines)
    check(vi.Model(good), verbose=False)
    assert capsys.readouterr().out == ""


def test_the_marks():
    checks = (Check("a", "pass", "x"), Check("b", "note", "y"), Check("c", "fail", "z", "do"))
    report = Report("name", checks)
    assert str(report) == "name\n✓ a: x\n! b: y\n✗ c: z\n    → do"
    assert repr(report) == "Report('name', 3 checks, failed: c)"
    assert Report("name", checks[:2]).ok


@pytest.mark.parametrize("model", [good, raises, noisy, dropout, in_vain, discrete])
def test_the_users_state_is_untouched(model):
    rng = torch.get_rng_state()
    check(vi.Model(model), verbose=False)
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.get_default_dtype() is torch.float32
    assert not pyro.get_param_store().keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_every_model_of_the_zoo_passes(name, dtype):
    if name in ("logistic_regression", "vae"):
        pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location(f"checked_{name}", MODELS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    report = check(module.MODEL, dtype=dtype, verbose=False)
    assert report.ok, str(report)
    notes = [check.name for check in report.checks if check.outcome == "note"]
    assert set(notes) <= {"parameters"}, str(report)


def test_callers_may_have_gradients_off():
    with torch.no_grad():
        assert check(vi.Model(good), verbose=False).ok
