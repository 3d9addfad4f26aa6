"""Guide families against each other on the open posteriors: the richer, the higher the ELBO.

    python -m benchmarks.families [--posteriors ark_ark] [--guides mean_field,full_rank] [--seeds 0,1]

Every fit is a cold start in a process of its own, with no option but guide and seed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from benchmarks.lib import options, references
from benchmarks.lib.records import Records
from benchmarks.lib.tables import failures, markdown

NAME = "families"
# Each is contained in the next one.
LADDER = ("mean_field", "low_rank", "full_rank")
FLOWS = ("affine_coupling", "autoregressive", "neural_spline", "planar", "radial")
OTHERS = ("laplace", "pathfinder", "structured", "student_t")
CENTRED = "eight_schools_eight_schools_centered"
FLOW_KL, FLOW_SECONDS = 0.05, 180.0
# What a fit may leave, by its own tolerance, in nats: its least, and for each dimension of a flow.
LEFT, LEFT_PER_DIM = 0.01, 1e-3
QUICK = (*LADDER, "affine_coupling", "autoregressive")
COLUMNS = {
    "posterior": "posterior",
    "guide": "guide",
    "seed": "seed",
    "elbo": "ELBO (nats)",
    "elbo_se": "s.e.",
    "kl": "KL (nats)",
    "mean_error": "max mean error (sd)",
    "sd_error": "max sd error",
    "khat": "k-hat",
    "verdict": "verdict",
    "seconds": "seconds",
    "status": "ended",
}


def one(name: str, guide: str, seed: int, draws: int) -> dict[str, Any]:
    """One fit, in the process of a worker."""
    import torch

    import pyro_vi_kit as vi
    from benchmarks.lib.quality import against
    from pyro_vi_kit.model.log_density import Density

    torch.set_num_threads(1)
    reference = references.Reference(name)
    posterior = vi.fit(reference.module().MODEL, guide=guide, seed=seed, progress=False)
    return {
        **against(posterior, reference, draws),
        "dim": Density(reference.module().MODEL).dim,
        "seconds": posterior.seconds,
        "status": posterior.status.reason,
        "khat": posterior.khat,
        "verdict": str(getattr(posterior.verdict, "level", None)),
    }


def orderings(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each posterior and seed, whether each family is at least as good as the one before it.

    ELBOs are compared at three standard errors of their difference, and with what the better family's
    fit may have left by its own tolerance. Of the flows the best one counts.
    """
    table = []
    for key in dict.fromkeys((row["posterior"], row["seed"]) for row in rows):
        mine = {row["guide"]: row for row in rows if (row["posterior"], row["seed"]) == key}
        good = {guide: row for guide, row in mine.items() if not row.get("error")}
        flows = [good[guide] for guide in FLOWS if guide in good]
        chain = [good[guide] for guide in LADDER if guide in good]
        chain += [max(flows, key=lambda row: row["elbo"])] if flows else []
        steps = [_step(low, high) for low, high in pairwise(chain)]
        if steps:
            table.append(
                {
                    "posterior": key[0],
                    "seed": key[1],
                    "ELBO, nats above the family before": "; ".join(words for words, _ in steps),
                    "ordered": all(holds for _, holds in steps),
                }
            )
    return table


def _step(low: Mapping[str, Any], high: Mapping[str, Any]) -> tuple[str, bool]:
    """From one family to the next, in words, and whether it is no step down."""
    gain = high["elbo"] - low["elbo"]
    noise = 3.0 * (low["elbo_se"] ** 2 + high["elbo_se"] ** 2) ** 0.5
    left = max(LEFT, LEFT_PER_DIM * high["dim"])
    return f"{high['guide']} {gain:+.3f}", gain >= -noise - left


def requirements(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The pass or fail table."""
    table = []
    ordered = orderings(rows)
    if ordered:
        met = sum(line["ordered"] for line in ordered)
        table.append(
            {
                "required": "mean_field ≤ low_rank ≤ full_rank ≤ best flow",
                "shown": f"{met} of {len(ordered)}",
                "passed": met == len(ordered),
            }
        )
    flows = [r for r in rows if r["posterior"] == CENTRED and r["guide"] in FLOWS]
    fast = [r for r in flows if not r.get("error") and r["seconds"] <= FLOW_SECONDS]
    if flows:
        best = min(fast, key=lambda row: row["kl"], default=None)
        table.append(
            {
                "required": f"centred eight schools: best flow at most {FLOW_KL} nats of KL within "
                f"{FLOW_SECONDS:.0f} s",
                "shown": "none" if best is None else f"{best['guide']} {best['kl']:.4f}",
                "passed": best is not None and best["kl"] <= FLOW_KL,
            }
        )
    return table


def report(rows: Sequence[dict[str, Any]], draws: int) -> str:
    """All of it as Markdown."""
    shown = [row | {"elbo": f"{row['elbo']:.3f}"} for row in rows if not row["error"]]
    parts = [
        "## Guide families",
        f"ELBO, KL(q‖p) = log evidence − ELBO and moments on {draws:,} draws of q, with defaults.",
        markdown(COLUMNS, shown),
        markdown(
            ["posterior", "seed", "ELBO, nats above the family before", "ordered"], orderings(rows)
        ),
        markdown(["required", "shown", "passed"], requirements(rows)),
        *failures(rows, lambda r: f"{r['posterior']}, {r['guide']}"),
    ]
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    words = options.parser(__doc__, cap=900.0)
    words.add_argument("--posteriors", type=options.listed, default=None, help="all by default")
    words.add_argument("--guides", type=options.listed, default=None, help="all by default")
    words.add_argument("--seeds", type=options.integers, default=[0])
    words.add_argument("--draws", type=int, default=100_000, help="draws of q (%(default)s)")
    asked = words.parse_args(argv)
    if reason := references.missing():
        sys.exit(reason)
    rows = Records(asked.out, NAME, asked.resume).measure_all(
        "benchmarks.families:one",
        _cells(asked),
        lambda row: f"KL {row['kl']:.4f} nats in {row['seconds']:.1f} s",
        cap=asked.cap or 900.0,
    )
    options.publish(asked.out, NAME, report(rows, asked.draws))
    return 0


def _cells(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """What is to be fitted."""
    known = (*LADDER, *FLOWS, *OTHERS)
    names = references.names()
    quick = list(dict.fromkeys([CENTRED, *references.QUICK]))
    every = quick if asked.quick else names
    posteriors = options.chosen(asked.posteriors, names, "posterior") if asked.posteriors else every
    wanted = QUICK if asked.quick else known
    chosen = options.chosen(asked.guides, known, "guide") if asked.guides else wanted
    return [
        {"posterior": name, "guide": guide, "seed": seed, "draws": asked.draws}
        for name in posteriors
        for guide in chosen
        for seed in asked.seeds
    ]


if __name__ == "__main__":
    sys.exit(main())
