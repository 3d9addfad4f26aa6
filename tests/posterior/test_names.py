"""Names and values of exports: those of the model, and a refusal of names that are not of it."""

from __future__ import annotations

import datetime

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vi_kit as vi
from pyro_vi_kit import plots
from pyro_vi_kit.core import export
from pyro_vi_kit.core.errors import ModelError, OptionError, UnknownNameError, ViError

ROWS = torch.tensor([0, 1, 2, 0])
Y = torch.tensor([0.3, -0.1, 1.2, 0.5])
DAYS = [datetime.date(2020, 1, day) for day in (1, 2, 3, 5)]


def radon(county, u, y):
    with pyro.plate("county", 3):
        theta = pyro.sample("theta", dist.Normal(u, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(theta[county], 1.0), obs=y)


def fitted(model, **options):
    return vi.fit(model, "mean_field", seed=0, progress=False, **options)


def groups(tree):
    return export.datasets(tree)


@pytest.fixture(params=["installed", "DataTree"])
def kind(request, monkeypatch):
    """Both kinds of ArviZ object."""
    if request.param == "DataTree":
        monkeypatch.setattr(export, "arviz_major", lambda: 1)


def test_a_plate_and_an_argument_of_one_name(kind, tmp_path):
    coords = {"county": ["A", "B", "C"], "row": DAYS}
    model = vi.Model(radon, ROWS, torch.zeros(3), Y, coords=coords)
    fit = fitted(model)
    fit.save(tmp_path / "radon.nc", draws=5)
    for tree in (fit.to_arviz(draws=5), export.read(tmp_path / "radon.nc")):
        found = groups(tree)
        for name in ("posterior", "prior", "unconstrained_posterior"):
            assert found[name]["theta"].dims == ("chain", "draw", "county")
            assert list(found[name]["county"].values) == ["A", "B", "C"]
        assert list(found["constant_data"]["county"].values) == ROWS.tolist()
        dates = found["observed_data"]["row"].values
        np.testing.assert_array_equal(dates, np.array(DAYS, "M8[us]"))
    assert fit.summary().index.tolist() == ["theta[A]", "theta[B]", "theta[C]"]


def test_days_are_told_as_days():
    def model(y):
        with pyro.plate("day", len(y)):
            level = pyro.sample("level", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(level, 1.0), obs=y)

    fit = fitted(vi.Model(model, Y, coords={"day": DAYS}))
    assert fit.summary().index[0] == "level[2020-01-01]"
    hours = [datetime.datetime(2020, 1, 1, hour) for hour in range(4)]
    fit = fitted(vi.Model(model, Y, coords={"day": hours}))
    assert fit.summary().index[1] == "level[2020-01-01T01:00:00.000000]"


def odd_plates(y):
    with pyro.plate("draw", 3):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("chain", 2):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("c", 2):
        c = pyro.sample("c", dist.Normal(0.0, 1.0))
    d = pyro.sample("draw", dist.Normal(0.0, 1.0)) if y is None else 0.0
    with pyro.plate("row", 4):
        pyro.sample("y", dist.Normal(a.sum() + b.sum() + c.sum() + d, 1.0), obs=y)


def odd_sites(y):
    a = pyro.sample("draw", dist.Normal(0.0, 1.0))
    b = pyro.sample("chain", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("row", 4):
        pyro.sample("y", dist.Normal(a + b.sum(), 1.0), obs=y)


@pytest.mark.parametrize(
    ("model", "latents"),
    [(odd_plates, {"a": 3, "b": 2, "c": 2}), (odd_sites, {"draw_site": 1, "chain_site": 2})],
)
def test_no_latent_is_lost(model, latents, kind, tmp_path):
    model = vi.Model(model, Y)
    fit = fitted(model)
    fit.save(tmp_path / "odd.nc", draws=6)
    drawn = fit.sample(6, seed=0)
    for tree in (fit.to_arviz(draws=6), export.read(tmp_path / "odd.nc")):
        posterior = groups(tree)["posterior"]
        assert {str(n): v.size // 6 for n, v in posterior.data_vars.items()} == latents
        for name in latents:
            values = posterior[name].to_numpy()[0]
            np.testing.assert_array_equal(values, drawn[name.removesuffix("_site")])
    again = vi.load(tmp_path / "odd.nc", model)
    assert again.summary().index.tolist() == fit.summary().index.tolist()


def test_what_a_mask_hides_is_nan(kind):
    seen = torch.tensor([True, True, False, True])

    def model(y, counts, pairs):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 4):
            with pyro.poutine.mask(mask=seen):
                pyro.sample("y", dist.Normal(w, 1.0), obs=y)
                pyro.sample("p", dist.Normal(w, 1.0).expand([2]).to_event(1), obs=pairs)
            pyro.sample("n", dist.Poisson(torch.ones(4)).mask(seen), obs=counts)
            pyro.sample("whole", dist.Poisson(1.0), obs=counts)

    counts = torch.tensor([1, 2, 0, 3])
    fit = fitted(vi.Model(model, Y, counts, Y[:, None].expand(4, 2)))
    found = groups(fit.to_arviz(draws=5))
    observed, likelihood = found["observed_data"], found["log_likelihood"]
    hidden = ~seen.numpy()
    for name in ("y", "n", "p"):
        values = observed[name].to_numpy().reshape(4, -1)
        np.testing.assert_array_equal(np.isnan(values), hidden[:, None].repeat(values.shape[1], 1))
        one = likelihood[name].to_numpy()[0]
        np.testing.assert_array_equal(np.isnan(one), np.broadcast_to(hidden, (5, 4)))
    np.testing.assert_array_equal(observed["n"].to_numpy()[seen.numpy()], [1, 2, 3])
    assert observed["whole"].dtype.kind == "i"
    # What the model would see there is a prediction, and no filler.
    assert np.isfinite(found["posterior_predictive"]["y"].to_numpy()).all()
    w = found["posterior"]["w"].to_numpy()[0]
    expected = dist.Normal(torch.as_tensor(w), 1.0).log_prob(Y[0]).numpy()
    np.testing.assert_allclose(likelihood["y"].to_numpy()[0, :, 0], expected, rtol=1e-6)


def test_a_site_without_unconstrained_numbers(kind, tmp_path):
    def model(y):
        p = pyro.sample("p", dist.Dirichlet(torch.ones(1, 1)).to_event(1))
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(m * p[0, 0], 1.0), obs=y)

    model = vi.Model(model, Y)
    fit = fitted(model)
    # Normal prior and data of variance one: the mean is sum(y) / (n + 1).
    assert fit.summary().loc["m", "mean"] == pytest.approx(float(Y.sum()) / 5, abs=0.03)
    assert (groups(fit.to_arviz(draws=5))["posterior"]["p"] == 1.0).all()
    again = vi.load(fit.save(tmp_path / "one.nc", draws=5), model)
    np.testing.assert_array_equal(again.sample(5, seed=1)["m"], fit.sample(5, seed=1)["m"])
    tree = vi.nuts(model, chains=4, draws=400, tune=200, progress=False)
    assert groups(tree)["posterior"]["p"].shape == (4, 400, 1, 1)


@pytest.mark.parametrize(
    ("names", "error", "said"),
    [
        ({"coords": {"countyy": ["A"]}}, UnknownNameError, "'countyy'. Did you mean 'county'"),
        ({"dims": {"thetaa": ["a"]}}, UnknownNameError, "'thetaa'. Did you mean 'theta'"),
        (
            {"coords": {"county": ["A"]}},
            ModelError,
            r"1 names.*'county' of site 'theta' has length 3",
        ),
        ({"dims": {"theta": ["a", "b", "c"]}}, ModelError, "names 3 dimension"),
        ({"dims": {"u": ["area"]}, "coords": {"area": ["", "B"]}}, ModelError, "'area' of arg"),
    ],
)
@pytest.mark.parametrize("run", [fitted, vi.nuts])
def test_names_that_are_not_of_the_model(run, names, error, said):
    model = vi.Model(radon, ROWS, torch.zeros(3), Y, **names)
    with pytest.raises(error, match=said):
        run(model)
    report = vi.check(model, verbose=False)
    assert [check.name for check in report.checks if check.outcome == "fail"] == ["names"]


def test_names_that_are_of_the_model():
    coords = {"county": ["A", "B", "C"], "area": ["x", "y", "z"], "row": range(4)}
    model = vi.Model(radon, ROWS, torch.zeros(3), Y, coords=coords, dims={"u": ["area"]})
    assert vi.check(model, verbose=False).ok
    assert fitted(model).to_arviz(draws=5).constant_data["u"].dims == ("area",)


ODD = [
    "a$\\bad$",
    "$",
    "new\nline",
    "nul\0x",
    "a/b",
    "..",
    "",
    "日本",
    "x" * 300,
    "<b>&amp;",
    "%s{}",
    "\\",
]


def odd_names(y):
    total = sum(pyro.sample(name, dist.Normal(0.0, 1.0)) for name in ODD)
    with pyro.plate("$n\n/", len(y)):
        pyro.sample("y$^$", dist.Normal(total, 1.0), obs=y)


@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")
@pytest.mark.filterwarnings("ignore:the reference has not converged")
def test_odd_names_in_files_and_pictures(kind, tmp_path):
    model = vi.Model(odd_names, Y, name="price $\\frac$ /of\n\0")
    fit = fitted(model)
    again = vi.load(fit.save(tmp_path / "odd.nc", draws=5), model)
    values, stored = fit.sample(5, seed=0), again.sample(5, seed=0)
    assert set(values) == set(stored) == set(ODD)
    assert all(np.array_equal(values[name], stored[name]) for name in ODD)
    reference = fit.to_arviz(draws=50)
    assert len(vi.compare(reference, {"f$": fit}, draws=50)) == len(ODD) + 1
    for draw in (
        lambda path: plots.losses({"q$\\x$": fit}, path=path),
        lambda path: plots.marginals(
            reference, {"f$\\y$": fit}, path=path, max_panels=20, draws=50
        ),
        lambda path: plots.predictive(fit, path=path, draws=50),
    ):
        draw(tmp_path / "odd.png")
        assert (tmp_path / "odd.png").stat().st_size > 1000
        (tmp_path / "odd.png").unlink()


def test_a_posterior_is_no_model():
    fit = fitted(vi.Model(odd_sites, Y))
    with pytest.raises(OptionError, match=r"got Posterior: pass .* posterior\.model"):
        vi.nuts(fit)
    assert vi.check(fit.model, verbose=False).ok


def test_nearest_names_and_all_choices():
    model = vi.Model(odd_sites, Y)
    with pytest.raises(UnknownNameError, match="Did you mean 'elbo'"):
        vi.fit(model, objective="ELBO")
    with pytest.raises(UnknownNameError, match=r"Did you mean 'auto'.*Known guides: .*auto"):
        vi.fit(model, "AUTO ")
    with pytest.raises(ViError) as caught:
        vi.guides.make("auto", model)
    assert "'auto'" in str(caught.value)


@pytest.mark.parametrize("made", [3, None, "adam", []])
def test_an_optimizer_that_is_none(made):
    model = vi.Model(odd_sites, Y)
    for engine in ("auto", "pyro"):
        with pytest.raises(OptionError, match="optimizer= must make a torch optimiser"):
            fitted(model, optimizer=lambda parameters: made, steps=5, engine=engine)


def line(x, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(w * torch.as_tensor(x, dtype=torch.float), 1.0), obs=y)


def tensors(numbers):
    return [torch.tensor(number) for number in numbers]


@pytest.mark.parametrize("kept", [torch.as_tensor, np.array, list, tuple, tensors])
def test_an_argument_that_is_not_finite_comes_first(kept):
    x = kept([0.0, float("nan"), 1.0, float("inf")])
    with pytest.raises(
        ModelError, match=r"^argument 'x' holds 2 NaN or infinite .* row\(s\) 1, 3: "
    ):
        fitted(vi.Model(line, x, Y))


def test_data_that_are_not_finite_are_named_by_row():
    y = Y.clone()
    y[2] = float("nan")
    with pytest.raises(ModelError, match=r"site 'y' hold 1 NaN, in row\(s\) 2: drop the rows"):
        fitted(vi.Model(line, Y, y))


def test_another_fault_than_nan_comes_first():
    def wrong(x, y):
        raise KeyError("no such key")

    x = torch.tensor([float("inf")])
    with pytest.raises(
        ModelError, match=r"^the model raised KeyError.*argument 'x' holds 1 NaN or inf"
    ):
        fitted(vi.Model(wrong, x, Y))


def test_nan_that_a_model_deals_with_is_no_fault():
    def masked(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)), pyro.poutine.mask(mask=~x.isnan()):
            pyro.sample("y", dist.Normal(w * x.nan_to_num(), 1.0), obs=y)

    x = torch.tensor([1.0, float("nan"), 2.0, -1.0])
    fit = fitted(vi.Model(masked, x, Y))
    known = ~x.isnan()
    precision = 1 + float((x[known] ** 2).sum())
    mean = float((x[known] * Y[known]).sum()) / precision
    assert fit.summary().loc["w", "mean"] == pytest.approx(
        mean, abs=4 * precision**-0.5 / 4000**0.5
    )


def test_a_sparse_argument_is_named():
    def product(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        with pyro.plate("row", 4):
            pyro.sample("y", dist.Normal(torch.mv(x, w), 1.0), obs=y)

    with pytest.raises(ModelError, match=r"argument 'x' holds a sparse .*: pass x.to_dense\(\)"):
        fitted(vi.Model(product, torch.eye(4).to_sparse(), Y))
    fit = fitted(vi.Model(product, torch.eye(4).to_sparse().to_dense(), Y))
    # Priors and data of variance one: the means are half of the data.
    np.testing.assert_allclose(fit.summary()["mean"], Y.numpy() / 2, atol=4 * 0.5**0.5 / 4000**0.5)
