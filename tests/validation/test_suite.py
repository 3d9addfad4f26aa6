"""The bench: every cell is recorded as soon as it is done, and nothing is done twice."""

import math

import pandas as pd
import pytest
from toys import MODELS, gaussian

from pyro_vi_kit import guides, objectives
from pyro_vi_kit.core.errors import FileError, ModelError, OptionError, UnknownNameError, ViError
from pyro_vi_kit.fitting import plan
from pyro_vi_kit.fitting.fit import fit
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.validation.suite import (
    COLUMNS,
    Nuts,
    enumerate_cells,
    format_results,
    obstacle,
    run,
    runner,
)
from pyro_vi_kit.validation.suite.table import advice

LINE = MODELS / "gaussian_regression_2d.py"
TOY = gaussian(2)[0]
# Two chains of 100 draws are rightly complained about; the bench says so in its table.
SHORT = Nuts(chains=2, draws=100, tune=100)
BROKEN = """
import pyro, pyro.distributions as dist
import pyro_vi_kit as vi

def broken():
    pyro.sample("z", dist.Normal(0.0, 1.0))
    raise RuntimeError("no luck")

MODEL = vi.Model(broken)
"""


@pytest.fixture
def bench(tmp_path):
    """A small bench; its lines of progress are in ``bench.said``."""

    def bench(models=(LINE,), guides=("mean_field",), objectives=("elbo",), **options):
        options = {"nuts": SHORT} | options
        return run(
            models, guides, objectives, tmp_path / "out", say=bench.said.append, **options
        ).set_index(["model", "guide", "objective"])

    bench.said = []
    return bench


@pytest.fixture
def counted(monkeypatch):
    """How often fits and references were made."""
    counts = {"fit": 0, "nuts": 0}

    def counting(name):
        function = getattr(runner, name)

        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(runner, name, call)

    counting("fit")
    counting("nuts")
    return counts


def test_a_bench_writes_table_records_and_posteriors(bench, tmp_path):
    frame = bench(guides=("mean_field", "full_rank", "delta"), objectives=("elbo",))
    out = tmp_path / "out"
    written = pd.read_csv(out / "results.csv")
    assert tuple(written.columns) == COLUMNS
    assert list(frame["status"]) == ["done"] * 3
    for file in written["file"]:
        assert (out / file).is_file()
    assert (out / LINE.stem / "reference.nc").is_file()
    assert not list(out.rglob("*.tmp"))
    exact = frame.loc[(LINE.stem, "full_rank", "elbo")]
    assert exact["verdict"] == "good"
    assert exact["speedup"] == pytest.approx(exact["nuts_seconds"] / exact["seconds"])
    assert frame.loc[(LINE.stem, "mean_field", "elbo")]["sd_ratio"] < 0.8  # 0.5 exactly
    assert math.isnan(frame.loc[(LINE.stem, "delta", "elbo")]["khat"])


def test_what_cannot_work_is_not_applicable(bench):
    frame = bench(guides=("delta", "amortized"), objectives=("iwae",), nuts=None)
    assert set(frame["status"]) == {"not applicable"}
    assert "multi-sample" in frame.loc[(LINE.stem, "delta", "iwae")]["error"]
    assert "global" in frame.loc[(LINE.stem, "amortized", "iwae")]["error"]


def test_resume_does_nothing_twice(bench, counted, tmp_path):
    bench()
    bench(guides=("mean_field", "full_rank"), resume=True)
    assert counted == {"fit": 2, "nuts": 1}
    assert any("done before" in line for line in bench.said)
    # Other settings: another seed is another cell of the same reference.
    bench(seed=1, resume=True)
    assert counted == {"fit": 3, "nuts": 1}
    # Without resume all is made anew; other cells' results stay in the table.
    frame = bench()
    assert counted == {"fit": 4, "nuts": 2}
    assert len(frame) == 3
    (tmp_path / "out" / LINE.stem / "mean_field-elbo-seed0.nc").unlink()
    bench(resume=True)
    assert counted == {"fit": 5, "nuts": 2}


def test_a_changed_model_file_is_run_again(bench, counted, tmp_path):
    path = tmp_path / "line.py"
    path.write_text(LINE.read_text())
    bench([path], nuts=None)
    path.write_text(LINE.read_text() + "\n# another\n")
    bench([path], nuts=None, resume=True)
    assert counted["fit"] == 2


def test_a_failure_is_recorded_and_the_run_goes_on(bench, tmp_path):
    path = tmp_path / "broken.py"
    path.write_text(BROKEN)
    frame = bench([path, LINE], nuts=None)
    assert list(frame["status"]) == ["failed", "done"]
    assert "no luck" in frame.loc[("broken", "mean_field", "elbo")]["error"]
    text = format_results(frame.reset_index())
    assert "no luck" in text
    assert "mean_field / elbo" in text


def test_a_reference_that_fails_fails_its_cells(bench, monkeypatch):
    def no_nuts(*args, **kwargs):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(runner, "nuts", no_nuts)
    row = bench().iloc[0]
    assert row["status"] == "failed"
    assert row["error"] == "reference: RuntimeError: out of luck"
    assert math.isfinite(row["elbo"])


def test_an_interruption_costs_one_cell(bench, monkeypatch, tmp_path):
    fit = runner.fit

    def interrupted(model, guide, *args, **kwargs):
        if guide == "full_rank":
            raise KeyboardInterrupt
        return fit(model, guide, *args, **kwargs)

    guides = ("mean_field", "full_rank")
    monkeypatch.setattr(runner, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench(guides=guides, nuts=None)
    assert list(pd.read_csv(tmp_path / "out" / "results.csv")["guide"]) == ["mean_field"]
    monkeypatch.setattr(runner, "fit", fit)
    bench.said.clear()
    frame = bench(guides=guides, nuts=None, resume=True)
    assert list(frame["status"]) == ["done", "done"]
    assert sum("done before" in line for line in bench.said) == 1


def test_an_unconverged_reference_is_named(bench):
    bench(nuts=Nuts(chains=2, draws=10, tune=10))
    assert any("NOT converged" in line for line in bench.said)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([LINE], ["full_rnk"], ["elbo"]), UnknownNameError, "full_rank"),
        (([LINE], ["full_rank"], ["elb"]), UnknownNameError, "elbo"),
        (([LINE], [], ["elbo"]), OptionError, "no guide"),
        (([], ["full_rank"], ["elbo"]), OptionError, "no model"),
        ((["nowhere.py"], ["full_rank"], ["elbo"]), FileError, "nowhere"),
    ],
)
def test_wrong_requests_are_refused_at_once(arguments, error, words):
    with pytest.raises(error, match=words):
        enumerate_cells(*arguments, seed=0)


def test_two_files_of_one_name(tmp_path):
    (tmp_path / LINE.name).write_text(LINE.read_text())
    with pytest.raises(OptionError, match="rename one"):
        enumerate_cells([LINE, tmp_path], ["full_rank"], ["elbo"], 0)


def test_a_file_that_does_not_import_ends_it_before_any_work(bench, tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("1 / 0")
    with pytest.raises(ModelError, match="does not import"):
        bench([LINE, path])
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot make the folder"):
        run([LINE], ["mean_field"], ["elbo"], tmp_path / "file" / "out", nuts=None)


@pytest.mark.parametrize(
    ("verdicts", "words"),
    [
        (("good", "resample"), ["is good: full_rank / elbo, 1.00 s.", "resample(): mean_field"]),
        (("resample", "good"), ["is good: mean_field / elbo, 0.50 s."]),
        (("reject", "reject"), ["None of these is to be believed"]),
    ],
)
def test_advice_names_the_fastest_that_is_usable(verdicts, words):
    facts = {"model": "m", "objective": "elbo", "status": "done", "speedup": None}
    rows = [
        facts | {"guide": guide, "seconds": seconds, "verdict": verdict}
        for guide, seconds, verdict in zip(
            ("full_rank", "mean_field"), (1.0, 0.5), verdicts, strict=True
        )
    ]
    lines = advice(pd.DataFrame(rows)).splitlines()
    assert len(lines) == len(words)
    for line, word in zip(lines, words, strict=True):
        assert word in line


class ReachedError(ViError):
    """A fit got as far as training."""


@pytest.mark.parametrize("objective", objectives.names())
@pytest.mark.parametrize("guide", [*guides.names(), guides.AUTO])
def test_the_bench_leaves_out_what_fit_refuses_and_nothing_else(guide, objective, monkeypatch):
    def reached(*args, **options):
        raise ReachedError

    for method in plan.METHODS.values():
        monkeypatch.setattr(type(method), "run", reached)
    reason = obstacle(Density(TOY), guide, objective)
    with pytest.raises(ReachedError if reason is None else OptionError) as raised:
        fit(TOY, guide, objective, seed=0, progress=False)
    assert reason is None or str(raised.value) == reason


def test_searched_guides_have_no_other_bounds():
    density = Density(TOY)
    for pair in (("laplace", "iwae"), ("pathfinder", "forward_kl"), ("laplace", "annealed")):
        assert "is found by a search" in obstacle(density, *pair)
