"""The benchmarks measure what they say: their arithmetic, their peers' models, their command lines."""

from __future__ import annotations

import importlib
import importlib.util
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch

from benchmarks import (
    accuracy,
    corrections,
    families,
    funnel,
    growth,
    imports,
    speed_nuts,
    speed_steps,
    speed_svi,
    streaming,
    targets,
    verdicts,
)
from benchmarks.lib import machine, race, references, wasserstein
from benchmarks.lib.clock import pace
from benchmarks.lib.options import chosen
from benchmarks.lib.oracle import Oracle
from benchmarks.lib.processes import Result, call
from benchmarks.lib.records import Records
from benchmarks.lib.tables import Measured, first_within, markdown, median_of, number, slope
from pyro_vi_kit import guides
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.model.model import Model
from pyro_vi_kit.model.modelfile import load_model_file

ROOT = Path(__file__).parents[2]
SCRIPTS = (
    "accuracy",
    "amortization",
    "auto",
    "calibration",
    "corrections",
    "engines_table",
    "estimators",
    "families",
    "funnel",
    "growth",
    "imports",
    "kl_direction",
    "minibatches",
    "report",
    "speed_nuts",
    "speed_steps",
    "speed_svi",
    "streaming",
    "targets",
    "verdicts",
)
needs_numpyro = pytest.mark.skipif(
    machine.numpyro_missing() is not None, reason=str(machine.numpyro_missing())
)


# -- tables -----------------------------------------------------------------------------------


def test_a_power_law_has_its_exponent_for_slope():
    sizes = [10.0, 100.0, 1000.0]
    assert slope(sizes, [3 * size**1.7 for size in sizes]) == pytest.approx(1.7)
    assert slope(sizes, [5.0, 5.0, 5.0]) == pytest.approx(0.0)


def test_one_size_has_no_slope():
    with pytest.raises(ValueError, match="two different sizes"):
        slope([10.0, 10.0], [1.0, 2.0])


def test_the_first_time_within():
    times, values = [1.0, 2.0, 3.0, 4.0], [-9.0, -5.04, -5.2, -5.0]
    assert first_within(times, values, target=-5.0, within=0.05) == 2.0
    assert first_within(times, values, target=-5.0, within=0.01) == 4.0
    assert first_within(times, values, target=0.0, within=0.05) is None


def test_the_ratio_of_a_lower_bound_is_one():
    ratio = Measured(60.0, at_least=True).over(Measured(2.0))
    assert ratio == Measured(30.0, at_least=True)
    assert str(ratio) == "≥ 30.0"
    with pytest.raises(ValueError, match="lower bound"):
        Measured(1.0).over(Measured(60.0, at_least=True))


def test_a_median_is_a_lower_bound_only_where_one_could_move_it():
    low, high = Measured(1.0), Measured(9.0)
    assert median_of([low, high, Measured(20.0, at_least=True)]) == Measured(9.0)
    assert median_of([low, Measured(5.0, at_least=True), high]) == Measured(5.0, at_least=True)
    assert median_of([]) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (math.nan, "–"),
        (0.0, "0"),
        (1234567, "1,234,567"),
        (1234.567, "1,230"),
        (0.012345, "0.0123"),
        (-2.34e-13, "-2.3e-13"),
        (-31.5678, "-31.6"),
        (9.999, "10.0"),
        (True, "yes"),
        ("words", "words"),
    ],
)
def test_numbers_in_few_digits(value, text):
    assert number(value) == text


def test_a_markdown_table_keeps_its_columns():
    table = markdown({"a": "name", "b": "value"}, [{"a": "x|y", "b": 1.5}, {"a": "z"}])
    lines = table.splitlines()
    assert len(lines) == 4
    assert "x\\|y" in lines[2]
    assert lines[1].endswith("-: |")  # numbers to the right
    assert "–" in lines[3]


# -- what a script does with what it measured ----------------------------------------------------


def test_records_survive_and_failures_are_tried_again(tmp_path):
    first = Records(tmp_path, "x", resume=False)
    first.add({"name": "a", "value": 1, "error": None})
    first.add({"name": "b", "error": "it broke"})
    again = Records(tmp_path, "x", resume=True)
    assert again.find({"name": "a"}) == {"name": "a", "value": 1, "error": None}
    assert again.find({"name": "b"}) is None
    assert len((tmp_path / "x.csv").read_text().splitlines()) == 3
    assert Records(tmp_path, "x", resume=False).rows == []


def test_choosing_by_the_beginning_of_a_name():
    known = ["ark_ark", "dogs_dogs", "eight_schools", "eight_schools_centered"]
    assert chosen(["ark", "eight_schools"], known, "posterior") == ["ark_ark", "eight_schools"]
    assert chosen(["eight"], known, "posterior") == known[2:]
    assert chosen(["all"], known, "posterior") == known
    with pytest.raises(SystemExit, match="no posterior 'cats'"):
        chosen(["cats"], known, "posterior")


def accurate(**changes):
    row = {
        "posterior": "ark_ark",
        "guide": "full_rank",
        "seed": 0,
        "error": None,
        "log_joint_error": 1e-12,
        "gap": 0.01,
        "kl": 0.03,
        "mean_error": 0.02,
        "sd_error": 0.03,
        "seconds": 1.0,
        "evaluations": 4000,
    }
    return row | changes


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({}, None),
        ({"gap": 0.03}, "KL above the optimum's"),
        ({"mean_error": 0.06}, "max mean error"),
        ({"sd_error": math.nan}, "max sd error"),
        ({"posterior": "eight_schools_eight_schools_centered", "gap": 0.03, "sd_error": 1.0}, None),
        ({"guide": "mean_field", "gap": 0.04, "sd_error": 1.0}, None),
        ({"guide": "mean_field", "gap": 0.06}, "ELBO below the optimum"),
        ({"log_joint_error": 0.1}, "log joint"),
        ({"error": "it broke"}, "it broke"),
    ],
)
def test_what_is_required_of_a_fit(changes, complaint):
    found = accuracy.shortcomings(accurate(**changes))
    assert found == [] if complaint is None else complaint in "; ".join(found)


def test_the_flow_has_its_own_limits():
    centred = {"posterior": accuracy.FLOW_ON[0], "guide": "affine_coupling", "gap": None}
    assert accuracy.shortcomings(accurate(**centred, kl=0.06)) == []
    assert len(accuracy.shortcomings(accurate(**centred, kl=0.08, seconds=200.0))) == 2


def judged(**changes):
    row = {
        "posterior": "ark_ark",
        "guide": "full_rank",
        "seed": 0,
        "error": None,
        "verdict": "good",
    }
    return row | {"mean_error": 0.01, "sd_error": 0.02} | changes


@pytest.mark.parametrize(
    ("mean_error", "sd_error", "kind"),
    [
        (0.01, 0.05, "accurate"),
        (0.06, 0.01, "between"),
        (0.12, 0.0, "between"),
        (0.0, 0.2, "inaccurate"),
    ],
)
def test_a_fit_is_inaccurate_beyond_noise(mean_error, sd_error, kind):
    # Three standard errors of 10,000 draws of the reference are 0.03.
    assert verdicts.truth(judged(mean_error=mean_error, sd_error=sd_error), 200_000) == kind


def test_verdicts_are_held_against_the_truth():
    fits = [
        judged(),
        judged(sd_error=0.2),
        judged(verdict="reject", seed=1),
        judged(guide="mean_field", verdict="resample", sd_error=0.5),
    ]
    rows = [row | {"truth": verdicts.truth(row, 200_000)} for row in fits]
    shown = {row["required"]: row for row in verdicts.requirements(rows)}
    assert shown["full_rank on ark_ark: good"]["shown"] == "2 of 3"
    assert shown["mean_field on ark_ark: never good"]["passed"]
    assert not shown["no fit within 0.05 sd and 5 % is rejected"]["passed"]
    good = "no fit called good has a mean off by over 0.1 sd or an sd by over 10 %"
    assert shown[good]["shown"] == "1 of 2"
    table = verdicts.confusion(rows)
    assert {
        "guide": "full_rank",
        "truth": "accurate",
        "good": 1,
        "resample": 0,
        "reject": 1,
    } in table
    broken = judged(error="it broke")
    assert "it broke" in verdicts.report([*fits, broken], 200_000)


def test_verdict_of_one_posterior(posteriordb):
    posteriordb("gp_pois_regr-gp_regr")
    row = verdicts.one("gp_pois_regr_gp_regr", "full_rank", seed=0, draws=20_000)
    assert verdicts.truth(row, 20_000) == "accurate"
    assert row["verdict"] == "good"
    assert 0 < row["khat_se"] < 0.2


def test_a_peer_that_never_arrived_gives_a_lower_bound():
    row = {"warm": 0.5, "gap": 0.01, "pyro_warm": 60.0, "pyro_reached": False}
    assert speed_svi.ratio(row, "pyro", "warm") == Measured(120.0, at_least=True)
    assert speed_svi.ratio(row, "numpyro", "warm") is None
    # We have no time to a place where we did not arrive.
    assert speed_svi.ratio(row | {"gap": 0.2}, "pyro", "warm") is None


@pytest.mark.parametrize(("seconds", "met"), [(15.0, "yes"), (0.6, "not shown: raise --cap")])
def test_a_lower_bound_under_the_aim_shows_nothing(seconds, met):
    facts = {"posterior": "p", "guide": "mean_field", "evaluations": 100, "gap": 0.01, "warm": 0.5}
    row = facts | {"pyro_warm": seconds, "pyro_reached": False}
    assert f"| {met} |" in speed_svi.report([row], ["pyro"], cap=seconds)
    fast = facts | {"pyro_warm": seconds, "pyro_reached": True}
    assert ("**no**" in speed_svi.report([fast], ["pyro"], cap=seconds)) == (met != "yes")


def test_steps_are_compared_with_the_faster_of_stock_pyro():
    rows = [
        {"who": who, "first": 1.0, "early": early, "late": early, "error": None}
        for who, early in (("ours, eager", 10.0), (speed_steps.STOCK[0], 80.0))
    ]
    rows += [rows[1] | {"who": speed_steps.STOCK[1], "early": 50.0}, rows[0] | {"early": 99.0}]
    line = speed_steps.table(rows)[0]
    assert (line["early_ratio"], line["late_ratio"]) == (5.0, 8.0)


def test_nuts_is_compared_by_effective_samples_a_second():
    numbers = {"ess": 1.0, "rhat": 1.0, "warm_seconds": 1.0, "cold_seconds": 1.0, "error": None}
    rows = [
        numbers | {"who": "ours", "warm": 300.0, "cold": 50.0},
        numbers | {"who": "Pyro", "warm": 10.0, "cold": 8.0},
        {"who": "NumPyro, sequential", "error": "it broke"},
    ]
    ours, stock, broken = speed_nuts.table(rows)
    assert ours["warm_ratio"] == 1.0
    assert stock["warm_ratio"] == 30.0
    assert "cold_ratio" not in broken
    assert [line["met"] for line in speed_nuts.aims("eight_schools", [ours, stock, broken])] == [
        True
    ]


def test_a_ratio_over_a_bound_is_a_bound(monkeypatch):
    first = {"seconds": 30.0, "ess": 60.0, "rhat": None, "after": 0.0, "bound": 1.0}
    answers = {
        "ours": [{"seconds": 1.0, "ess": 40.0, "rhat": 1.0, "after": 0.0}],
        "Pyro": [first],
    }
    rows = []
    for who, value in answers.items():
        done = Result(value, 40.0, 0.0, None)
        monkeypatch.setattr(speed_nuts, "call", lambda *_, done=done, **__: done)
        row = {"model": "logistic_regression", "who": who, "chains": 1, "tune": 1, "draws": 1}
        rows.append(row | speed_nuts.measure("", {}, who, 30.0))
    text = speed_nuts.report(rows)
    assert "at least 20× | at least 10× | yes" in text
    assert "Pyro had not made 20 draws" in text
    assert "ours had not" not in text


def test_a_slow_machine_is_given_more_time_to_import():
    seconds = {"python -c pass": 0.04, "import pyro": 5.0, "import pyro, pyro_vi_kit": 5.5}
    assert "0.600 | yes |" in imports.report(seconds)
    assert "**no**" not in imports.report(seconds)
    assert "**no**" in imports.report(seconds | {"python -c pass": 0.02})


def test_growth_counts_every_kind_of_cell():
    assert [cell["kind"] for cell in growth.cells("particles", 16)] == ["ours", "by_hand"]
    assert sum(cell["guide"] == "full_rank" for cell in growth.cells("dims", 500)) == 1
    assert not any(cell["guide"] == "full_rank" for cell in growth.cells("dims", 1000))
    rows = [
        {"axis": "data", "size": size, "ms": 2.0 * size, "peak_mib": 1.0, "error": None}
        | {"kind": "ours", "guide": "mean_field", "family": "logistic"}
        for size in (10, 100, 1000)
    ]
    assert "| slope        |          1.00 |" in growth.table("data", rows, "ms")


@pytest.mark.slow
def test_streaming_measures_a_fit_against_the_optimum(tmp_path):
    worker = "benchmarks.peers.streaming"
    shape = {"folder": str(tmp_path), "rows": 3000, "columns": 3}
    assert call(f"{worker}:write", shape, cap=60).error is None
    found = call(f"{worker}:fit", shape | {"batch": 500}, cap=60).value
    assert found["status"] == "converged"
    assert found["mean_error_sd"] < 0.2
    assert found["sd_error"] < 0.2
    speed = call(f"{worker}:steps", shape | {"batch": 500, "seconds": 0.01}, cap=60).value
    rows = [
        {"what": "steps", "rows": 3000, "error": None, **speed},
        {"what": "fit", "rows": 3000, "error": None, **found},
        {"what": "fit", "rows": 9000, "error": "stopped after 9 s"},
    ]
    text = streaming.report(rows)
    assert "| converged |" in text
    assert "- fit at 9,000: stopped after 9 s" in text


# -- clocks, races and workers ---------------------------------------------------------------------


def test_a_pace_counts_every_step():
    made = []
    found = pace(lambda: made.append, seconds=0.01, stretch=7)
    assert found["steps"] == sum(made)
    assert found["early"] > 0
    assert found["late"] > 0


def normal():
    pyro.sample(
        "x", pyro.distributions.Normal(torch.zeros(3, dtype=torch.float64), 2.0).to_event(1)
    )


def test_the_oracle_knows_the_elbo_of_a_gaussian():
    """KL(N(m, s^2) || N(0, 4)) = log(2 / s) + (s^2 + m^2) / 8 - 1/2, and the evidence is 1."""
    oracle = Oracle(Density(Model(normal)))
    loc, scale = torch.tensor([0.5, 0.0, -1.0]).double(), torch.tensor([1.0, 2.0, 3.0]).double()
    kl = (2 / scale).log() + (scale**2 + loc**2) / 8 - 0.5
    # Draws are antithetic: only E[noise^2] is estimated.
    noise = 4 * math.sqrt(2 / 8192) * float((scale**2 / 8).sum())
    assert oracle.look(loc, scale.diag(), target=0.0) == pytest.approx(-float(kl.sum()), abs=noise)


def test_a_race_ends_at_the_target_or_at_the_cap():
    oracle = Oracle(Density(Model(normal)))
    sd = 8.0

    def advance(steps):
        nonlocal sd
        sd = 2.0 + (sd - 2.0) * 0.5**steps

    def read():
        return torch.zeros(3).double(), sd * torch.eye(3).double()

    found = race.run(advance, read, oracle, -0.01, cap=100.0, least=1, head_start=1.0)
    assert found["reached"]
    assert found["elbo"] >= -0.01
    assert 1.0 < found["seconds"] < 100.0
    never = race.run(advance, read, oracle, 1.0, cap=1.0, least=1, head_start=1.0)
    assert not never["reached"]
    assert never["steps"] == 1


def test_a_worker_gives_its_value_or_its_exception():
    done = call("math:gcd", {}, cap=10)
    assert done.value == 0
    assert done.peak_mib > 1
    failed = call("math:factorial", {"nonsense": 1}, cap=10)
    assert failed.value is None
    assert failed.error is not None
    assert failed.error.startswith("TypeError")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_explains_itself(script):
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{script}", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--quick" in done.stdout
    assert f"python -m benchmarks.{script}" in done.stdout


# -- the peers run the same models -------------------------------------------------------------------


@pytest.fixture
def density(request, posteriordb):
    reference = references.Reference(request.param)
    posteriordb(reference.posterior)
    return reference.name, Density(reference.module().MODEL), reference


@needs_numpyro
@pytest.mark.slow
@pytest.mark.parametrize("density", references.names(), indirect=True)
def test_numpyros_log_joints_are_ours(density):
    from benchmarks.peers.numpyro_svi import log_joint

    name, ours, reference = density
    facts = reference.facts["unconstrained"]
    mean, sd = np.array(facts["mean"]), np.array(facts["sd"])
    generator, theirs = np.random.default_rng(0), log_joint(name)
    for _ in range(3):
        # In the reference's order, which is that of UNCONSTRAINED.
        z = torch.tensor(mean + 0.3 * sd * generator.standard_normal(len(mean)))
        parts, start = {}, 0
        sites = {site.name: site for site in ours.latents}
        for site in reference.module().UNCONSTRAINED:
            shape = sites[site].unconstrained_shape
            parts[site] = z[start : start + shape.numel()].reshape(1, *shape)
            start += shape.numel()
        expected = float(ours.log_prob(ours.block.pack(parts)))
        values = {site: part[0].numpy() for site, part in parts.items()}
        assert theirs(values) == pytest.approx(expected, rel=1e-9)


@needs_numpyro
@pytest.mark.slow
@pytest.mark.parametrize("guide", ["mean_field", "full_rank"])
@pytest.mark.parametrize("density", ["eight_schools_eight_schools_noncentered"], indirect=True)
def test_numpyros_gaussian_is_read_in_our_order(density, guide):
    """Its guide's own density at its own draws is that of the mean and covariance that were read."""
    from jax import random

    from benchmarks.peers import numpyro_svi

    name, ours, _ = density
    svi, autoguide, arguments = numpyro_svi.set_up(name, guide)
    # Uncompiled, unlike in a race: its own median, below, needs what a compiled start hides.
    state = svi.init(random.PRNGKey(0), *arguments)
    state = numpyro_svi.stepper(svi, arguments)(state, 50)
    loc, scale_tril = numpyro_svi.gaussian(svi, autoguide, state, ours.block)
    median = autoguide.median(svi.get_params(state))
    known = {site.name: np.array(median[site.name]) for site in ours.latents}
    torch.testing.assert_close(loc, ours.unconstrain(known), rtol=1e-8, atol=1e-8)
    assert (scale_tril.diagonal() > 0).all()


@pytest.mark.usefixtures("float64", "own_param_store")
@pytest.mark.parametrize("guide", ["mean_field", "full_rank"])
@pytest.mark.parametrize("density", ["eight_schools_eight_schools_noncentered"], indirect=True)
def test_pyros_gaussian_is_read_in_our_order(density, guide):
    from benchmarks.peers import pyro_svi

    name, ours, _ = density
    svi, autoguide, model = pyro_svi.set_up(name, guide, seed=0)
    for _ in range(5):
        svi.step(*model.args)
    loc, scale_tril = pyro_svi.gaussian(autoguide, ours.block)
    median = {site: value.detach() for site, value in autoguide.median().items()}
    torch.testing.assert_close(loc, ours.unconstrain(median), rtol=1e-8, atol=1e-8)
    assert (scale_tril.diagonal() > 0).all()


@pytest.mark.usefixtures("float64")
def test_the_hand_written_density_is_ours():
    from benchmarks.peers import schools, steps_torch

    ours = Density(load_model_file(ROOT / "models" / "eight_schools.py"))
    z = torch.randn(5, 10, generator=torch.Generator().manual_seed(0))
    by_hand = steps_torch.log_density(z, torch.tensor(schools.SIGMA), torch.tensor(schools.Y))
    torch.testing.assert_close(by_hand, ours.log_prob(z), rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("guide", ["mean_field", "affine_coupling"])
def test_the_hand_written_guides_have_as_many_parameters_as_ours(guide):
    from benchmarks.peers import steps_torch

    ours = guides.make(guide, load_model_file(ROOT / "models" / "eight_schools.py"))
    kinds = {"mean_field": steps_torch.MeanField, "affine_coupling": steps_torch.Coupling}
    counts = [sum(p.numel() for p in q.parameters()) for q in (kinds[guide](), ours)]
    assert counts[0] == counts[1]
    z, log_q = kinds[guide]()(4)
    assert z.shape == (4, 10)
    assert log_q.shape == (4,)


@pytest.mark.parametrize("name", ["numpyro_models", "numpyro_svi", "nuts_numpyro", "steps_numpyro"])
def test_a_cold_peer_does_not_load_torch(name):
    """Its process is timed, and what it does not need is not its time."""
    if machine.numpyro_missing():
        pytest.skip(str(machine.numpyro_missing()))
    code = f"import sys, benchmarks.peers.{name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_accuracy_of_one_posterior(posteriordb):
    posteriordb("gp_pois_regr-gp_regr")
    row = accuracy.one("gp_pois_regr_gp_regr", "full_rank", seed=0, draws=20_000)
    assert row["log_joint_error"] < 1e-6
    # 20,000 draws: three standard errors of the ELBO, and of a standard deviation.
    assert row["gap"] < 0.02 + 3 * math.hypot(row["elbo_se"], row["optimum_se"])
    assert row["mean_error"] < 0.05 + 3 / math.sqrt(20_000)
    assert row["sd_error"] < 0.06 + 3 / math.sqrt(40_000)


# -- corrections ------------------------------------------------------------------------------


def measured(table, **facts):
    return {"table": table, "posterior": "ark_ark", "seed": 0, "error": None} | facts


def test_an_evidence_must_be_near_and_its_error_honest():
    near = {"error_nats": 0.004, "se": 0.0025, "truth_se": 0.0}
    rows = [measured("evidence", **near)] * 8
    poor = measured("evidence", **near | {"se": 0.001})
    (good,) = corrections.evidence_rows([*rows, poor, poor])
    assert good["ok"]
    assert good["covered"] == "8 of 10"
    (bad,) = corrections.evidence_rows([*rows[:7], poor, poor, poor])
    assert not bad["ok"]
    (far,) = corrections.evidence_rows([*rows, measured("evidence", **near | {"error_nats": 0.02})])
    assert not far["ok"]
    # The truth has an error of its own.
    assert corrections.is_covered(poor | {"truth_se": 0.003})


@pytest.mark.parametrize(
    ("facts", "near"),
    [((0.04, 0.95, 1.05), True), ((0.06, 1.0, 1.0), False), ((0.0, 0.89, 1.0), False)],
)
def test_moments_of_psis_draws(facts, near):
    row = measured("psis", **dict(zip(("mean_error", "sd_low", "sd_high"), facts, strict=True)))
    assert corrections.is_near(row) == near
    assert f"| {'yes' if near else '**no**'} " in corrections.report([row], 100)


def test_medians_of_posteriors_are_of_medians_of_seeds():
    facts = {
        "plain": 0.5,
        "gaussian": 0.1,
        "verdict": "reject",
        "corrected": "good",
        "seconds": 1.0,
    }
    rows = [
        measured("linear_response", posterior=name, sd_error=error, **facts)
        for name, errors in {"a": (0.0, 0.05, 1.0), "b": (0.06,), "c": (0.2,)}.items()
        for error in errors
    ]
    shown = corrections.requirements(
        {t: [] for t in corrections.TABLES} | {"linear_response": rows}
    )
    assert [(row["shown"], row["passed"]) for row in shown] == [("0.060", True), ("0.100", False)]


def test_one_posterior_may_be_further_than_exact_draws():
    rows = [measured("wasserstein", distance=1.0, null=2.0)] * 9
    rows.append(measured("wasserstein", distance=3.0, null=2.0))
    found = corrections.requirements({t: [] for t in corrections.TABLES} | {"wasserstein": rows})
    assert (found[0]["shown"], found[0]["passed"]) == ("9 of 10 posteriors", True)


def test_reported_numbers_are_found_among_labels():
    labels = ["mu", "theta[Choate]", "theta[Deerfield]", "tau"]
    assert [corrections._place(labels, n) for n in ("theta[2]", "mu", "tau")] == [2, 0, 3]


def test_the_counted_distance_is_that_of_the_draws():
    rng = np.random.default_rng(0)
    draws, scale = rng.standard_normal((50, 3)) * [1.0, 2.0, 3.0], np.array([1.0, 2.0, 3.0])
    first, second = rng.multinomial(50, np.full(50, 0.02), size=2)
    null = wasserstein.Null(draws, scale)
    sets = (np.repeat(draws, counts, axis=0) for counts in (first, second))
    assert null.between(first, second) == pytest.approx(
        wasserstein.distance(next(sets), [next(sets)], scale), rel=1e-10
    )


def test_the_bootstrap_has_the_law_of_exact_draws():
    """One batch of 200 normal draws, against fresh ones: means agree within five standard errors."""
    rng = np.random.default_rng(1)
    one = np.ones(2)
    exact = [
        wasserstein.distance(rng.standard_normal((200, 2)), [rng.standard_normal((200, 2))], one)
        for _ in range(200)
    ]
    # Several references, because each has its own law.
    found = [
        wasserstein.Null(rng.standard_normal((200, 2)), one).sample(10, 1, seed=i)
        for i in range(20)
    ]
    error = math.hypot(np.std(exact) / 200**0.5, np.std(np.mean(found, 1)) / 20**0.5)
    assert abs(np.mean(found) - np.mean(exact)) < 5 * error


def test_families_are_ordered_by_their_elbos():
    def row(guide, elbo, **more):
        return {
            "posterior": families.CENTRED,
            "seed": 0,
            "guide": guide,
            "elbo": elbo,
            "elbo_se": 0.001,
            "kl": -elbo,
            "dim": 10,
            "seconds": 20.0,
            "error": None,
            **more,
        }

    rows = [
        row("mean_field", -2.0),
        row("full_rank", -1.0),
        row("planar", -0.9),
        row("autoregressive", -0.04),
        row("neural_spline", -0.03, seconds=300.0),
        row("radial", 0.0, error="stopped"),
    ]
    (line,) = families.orderings(rows)
    assert line["ordered"]
    steps = "full_rank +1.000; neural_spline +0.970"
    assert line["ELBO, nats above the family before"] == steps
    order, best = families.requirements(rows)
    assert order["passed"]
    # The spline took too long to count.
    assert best["shown"] == "autoregressive 0.0400"
    assert best["passed"]
    # Below by less than three standard errors and what a fit may leave, 0.01 nats.
    assert families.orderings([row("mean_field", -1.0), row("full_rank", -1.013)])[0]["ordered"]
    assert not families.orderings([row("mean_field", -1.0), row("full_rank", -1.02)])[0]["ordered"]
    assert "| ordered" in families.report(rows, 1000)


def test_one_fit_of_the_families(posteriordb):
    posteriordb("arK-arK")
    row = families.one("ark_ark", "laplace", seed=0, draws=2000)
    assert row["status"] == "converged"
    assert row["dim"] == 7
    # 0.08 nats, and at 2,000 draws a standard error of 0.01.
    assert row["kl"] == pytest.approx(0.08, abs=0.05)


def test_a_fit_of_four_modes_has_them_all_and_evenly():
    row = {"s": 2.0, "objective": "annealed", "seed": 0, "error": None}
    row |= {"kl": 0.09, "kl_se": 0.002, "shares": [0.21, 0.29, 0.25, 0.25], "steps": 9, "cpu": 1.0}
    row |= {"status": "converged", "lines": None}
    assert targets.within(row)
    assert not targets.within(row | {"kl": 0.11})
    assert not targets.within(row | {"shares": [0.19, 0.31, 0.25, 0.25]})
    failed = {"s": 2.0, "objective": "annealed", "seed": 1, "error": "too long"}
    assert targets.requirements([row])[0]["passed"]
    assert not targets.requirements([row, failed])[0]["passed"]
    plain = row | {"objective": "elbo", "kl": 1.386}
    assert targets.requirements([row, plain])[0]["shown"] == "1 of 1 seeds"
    assert "too long" in targets.report([row, failed])


def test_an_untrained_flow_draws_lines_as_they_are(tmp_path):
    pytest.importorskip("matplotlib")
    model = load_model_file(ROOT / "models" / "gaussian_mixture_target.py")
    guide = guides.make("affine_coupling", model, layers=4, init_scale=1.0)
    lines = targets.mapped_lines(guide.families["latent"].double())
    assert len(lines) == 2 * targets.LINES
    assert all(before == after for before, after in lines)
    row = {"s": 2.0, "objective": "annealed", "error": None, "lines": lines}
    assert targets.plot([row], tmp_path / "lines.png")
    assert not targets.plot([row | {"lines": None}], tmp_path / "none.png")
    assert [file.name for file in tmp_path.iterdir()] == ["lines.png"]


def test_of_the_flows_on_the_funnel_the_one_with_the_best_elbo_counts():
    def row(guide, seed, elbo, log_z, error=None):
        return {
            "guide": guide,
            "seed": seed,
            "elbo": elbo,
            "elbo_se": 0.001,
            "log_z": log_z,
            "log_z_se": 0.002,
            "khat": 0.5,
            "verdict": "good",
            "seconds": 9.0,
            "status": "converged",
            "error": error,
        }

    rows = [
        row("affine_coupling", 0, -0.02, -0.051),
        row("planar", 0, -0.9, 0.0),
        row("affine_coupling", 1, -0.03, 0.2),
        row("autoregressive", 1, -0.01, 0.049),
        {"guide": "affine_coupling", "seed": 2, "error": "stopped"},
    ]
    found = funnel.requirements(rows)
    assert [line["guide"] for line in found] == ["affine_coupling", "autoregressive", "none"]
    assert [line["passed"] for line in found] == [False, True, False]
    text = funnel.report(rows, 1000)
    assert "- affine_coupling, seed 2: stopped" in text
    assert "**no**" in text


def test_one_fit_of_the_funnel():
    # A Gaussian, which takes no time: what is read off a flow is the same.
    row = funnel.one("mean_field", seed=0, draws=2000)
    assert row["status"] == "converged"
    assert row["verdict"] == "reject"
    # The log evidence is 0, so the ELBO is minus the KL.
    assert row["elbo"] < -10 * row["elbo_se"] < 0.0
    assert set(funnel.COLUMNS) - {"guide", "seed"} <= set(row)


def test_quick_is_a_part_of_the_whole():
    assert set(funnel.QUICK) <= set(families.FLOWS)
    assert set(references.QUICK) <= set(references.names())
    named = [
        name for part in (verdicts.GOOD, verdicts.NEVER_GOOD) for name in sum(part.values(), ())
    ]
    assert set(named) <= set(references.names())
    assert set(corrections.EVIDENCE) | set(corrections.PSIS_ON) <= set(references.names())
    assert all(cell in targets.cells([0, 1]) for cell in targets.cells([0, 1], quick=True))
    assert set(accuracy.NEAR_GAUSSIAN) | set(accuracy.FLOW_ON) <= set(references.names())
    for axis, sizes in growth.QUICK.items():
        assert all(a < b for a, b in pairwise(sizes))
        assert sizes[0] == growth.SIZES[axis][0]


def test_every_script_is_in_the_report():
    report = importlib.import_module("benchmarks.report")
    assert set(report.SCRIPTS) == set(SCRIPTS) - {"report"}


def test_versions_that_were_tried_are_a_table():
    from benchmarks import versions

    worked = {"versions": {"torch": "2.8.0"}, "steps": {"fit": "ok"}, "python": "3.12.1"}
    failed = {"versions": {"torch": "2.15.0"}, "steps": {"fit": "ok", "nuts": "TypeError: no"}}
    text = versions.document(
        {
            "3.12:oldest": worked,
            "3.12:newest": failed,
            "3.13:newest": {"why": "no Python 3.13 here"},
        }
    )
    lines = text.splitlines()
    assert any("3.12.1" in line and "2.8.0" in line and "works" in line for line in lines)
    assert any("2.15.0" in line and "fails" in line for line in lines)
    assert "- 3.12:newest: nuts: TypeError: no" in lines
    assert "- 3.13:newest: not tried: no Python 3.13 here" in lines
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert versions.interpreter(own, [sys.executable])
    with pytest.raises(versions.NotTriedError, match=r"no Python 2\.3 here"):
        versions.interpreter("2.3", [sys.executable])
