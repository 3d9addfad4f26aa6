"""`vi.calibrate`: known answers on a conjugate model, data of many kinds, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from click.testing import CliRunner
from conjugate import exact
from scipy.stats import norm
from toys import load

import pyro_vi_kit as vi
from pyro_vi_kit import plots
from pyro_vi_kit.cli import main
from pyro_vi_kit.core.errors import ModelError, OptionError
from pyro_vi_kit.core.export import Group, to_arviz
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.validation.calibrate import workers
from pyro_vi_kit.validation.calibrate.calibration_tests import uniformity
from pyro_vi_kit.validation.calibrate.data_reuse import require_generative
from pyro_vi_kit.validation.calibrate.simulation import Simulation, distances, simulate

ROWS, DRAWS = 12, 199


def regression(x, y=None):
    beta = pyro.sample("beta", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
    with pyro.plate("row", len(x)):
        return pyro.sample("y", dist.Normal((x * beta).sum(-1), 1.0), obs=y)


def columns(rows=ROWS):
    generator = torch.Generator().manual_seed(3)
    first = torch.randn(rows, generator=generator, dtype=torch.float64)
    second = 0.95 * first + 0.3 * torch.randn(rows, generator=generator, dtype=torch.float64)
    return torch.stack([first, second], -1)


MODEL = vi.Model(regression, columns(), torch.zeros(ROWS, dtype=torch.float64))


def oracle(shift=0.0, scale=1.0, sites=("beta",)):
    """The exact posterior of the simulated data, shifted and scaled in its own sds."""

    def fitter(model, seed):
        mean, covariance, _ = exact(*model.args, prior_sd=1.0, noise_sd=1.0)
        noise = np.random.default_rng(seed).standard_normal((DRAWS, 2)) * scale
        sd = covariance.diagonal().sqrt().numpy()
        draws = mean.numpy() + noise @ np.linalg.cholesky(covariance.numpy()).T + shift * sd
        return dict.fromkeys(sites, draws)

    return fitter


def calibrated(**options):
    return vi.calibrate(
        MODEL, **{"simulations": 100, "draws": DRAWS, "seed": 2, "jobs": 1} | options
    )


@pytest.fixture(scope="module")
def mean_field():
    return calibrated(guide="mean_field")


def test_the_exact_posterior_passes():
    found = calibrated(fitter=oracle())
    assert found.verdict.calibrated
    assert found.verdict.level == "calibrated"
    assert set(found.verdict.sites) == {"beta", "log_likelihood", "all latents"}
    assert found.ranks["beta"].shape == (100, 2)
    assert 0 <= found.ranks["beta"].min() <= found.ranks["beta"].max() <= DRAWS
    assert found.failures == {}
    assert "say nothing against beta" in str(found.verdict)


def test_full_rank_holds_the_posterior():
    found = calibrated()
    assert found.verdict.calibrated
    assert found.guide == "full_rank"
    assert found.not_converged == 0
    table = found.summary()
    # The sd of a sd from 100 normal values is 0.07.
    assert table["dispersion"].iloc[:2].tolist() == pytest.approx([1.0, 1.0], abs=0.28)


def test_mean_field_is_too_narrow(mean_field):
    verdict = mean_field.verdict
    assert not verdict.calibrated
    assert "too narrow" in verdict.sites["beta"]
    assert "full_rank" in verdict.advice
    assert "sd is about" in str(verdict)
    assert (mean_field.coverage([0.9])["high"] < 0.9).all()


@pytest.mark.parametrize(("shift", "words"), [(0.5, "biased up"), (-0.5, "biased down")])
def test_a_shift_is_a_bias(shift, words):
    found = calibrated(fitter=oracle(shift))
    assert words in found.verdict.sites["beta"]
    assert "narrow" not in found.verdict.sites["beta"]


def test_intervals_that_are_too_wide():
    assert calibrated(fitter=oracle(scale=1.8)).verdict.sites["beta"] == "too wide"


def test_the_prior_is_seen_by_the_likelihood_alone():
    """Modrák et al. (2023): its ranks are uniform in each latent, whatever the data."""

    def prior(model, seed):
        return {"beta": np.random.default_rng(seed).standard_normal((DRAWS, 2))}

    found = calibrated(fitter=prior)
    assert found.verdict.sites["beta"] == "calibrated"
    assert found.verdict.sites["log_likelihood"] == "not uniform"


def test_distances_against_the_closed_form():
    """The share of N(0, s) nearer to r than t is Phi((r + d) / s) - Phi((r - d) / s), d = |t - r|."""
    rng, draws, s = np.random.default_rng(0), 4000, 0.7
    for _ in range(10):
        t, r = rng.standard_normal(2)
        z = torch.tensor(np.r_[t, s * rng.standard_normal(draws)][:, None])
        away = distances(z, torch.tensor([r]), torch.ones(1, dtype=torch.float64))
        d = abs(t - r)
        share = norm.cdf((r + d) / s) - norm.cdf((r - d) / s)
        error = 4 * np.sqrt(share * (1 - share) / draws) + 1e-3
        assert (away[1:] < away[0]).mean() == pytest.approx(share, abs=error)


def test_expected_coverage(mean_field):
    frame = mean_field.expected_coverage()
    assert ((frame["coverage"] < frame["low"]) | (frame["coverage"] > frame["high"])).any()
    good = calibrated(fitter=oracle()).expected_coverage()
    assert ((good["coverage"] >= good["low"]) & (good["coverage"] <= good["high"])).all()
    assert uniformity(mean_field.tarp) < 0.01


def test_tables(mean_field):
    assert mean_field.summary().index.tolist() == [
        "beta[0]", "beta[1]", "log_likelihood", "all latents",
    ]  # fmt: skip
    frame = mean_field.to_frame()
    assert len(frame) == 4 * 100
    row = frame[(frame["parameter"] == "beta[1]") & (frame["simulation"] == 7)].iloc[0]
    assert row["truth"] == mean_field.truths["beta"][7, 1]
    assert row["rank"] == mean_field.ranks["beta"][7, 1]
    # p lies in the cell of its rank.
    cells = mean_field.probabilities["beta"] * (DRAWS + 1)
    assert (np.floor(cells) == mean_field.ranks["beta"]).all()
    assert "not calibrated" in repr(mean_field)
    with pytest.raises(OptionError, match="between 0 and 1"):
        mean_field.coverage([1.0])


# -- speed, processes, failures ---------------------------------------------------------------


@pytest.mark.slow
def test_the_same_numbers_in_other_processes():
    here = calibrated(simulations=20)
    there = calibrated(simulations=20, jobs=2)
    assert there.jobs == 2
    assert all((here.ranks[n] == there.ranks[n]).all() for n in here.ranks)
    assert (here.probabilities["beta"] == there.probabilities["beta"]).all()
    assert (here.tarp == there.tarp).all()


def test_what_cannot_be_sent_is_done_here(monkeypatch):
    class Unsendable:
        def __call__(self, model, seed):
            return oracle()(model, seed)

        def __reduce__(self):
            raise TypeError("stays where it is")

    with pytest.warns(UserWarning, match="stays where it is"):
        found = calibrated(fitter=Unsendable(), simulations=20, jobs=2)
    assert found.jobs == 1
    assert len(found.numbers) == 20


GUIDE = """
from pyro_vi_kit.guides import MeanField

class OwnGuide(MeanField):
    pass
"""


def test_a_guide_of_a_file_is_sent_whole(tmp_path, monkeypatch):
    """In another process there is no module of the name that the file has here."""
    path = tmp_path / "own_guide.py"
    path.write_text(GUIDE)
    spec = importlib.util.spec_from_file_location("own_guide", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "own_guide", module)
    spec.loader.exec_module(module)
    density = Density(MODEL)
    drawn, units = simulate(density, 3, seed=0)
    simulation = Simulation(
        require_generative(density), density.dtype, module.OwnGuide(), None,
        {"objective": "elbo"}, DRAWS, ["beta"], units, seed=0,
    )  # fmt: skip
    payload = workers._pickled(simulation)
    monkeypatch.delitem(sys.modules, "own_guide")
    result = workers._loaded(payload).run(drawn, 1)
    assert result.error == ""
    assert result.ranks.below["beta"].shape == (2,)


def test_failures_are_counted():
    def fails_at_times(model, seed):
        if seed % 5 == 0:
            raise RuntimeError("no mode\nand more")
        return oracle()(model, seed)

    found = calibrated(fitter=fails_at_times)
    failed = len(found.failures)
    assert 5 <= failed <= 40
    assert len(found.numbers) == 100 - failed
    assert not found.verdict.calibrated
    assert f"{failed} of 100 fits failed (the first: RuntimeError: no mode)" in str(found.verdict)


def test_failures_of_all_end_it():
    def fails(model, seed):
        raise RuntimeError("no mode")

    with pytest.raises(ModelError, match=r"first 5 fits .* all failed .RuntimeError: no mode"):
        calibrated(fitter=fails)


def test_ctrl_c_keeps_nothing():
    def interrupted(model, seed):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrated(fitter=interrupted)


def test_processes_are_started_only_where_they_pay(monkeypatch):
    started = []
    monkeypatch.setattr(workers, "_LOOK", 0.0)
    monkeypatch.setattr(workers, "_WORTHWHILE", 0.0)
    monkeypatch.setattr(workers, "_cores", lambda: 2)

    def in_processes(run):
        started.append((len(run.left), run.jobs))
        run.in_turn(look=False)
        return ""

    monkeypatch.setattr(workers.Run, "_in_processes", in_processes)
    assert calibrated(fitter=oracle(), simulations=20, jobs=None).jobs == 2
    assert started == [(19, 2)]


def two_chains(draws):
    return {name: np.stack([values, values]) for name, values in draws.items()}


def test_draws_in_other_forms():
    posterior = calibrated(fitter=lambda m, s: vi.fit(m, "full_rank", seed=s), simulations=20)
    tree = calibrated(
        fitter=lambda m, s: to_arviz({"posterior": Group(two_chains(oracle()(m, s)))}),
        simulations=20,
    )
    assert posterior.ranks["beta"].shape == tree.ranks["beta"].shape == (20, 2)


# -- data of many kinds -----------------------------------------------------------------------


def series(y):
    """Each value is drawn given the last one, as the model itself drew it."""
    slope = pyro.sample("slope", dist.Normal(0.0, 0.5))
    last = torch.zeros(())
    for t in range(5):
        last = pyro.sample(f"y_{t}", dist.Normal(slope * last, 1.0), obs=y[t])


def test_data_at_sites_and_not_in_arguments():
    model = vi.Model(series, torch.arange(5.0))
    observing = require_generative(Density(model))
    assert not observing.by_argument
    found = vi.calibrate(model, "full_rank", simulations=30, draws=99, seed=0, jobs=1)
    assert found.failures == {}
    assert found.summary()["dispersion"].iloc[0] == pytest.approx(1.0, abs=4 / np.sqrt(60))


def test_data_that_are_arguments():
    observing = require_generative(Density(MODEL))
    assert observing.by_argument
    y = torch.arange(float(ROWS), dtype=torch.float64)
    model = observing.with_values({"y": y})
    assert model.fn is MODEL.fn
    assert torch.equal(model.args[1], y)


def two_kinds(y):
    share = pyro.sample("share", dist.Beta(2.0, 2.0))
    with pyro.plate("row", len(y)):
        kind = pyro.sample("kind", dist.Bernoulli(share))
        pyro.sample("y", dist.Poisson(1.0 + 4.0 * kind), obs=y)


def test_counts_and_discrete_latents():
    model = vi.Model(two_kinds, torch.tensor([0, 3, 6, 1]))
    found = vi.calibrate(model, "full_rank", simulations=40, draws=99, seed=0, jobs=1)
    assert found.failures == {}
    assert found.ranks["kind"].shape == (40, 4)
    # The conditional of a discrete site is exact, and its ties are broken at random: uniform.
    assert found.verdict.sites["kind"] == "calibrated"


def lags(y):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("time", len(y) - 1):
        pyro.sample("y", dist.Normal(slope * y[:-1], 1.0), obs=y[1:])


def empirical_prior(y):
    mean = pyro.sample("mean", dist.Normal(y.mean(), 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def by_sign(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0 + (y > 0).to(y)), obs=y)


@pytest.mark.parametrize("fn", [lags, empirical_prior, by_sign])
def test_data_that_are_used_elsewhere(fn):
    with pytest.raises(ModelError, match=r"argument 'y' holds data of site 'y'.*elsewhere too"):
        vi.calibrate(vi.Model(fn, torch.tensor([0.3, -1.2, 0.7, 2.1, 0.4, -0.6])))


def test_data_that_another_argument_holds_too():
    with pytest.raises(ModelError, match="argument 'previous' holds data of site 'y'"):
        vi.calibrate(load("garch").MODEL)


def improper(y):
    mean = pyro.sample("mean", dist.ImproperUniform(dist.constraints.real, (), ()))
    pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def factor(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    pyro.factor("soft", -((mean - 1.0) ** 2))
    pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def learned(y):
    sd = pyro.param("sd", torch.tensor(1.0), constraint=dist.constraints.positive)
    pyro.sample("y", dist.Normal(pyro.sample("mean", dist.Normal(0.0, 1.0)), sd), obs=y)


def unobserved(y):
    pyro.sample("mean", dist.Normal(y, 1.0))


def tempered(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.poutine.scale(scale=0.5):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def masked(y):
    with pyro.plate("row", 2), pyro.poutine.mask(mask=torch.tensor([True, False])):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z.sum(), 1.0), obs=y)


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (improper, "prior of latent 'mean' is improper"),
        (factor, "factor 'soft'"),
        (learned, "parameter 'sd' is learned"),
        (unobserved, "no observed site"),
        (tempered, "site 'y' is scaled"),
        (masked, "latent 'z' is masked"),
    ],
)
def test_no_recipe_for_data(fn, words):
    with pytest.raises(ModelError, match=words):
        vi.calibrate(vi.Model(fn, torch.tensor(0.3)))


def test_obs_mask_and_streams():
    with pytest.raises(ModelError, match="site 'y' is observed in part"):
        vi.calibrate(load("missing_data").MODEL)
    rows = torch.utils.data.TensorDataset(columns(), torch.zeros(ROWS))
    with pytest.raises(ModelError, match="streams its data"):
        vi.calibrate(vi.Model(regression, rows))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"guide": "delta"}, "is a point"),
        ({"guide": "full_rnk"}, "Did you mean 'full_rank'"),
        ({"guide": lambda y: None}, "name or a configured instance"),
        ({"guide": "full_rank", "fitter": oracle()}, "both say what to fit"),
        ({"fitter": 3}, "must be a function"),
        ({"simulations": 5}, "simulations="),
        ({"draws": 5}, "draws="),
        ({"jobs": 0}, "jobs="),
        ({"sites": ["gamma"]}, "site 'gamma'"),
        ({"sites": []}, "sites= must be a name"),
        ({"tol": -1.0}, "tol="),
        ({"method": "newton"}, "unknown method"),
        ({"guide": "affine_coupling", "method": "lbfgs"}, "method='lbfgs' needs"),
        ({"fitter": lambda m, s: {"beta": np.zeros((3, 2))}}, "wanted are 199 or more"),
        ({"fitter": lambda m, s: {"beta": np.zeros((DRAWS, 3))}}, "shape \\(2,\\)"),
        ({"fitter": oracle(sites=("gamma",))}, "no draws of site 'beta'"),
        ({"fitter": lambda m, s: 3}, "returned int"),
    ],
)
def test_options_that_cannot_work(options, words):
    with pytest.raises(OptionError, match=words):
        calibrated(**options)


# -- pictures and the command line ------------------------------------------------------------


def test_pictures(mean_field, tmp_path):
    figure = plots.rank_ecdf(mean_field, path=tmp_path / "ranks.png")
    assert [axis.get_title("left") for axis in figure.axes] == [
        "beta", "log_likelihood", "all latents",
    ]  # fmt: skip
    assert figure.axes[0].get_title("right") == "too narrow (2 of 2)"
    assert len(plots.coverage(mean_field, path=tmp_path / "coverage.png").axes) == 1
    plots.expected_coverage(mean_field, path=tmp_path / "tarp.png")
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OptionError, match="site 'gamma'"):
        plots.rank_ecdf(mean_field, ["gamma"])


FILE = """
import pyro, pyro.distributions as dist, torch
import pyro_vi_kit as vi

def model(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

MODEL = vi.Model(model, torch.tensor([0.2, 0.7, -0.4]))
"""


@pytest.fixture
def model_file(tmp_path):
    path = tmp_path / "one_mean.py"
    path.write_text(FILE)
    return path


def test_command(model_file, tmp_path):
    arguments = [str(model_file), "--simulations", "20", "--draws", "99", "--jobs", "1"]
    out = tmp_path / "out"
    done = CliRunner().invoke(main, ["calibrate", *arguments, "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "Calibration of 'full_rank' on 'model': calibrated" in done.stdout
    assert sorted(path.name for path in out.iterdir()) == [
        "coverage.csv", "coverage.png", "expected_coverage.csv", "expected_coverage.png",
        "rank_ecdf.png", "ranks.csv", "summary.csv",
    ]  # fmt: skip
    done = CliRunner().invoke(main, ["calibrate", *arguments, "--json"])
    facts = json.loads(done.stdout)
    assert facts["verdict"]["level"] == "calibrated"
    assert facts["ranked"] == 20
    assert [row["parameter"] for row in facts["summary"]] == [
        "mean", "log_likelihood", "all latents",
    ]  # fmt: skip


def test_command_not_calibrated(tmp_path):
    file = tmp_path / "two.py"
    file.write_text(
        FILE.replace(
            '    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))',
            '    a = pyro.sample("a", dist.Normal(0.0, 3.0))\n'
            '    mean = a + pyro.sample("b", dist.Normal(0.0, 3.0))',
        )
    )
    arguments = ["--guide", "mean_field", "--simulations", "40", "--draws", "99", "--jobs", "1"]
    done = CliRunner().invoke(main, ["calibrate", str(file), *arguments])
    assert done.exit_code == 3, done.output
    assert "too narrow" in done.stdout


def test_command_wrong_request(model_file):
    done = CliRunner().invoke(main, ["calibrate", str(model_file), "--guide", "delta"])
    assert done.exit_code == 2


@pytest.mark.slow
def test_command_interrupted(model_file):
    code = "from pyro_vi_kit.cli import main; main()"
    arguments = ["calibrate", str(model_file), "--simulations", "5000", "--jobs", "1", "--progress"]
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stderr is not None
        # Its bar appears once fits are under way.
        while b"of 5000 fits" not in (seen := os.read(process.stderr.fileno(), 4096)):
            assert seen, "it ended without a fit"
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    # What was simulated by then is told if it is enough for a table.
    assert out == b"" or b"simulations (interrupted)" in out
    assert b"nterrupted" in err + out
    assert b"Traceback" not in err
