"""Does calibration see what it should, and nothing else? And what do 200 fits of eight schools cost?

    python -m benchmarks.calibration [--seeds 0,1] [--simulations 200]

The conjugate model is a regression on two columns that correlate to 0.95, with known noise: its
posterior is a normal in closed form. On it are calibrated: draws of the exact posterior; the same
shifted by half an sd; the prior, which is calibrated in each coefficient, but not jointly with the data;
and fits of `full_rank`, which holds the posterior, and of `mean_field`, whose sds are too small. Each
runs in a process of its own.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.lib import options
from benchmarks.lib.records import Records
from benchmarks.lib.tables import failures, markdown

NAME = "calibration"
ROWS, PRIOR_SD, NOISE_SD, SHIFT = 20, 1.0, 1.0, 0.5
# What each has to end with: words that its sites' verdicts hold; none where it is calibrated.
EXPECTED = {
    "exact posterior": "",
    "full_rank": "",
    "mean_field": "too narrow",
    "exact, shifted by 0.5 sd": "biased up",
    "prior": "not uniform",
}
SECONDS = 120.0
COLUMNS = {
    "model": "model",
    "guide": "guide",
    "seed": "seed",
    "simulations": "simulations",
    "verdict": "verdict",
    "found": "found",
    "coverage_low": "least 90 % coverage",
    "coverage_high": "largest",
    "failed": "failed",
    "jobs": "processes",
    "seconds": "seconds",
    "cpu_seconds": "of the processor, imports included",
    "ok": "as required",
}


def conjugate_model() -> Any:
    """y ~ N(X beta, 1), beta ~ N(0, 1), with two columns that are nearly the same."""
    import numpy as np
    import pyro
    import pyro.distributions as dist
    import torch

    import pyro_vi_kit as vi

    def regression(x: Any, y: Any = None) -> Any:
        beta = pyro.sample("beta", dist.Normal(x.new_zeros(2), PRIOR_SD).to_event(1))
        with pyro.plate("row", len(x)):
            return pyro.sample("y", dist.Normal((x * beta).sum(-1), NOISE_SD), obs=y)

    rng = np.random.default_rng(7)
    x = rng.multivariate_normal([0.0, 0.0], [[1.0, 0.95], [0.95, 1.0]], ROWS)
    x = torch.tensor(x, dtype=torch.float64)
    return vi.Model(regression, x, torch.zeros(ROWS, dtype=torch.float64), name="regression")


def oracle(shift: float, draws: int) -> Any:
    """Draws of the exact posterior, each coefficient shifted by so many of its sds.

    The posterior of a normal linear model with known noise: Gelman et al., Bayesian Data Analysis, 14.8.
    """
    import numpy as np

    def fitter(model: Any, seed: int) -> Mapping[str, Any]:
        x, y = (argument.numpy() for argument in model.args)
        precision = x.T @ x / NOISE_SD**2 + np.eye(2) / PRIOR_SD**2
        covariance = np.linalg.inv(precision)
        mean = covariance @ x.T @ y / NOISE_SD**2 + shift * np.sqrt(covariance.diagonal())
        return {"beta": np.random.default_rng(seed).multivariate_normal(mean, covariance, draws)}

    return fitter


def prior(draws: int) -> Any:
    """Draws of the prior, whatever the data."""
    import numpy as np

    def fitter(model: Any, seed: int) -> Mapping[str, Any]:
        return {"beta": PRIOR_SD * np.random.default_rng(seed).standard_normal((draws, 2))}

    return fitter


def one(guide: str, seed: int, simulations: int) -> dict[str, Any]:
    """One calibration on the conjugate model, in the process of a worker."""
    import pyro_vi_kit as vi

    draws = 999
    fitters = {
        "exact posterior": oracle(0.0, draws),
        "exact, shifted by 0.5 sd": oracle(SHIFT, draws),
        "prior": prior(draws),
    }
    what: dict[str, Any] = {"fitter": fitters[guide]} if guide in fitters else {"guide": guide}
    found = vi.calibrate(
        conjugate_model(), simulations=simulations, draws=draws, seed=seed, jobs=1, **what
    )
    return facts(found)


def schools(guide: str, seed: int, simulations: int, jobs: int) -> dict[str, Any]:
    """Eight schools, non-centred, in the process of a worker."""
    import pyro_vi_kit as vi
    from models.eight_schools import MODEL

    found = vi.calibrate(MODEL, guide, simulations=simulations, seed=seed, jobs=jobs)
    # Those of other processes are not known before they end.
    return facts(found) | {"cpu_seconds": time.process_time() if jobs == 1 else None}


def facts(found: Any) -> dict[str, Any]:
    """What the table says of a calibration."""
    wrong = {n: words for n, words in found.verdict.sites.items() if words != "calibrated"}
    table = found.coverage([0.9])["coverage"]
    return {
        "verdict": found.verdict.level,
        "found": "; ".join(f"{name}: {words}" for name, words in wrong.items()),
        "coverage_low": float(table.min()),
        "coverage_high": float(table.max()),
        "failed": len(found.failures),
        "jobs": found.jobs,
        "seconds": found.seconds,
    }


def as_required(row: Mapping[str, Any]) -> bool:
    """Whether a calibration ended as it has to."""
    if row.get("error"):
        return False
    if row["model"] == "eight_schools":
        return row["seconds"] <= SECONDS and not row["failed"]
    wanted = EXPECTED[row["guide"]]
    return wanted in row["found"] if wanted else row["verdict"] == "calibrated"


def requirements(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The pass or fail table."""
    table = []
    for guide, wanted in EXPECTED.items():
        mine = [row for row in rows if row["guide"] == guide and row["model"] == "regression"]
        if mine:
            met = sum(map(as_required, mine))
            words = f"conjugate, {guide}: {wanted or 'calibrated'}"
            table.append(
                {"required": words, "shown": f"{met} of {len(mine)}", "passed": met == len(mine)}
            )
    timed = [row for row in rows if row["model"] == "eight_schools"]
    if timed:
        worst = max(row.get("seconds", float("inf")) for row in timed)
        words = f"eight schools, non-centred: at most {SECONDS:.0f} s"
        passed = all(map(as_required, timed))
        table.append({"required": words, "shown": f"{worst:.0f} s", "passed": passed})
    return table


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    """All of it as Markdown."""
    shown = [{**row, "ok": as_required(row)} for row in rows]
    parts = [
        "## Calibration over simulated data sets",
        "`vi.calibrate`: latents from the prior, data given them, a fit, and the rank of the truth "
        "among 999 draws. A calibrated guide is called otherwise one time in a hundred.",
        markdown(COLUMNS, shown),
        markdown(["required", "shown", "passed"], requirements(rows)),
        *failures(rows, lambda r: f"{r['guide']}, seed {r['seed']}"),
    ]
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    words = options.parser(__doc__, cap=900.0)
    words.add_argument("--seeds", type=options.integers, default=None, help="(0 to 9; quick: 0, 1)")
    words.add_argument("--simulations", type=int, default=200, help="(%(default)s)")
    asked = words.parse_args(argv)
    seeds = asked.seeds or ([0, 1] if asked.quick else list(range(10)))
    cells: list[tuple[str, dict[str, Any]]] = [
        ("one", {"guide": guide, "seed": seed, "simulations": asked.simulations})
        for guide in EXPECTED
        for seed in seeds
    ]
    timed = {"guide": "full_rank", "seed": seeds[0], "simulations": asked.simulations}
    cells += [("schools", timed | {"jobs": jobs}) for jobs in (1, 2)]
    records = Records(asked.out, NAME, asked.resume)
    rows = []
    for i, (target, arguments) in enumerate(cells, 1):
        key = {"model": "regression" if target == "one" else "eight_schools", **arguments}
        where = f"benchmarks.calibration:{target}"
        row = records.measure(key, where, arguments, cap=asked.cap or 900.0)
        rows.append(row)
        state = row["error"] or f"{row['verdict']} {row['found']} ({row['seconds']:.0f} s)"
        options.say(
            f"[{i}/{len(cells)}] {key['model']}, {row['guide']}, seed {row['seed']}: {state}"
        )
    options.publish(asked.out, NAME, report(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
