"""``guide="auto"`` on the open posteriors: what it ends with, what it tried, and what that cost.

    python -m benchmarks.auto [--posteriors eight_schools,ark] [--seeds 0,1] [--budget 120]

Every fit is a cold start in a process of its own, with no option but guide, budget and seed; nothing
that was compiled before is found. Moments are compared with the reference's as they are, and after
Pareto-smoothed importance weighting, which is what a verdict of "resample" asks for.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.lib import options, references
from benchmarks.lib.records import Records
from benchmarks.lib.tables import failures, markdown

NAME = "auto"
BUDGET = 120.0
REQUIRED = 10  # of the 11
DRAWS = 40_000
COLUMNS = {
    "posterior": "posterior",
    "seed": "seed",
    "guide": "ends with",
    "verdict": "verdict",
    "khat": "k-hat",
    "kl": "KL (nats)",
    "mean_error": "max mean error (sd)",
    "sd_error": "max sd error",
    "resampled_mean_error": "the same, resampled",
    "resampled_sd_error": "the same, resampled ",
    "seconds": "seconds",
    "climb": "before the last rung (s)",
    "ladder": "ladder",
}


def one(name: str, seed: int, budget: float) -> dict[str, Any]:
    """One fit, in the process of a worker."""
    import time

    import torch

    import pyro_vi_kit as vi
    from benchmarks.lib.quality import against

    torch.set_num_threads(1)
    reference = references.Reference(name)
    model = reference.module().MODEL
    started = time.perf_counter()
    posterior = vi.fit(model, guide="auto", budget=budget, seed=seed, progress=False)
    verdict = posterior.verdict
    seconds = time.perf_counter() - started
    tried = [rung for rung in posterior.record.ladder if rung.verdict]
    return {
        **against(posterior, reference, DRAWS),
        **resampled(posterior, reference.facts),
        "guide": next(rung.guide for rung in tried if rung.chosen),
        "verdict": "none" if verdict is None else verdict.level,
        "khat": posterior.khat,
        "seconds": seconds,
        "climb": seconds - tried[-1].seconds,
        "ladder": " -> ".join(map(str, posterior.record.ladder)),
        "status": posterior.status.reason,
    }


def resampled(posterior: Any, facts: Mapping[str, Any]) -> dict[str, float]:
    """The worst errors of the reported parameters' moments under Pareto-smoothed weights.

    Args:
        posterior: The fit.
        facts: The reference's.

    Returns:
        ``resampled_mean_error``, in reference sds, and ``resampled_sd_error``, relative.
    """
    import numpy as np

    from benchmarks.lib.quality import entries
    from pyro_vi_kit.core.psis import psis, weighted_moments

    values, weighed = posterior.approximation.draw_and_weigh(DRAWS, 314_159)
    smoothed = psis((weighed.log_p - weighed.log_q).numpy())
    mean, sd = weighted_moments(entries(values, facts["parameters"]), smoothed.log_weights)
    truth, true_sd = np.array(facts["mean"]), np.array(facts["sd"])
    return {
        "resampled_mean_error": float(np.abs((mean - truth) / true_sd).max()),
        "resampled_sd_error": float(np.abs(sd / true_sd - 1).max()),
    }


def is_as_required(row: Mapping[str, Any], budget: float) -> bool:
    """Whether a climb ended usable within its time."""
    usable = row.get("verdict") in ("good", "resample")
    return not row.get("error") and usable and row["seconds"] <= budget


def requirements(rows: Sequence[Mapping[str, Any]], budget: float) -> list[dict[str, Any]]:
    """The pass or fail table, seed by seed."""
    table = []
    for seed in sorted({row["seed"] for row in rows}):
        mine = [row for row in rows if row["seed"] == seed]
        met = sum(is_as_required(row, budget) for row in mine)
        allowed = len(mine) * REQUIRED // 11
        words = f'seed {seed}: "good" or "resample" within {budget:g} s on 10 of 11'
        shown = f"{met} of {len(mine)}"
        table.append({"required": words, "shown": shown, "passed": met >= allowed})
    return table


def report(rows: Sequence[dict[str, Any]], budget: float) -> str:
    """All of it as Markdown."""
    done = [row for row in rows if not row["error"]]
    total, climb = (sum(row[key] for row in done) for key in ("seconds", "climb"))
    parts = [
        '## guide="auto"',
        f"Fits with a budget of {budget:g} s each; moments on {DRAWS:,} draws of q. A star marks the "
        "rung that was chosen; its seconds include its verdict.",
        markdown(COLUMNS, done),
        markdown(["required", "shown", "passed"], requirements(rows, budget)),
        f"All climbs together took {total:.0f} s, of which {climb:.0f} s went into rungs before the "
        "last ones.",
        *failures(rows, lambda r: f"{r['posterior']}, seed {r['seed']}"),
    ]
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    words = options.parser(__doc__)
    words.add_argument("--posteriors", type=options.listed, default=None, help="all by default")
    words.add_argument("--seeds", type=options.integers, default=[0])
    words.add_argument(
        "--budget", type=options.positive, default=BUDGET, help="seconds of each fit (%(default)s)"
    )
    asked = words.parse_args(argv)
    if reason := references.missing():
        sys.exit(reason)
    rows = Records(asked.out, NAME, asked.resume).measure_all(
        "benchmarks.auto:one", _cells(asked), lambda row: row["ladder"], cap=2 * asked.budget
    )
    options.publish(asked.out, NAME, report(rows, asked.budget))
    return 0


def _cells(asked: argparse.Namespace) -> list[dict[str, Any]]:
    quick = list(references.QUICK) if asked.quick else references.names()
    named = asked.posteriors
    posteriors = options.chosen(named, references.names(), "posterior") if named else quick
    return [
        {"posterior": name, "seed": seed, "budget": asked.budget}
        for name in posteriors
        for seed in asked.seeds
    ]


if __name__ == "__main__":
    sys.exit(main())
