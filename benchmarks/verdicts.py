"""Verdicts against the truth: all open posteriors, three guides, several seeds.

    python -m benchmarks.verdicts [--posteriors eight_schools,ark] [--guides mean_field] [--seeds 0,1]

Every fit is a cold start with no option but guide and seed, in a process of its own. What its verdict
says is held against how far its means and sds are from the reference's: the confusion table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.lib import options, references
from benchmarks.lib.records import Records
from benchmarks.lib.tables import failures, markdown

NAME = "verdicts"
GAUSSIAN = ("mean_field", "full_rank")
FLOW = "affine_coupling"
LEVELS = ("good", "resample", "reject")
KIDSCORE, DOGS, ARK = "kidiq_kidscore_interaction", "dogs_dogs", "ark_ark"
CENTRED = "eight_schools_eight_schools_centered"
NEVER_GOOD = {
    "mean_field": (KIDSCORE, ARK, "hudson_lynx_hare_lotka_volterra", CENTRED),
    "full_rank": (CENTRED,),
}
GOOD = {
    "full_rank": (
        KIDSCORE,
        DOGS,
        "glm_poisson_data_glm_poisson_model",
        ARK,
        "low_dim_gauss_mix_low_dim_gauss_mix",
    )
}
# In reference sds, and as a share of a reference sd.
ACCURATE, INACCURATE = 0.05, 0.1
# Effective draws of the references' moments; with those of q they make the Monte Carlo error.
REFERENCE_DRAWS = 10_000
COLUMNS = {
    "posterior": "posterior",
    "guide": "guide",
    "seed": "seed",
    "verdict": "verdict",
    "khat": "k-hat",
    "khat_se": "s.e.",
    "worth": "ESS of the draws",
    "gap": "evidence − ELBO (nats)",
    "mean_error": "max mean error (sd)",
    "sd_error": "max sd error",
    "truth": "truth",
    "verdict_seconds": "seconds of the verdict",
}


def one(name: str, guide: str, seed: int, draws: int) -> dict[str, Any]:
    """One fit and its verdict, in the process of a worker."""
    import time

    import torch

    import pyro_vi_kit as vi
    from benchmarks.lib.quality import against

    torch.set_num_threads(1)
    reference = references.Reference(name)
    posterior = vi.fit(reference.module().MODEL, guide=guide, seed=seed, progress=False)
    started = time.perf_counter()
    verdict, evaluation = posterior.verdict, posterior._evaluation
    seconds = time.perf_counter() - started
    if verdict is None or evaluation.log_weights is None or posterior.ess is None:
        raise ValueError(f"guide {guide!r} has no verdict")
    return against(posterior, reference, draws) | {
        "verdict": verdict.level,
        "reasons": "; ".join(verdict.reasons),
        "advice": verdict.advice,
        "khat": posterior.khat,
        "khat_se": posterior.khat_se,
        "worth": posterior.ess / len(evaluation.log_weights),
        "weighed": len(evaluation.log_weights),
        "gap": evaluation.gap,
        "modes": posterior.status.modes,
        "missed": posterior.status.missed,
        "verdict_seconds": seconds,
        "seconds": posterior.seconds,
    }


def noise(draws: int) -> float:
    """Three standard errors of a mean in sds, and about those of a relative sd."""
    return 3.0 * (1.0 / REFERENCE_DRAWS + 1.0 / draws) ** 0.5


def truth(row: dict[str, Any], draws: int) -> str:
    """How a fit is: ``accurate``, ``inaccurate`` beyond Monte Carlo error, or ``between``."""
    worst = max(row["mean_error"], row["sd_error"])
    if worst <= ACCURATE:
        return "accurate"
    return "inaccurate" if worst > INACCURATE + noise(draws) else "between"


def confusion(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many fits of each guide and truth got each verdict."""
    table = []
    for guide in (*GAUSSIAN, FLOW):
        for kind in ("accurate", "between", "inaccurate"):
            mine = [row for row in rows if row["guide"] == guide and row["truth"] == kind]
            if mine:
                counts = {level: sum(row["verdict"] == level for row in mine) for level in LEVELS}
                table.append({"guide": guide, "truth": kind} | counts)
    return table


def requirements(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pass or fail table."""
    statements: list[tuple[str, list[dict[str, Any]], Callable[[dict[str, Any]], bool]]] = []
    for guide, names in NEVER_GOOD.items():
        for name in names:
            mine = [row for row in rows if (row["guide"], row["posterior"]) == (guide, name)]
            statements.append((f"{guide} on {name}: never good", mine, _is_not("good")))
    for guide, names in GOOD.items():
        for name in names:
            mine = [row for row in rows if (row["guide"], row["posterior"]) == (guide, name)]
            statements.append((f"{guide} on {name}: good", mine, lambda r: r["verdict"] == "good"))
    good = [row for row in rows if row["verdict"] == "good"]
    accurate = [row for row in rows if row["truth"] == "accurate"]
    statements += [
        (
            "no fit called good has a mean off by over 0.1 sd or an sd by over 10 %",
            good,
            lambda row: row["truth"] != "inaccurate",
        ),
        ("no fit within 0.05 sd and 5 % is rejected", accurate, _is_not("reject")),
    ]
    return [
        {"required": words, "shown": f"{met} of {len(mine)}", "passed": met == len(mine)}
        for words, mine, holds in statements
        if mine
        for met in [sum(map(holds, mine))]
    ]


def _is_not(level: str) -> Callable[[dict[str, Any]], bool]:
    return lambda row: row["verdict"] != level


def report(rows: Sequence[dict[str, Any]], draws: int) -> str:
    """All of it as Markdown."""
    known = [row | {"truth": truth(row, draws)} for row in rows if not row["error"]]
    parts = [
        "## Verdicts against the truth",
        f"Errors are the largest of the reported parameters, on {draws:,} draws of q: accurate within "
        f"{ACCURATE} sd and {100 * ACCURATE:.0f} %, inaccurate beyond {INACCURATE} sd or "
        f"{100 * INACCURATE:.0f} % by more than Monte Carlo error ({noise(draws):.3f}, three standard "
        f"errors of the draws and of the references). ESS is a share of the draws.",
        markdown(["guide", "truth", *LEVELS], confusion(known)),
        markdown(["required", "shown", "passed"], requirements(known)),
        markdown(COLUMNS, known),
    ]
    parts += failures(rows, lambda r: f"{r['posterior']}, {r['guide']}, seed {r['seed']}")
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    words = options.parser(__doc__, cap=900.0)
    words.add_argument("--posteriors", type=options.listed, default=None, help="all by default")
    words.add_argument("--guides", type=options.listed, default=None, help="all by default")
    words.add_argument(
        "--seeds", type=options.integers, default=None, help="0 to 9; 0,1 with --quick"
    )
    words.add_argument(
        "--flow-seeds",
        type=options.integers,
        default=None,
        help="of the flow: as the others; 0,1 with --quick",
    )
    words.add_argument("--draws", type=int, default=200_000, help="draws of q (%(default)s)")
    asked = words.parse_args(argv)
    if reason := references.missing():
        sys.exit(reason)
    rows = Records(asked.out, NAME, asked.resume).measure_all(
        "benchmarks.verdicts:one",
        _cells(asked),
        lambda row: f"{row['verdict']}, {truth(row, asked.draws)}",
        cap=asked.cap or 900.0,
    )
    options.publish(asked.out, NAME, report(rows, asked.draws))
    return 0


def _cells(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """What is to be fitted."""
    few = [0, 1]
    seeds = asked.seeds or (few if asked.quick else list(range(10)))
    flow_seeds = asked.flow_seeds or (few if asked.quick else seeds)
    known = (*GAUSSIAN, FLOW)
    guides = options.chosen(asked.guides, known, "guide") if asked.guides else list(known)
    if asked.posteriors:
        names = options.chosen(asked.posteriors, references.names(), "posterior")
    else:
        names = list(references.QUICK) if asked.quick else references.names()
    return [
        {"posterior": name, "guide": guide, "seed": seed, "draws": asked.draws}
        for guide in guides
        for name in names
        for seed in (flow_seeds if guide == FLOW else seeds)
    ]


if __name__ == "__main__":
    sys.exit(main())
