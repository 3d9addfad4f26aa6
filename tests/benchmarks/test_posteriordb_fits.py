"""Fits with defaults against reference posteriors: optimum of the family, moments, verdict.

The family optima in the references were found by sample-average approximation with standard errors of
0.001 to 0.015 nats.
"""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest

import pyro_vi_kit as vi
from benchmarks.accuracy import NEAR_GAUSSIAN

FILES = Path(__file__).parents[2] / "benchmarks" / "posteriordb"
CENTRED = "eight_schools_eight_schools_centered"
LYNXES = "hudson_lynx_hare_lotka_volterra"
HARD = (CENTRED, "eight_schools_eight_schools_noncentered", LYNXES)


def fitted(name, guide, posteriordb, seed=0):
    path = FILES / f"{name}.py"
    reference_name = next(
        line.split('"')[1] for line in path.read_text().splitlines() if line.startswith("POSTERIOR")
    )
    folder = posteriordb(reference_name)
    reference = json.loads((folder / "reference.json").read_text(encoding="utf-8"))
    return vi.fit(runpy.run_path(str(path))["MODEL"], guide=guide, seed=seed), reference


def short_of_optimum(posterior, reference, family):
    """Nats below the family's optimum, less three standard errors of both."""
    optimum = reference["family_optima"][family]
    noise = 3 * np.hypot(posterior.elbo_se, optimum["elbo_mcse"])
    return optimum["elbo"] - posterior.elbo - noise


@pytest.mark.parametrize("name", NEAR_GAUSSIAN)
def test_full_rank_lands_on_the_family_optimum(name, posteriordb):
    posterior, reference = fitted(name, "full_rank", posteriordb)
    assert posterior.status.converged
    assert short_of_optimum(posterior, reference, "fullrank") < 0.02
    assert posterior.verdict.level in ("good", "resample")


@pytest.mark.slow
@pytest.mark.parametrize("name", HARD)
def test_full_rank_lands_where_the_posterior_is_curved_or_has_two_modes(name, posteriordb):
    posterior, reference = fitted(name, "full_rank", posteriordb)
    assert posterior.status.converged
    assert short_of_optimum(posterior, reference, "fullrank") < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_cold_start_finds_the_better_mode_of_hares_and_lynxes(seed, posteriordb):
    """From the origin the search ends in another mode, 40 nats below: not worth a mention either."""
    posterior, reference = fitted(LYNXES, "mean_field", posteriordb, seed)
    assert short_of_optimum(posterior, reference, "meanfield") < 0.05
    assert posterior.status.modes == 1


@pytest.mark.parametrize("name", [*NEAR_GAUSSIAN, CENTRED])
def test_mean_field_lands_on_the_family_optimum(name, posteriordb):
    posterior, reference = fitted(name, "mean_field", posteriordb)
    assert posterior.status.converged
    assert short_of_optimum(posterior, reference, "meanfield") < 0.05


@pytest.mark.parametrize("name", [NEAR_GAUSSIAN[i] for i in (1, 2, 3, 4, 6)])
def test_full_rank_is_good_where_the_posterior_is_gaussian(name, posteriordb):
    posterior, _ = fitted(name, "full_rank", posteriordb)
    assert posterior.verdict.level == "good"


@pytest.mark.parametrize(
    ("name", "guide"),
    [
        ("kidiq_kidscore_interaction", "mean_field"),
        ("ark_ark", "mean_field"),
        (CENTRED, "mean_field"),
        (CENTRED, "full_rank"),
    ],
)
def test_what_is_wrong_is_not_called_good(name, guide, posteriordb):
    posterior, _ = fitted(name, guide, posteriordb)
    assert posterior.verdict.level != "good"


@pytest.mark.parametrize("name", ["sblri_blr", "kidiq_kidscore_interaction", "ark_ark"])
def test_importance_weights_give_the_evidence(name, posteriordb):
    posterior, reference = fitted(name, "full_rank", posteriordb)
    evidence, se = posterior.log_evidence
    noise = 4 * np.hypot(se, reference["log_evidence_se"])
    assert abs(evidence - reference["log_evidence"]) < noise + 1e-3
