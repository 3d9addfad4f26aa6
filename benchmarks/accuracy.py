"""Fits with defaults against the open posteriors: optimum of the family, moments, evaluations.

    python -m benchmarks.accuracy [--posteriors eight_schools,ark] [--guides mean_field] [--seeds 0,1]

Every fit is a cold start in a process of its own, with no option but guide and seed. The log joint is
compared with the reference's first; a model that fails there is not fitted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks.lib import options, references
from benchmarks.lib.records import Records
from benchmarks.lib.tables import markdown

NAME = "accuracy"
GAUSSIAN = ("mean_field", "full_rank", "low_rank")
FLOW = "affine_coupling"
FLOW_ON = ("eight_schools_eight_schools_centered", "eight_schools_eight_schools_noncentered")
NEAR_GAUSSIAN = (
    "sblri_blr",
    "kidiq_kidscore_interaction",
    "dogs_dogs",
    "glm_poisson_data_glm_poisson_model",
    "ark_ark",
    "gp_pois_regr_gp_regr",
    "low_dim_gauss_mix_low_dim_gauss_mix",
    "hmm_example_hmm_example",
)
FLOW_KL = {FLOW_ON[0]: 0.07, FLOW_ON[1]: 0.02}
LOG_JOINT_ERROR = 1e-6
COLUMNS = {
    "posterior": "posterior",
    "guide": "guide",
    "seed": "seed",
    "log_joint_error": "log joint error",
    "elbo": "ELBO (nats)",
    "elbo_se": "s.e.",
    "kl": "KL (nats)",
    "gap": "below optimum (nats)",
    "mean_error": "max mean error (sd)",
    "sd_error": "max sd error",
    "evaluations": "gradient evaluations",
    "seconds": "seconds",
    "engine": "engine",
    "verdict": "verdict",
    "ok": "as required",
}


def one(name: str, guide: str, seed: int, draws: int) -> dict[str, Any]:
    """One fit, in the process of a worker."""
    import torch

    import pyro_vi_kit as vi
    from benchmarks.lib.quality import against, log_joint_error

    torch.set_num_threads(1)
    reference = references.Reference(name)
    module = reference.module()
    error = log_joint_error(module, reference)
    if error > LOG_JOINT_ERROR:
        return {"log_joint_error": error}
    posterior = vi.fit(module.MODEL, guide=guide, seed=seed, progress=False)
    found = against(posterior, reference, draws)
    optimum = reference.optimum(guide)
    return {
        "log_joint_error": error,
        **found,
        "gap": None if optimum is None else optimum[0] - found["elbo"],
        "optimum_se": None if optimum is None else optimum[1],
        "evaluations": posterior.evaluations,
        "seconds": posterior.seconds,
        "method": posterior.method,
        "engine": posterior.engine,
        "status": posterior.status.reason,
        "khat": posterior.khat,
        "verdict": str(getattr(posterior.verdict, "level", None)),
    }


def shortcomings(row: dict[str, Any]) -> list[str]:
    """What a fit was required to show and did not; empty where nothing was, or all was well."""
    if row.get("error"):
        return [f"failed: {row['error']}"]
    if row["log_joint_error"] > LOG_JOINT_ERROR:
        return [f"its log joint is {row['log_joint_error']:.2g} nats off the reference's"]
    name, guide = row["posterior"], row["guide"]
    limits: list[tuple[str, float | None, float]] = []
    if guide == "mean_field":
        limits.append(("ELBO below the optimum", row["gap"], 0.05))
    if guide == "full_rank":
        near = name in NEAR_GAUSSIAN
        limits.append(("KL above the optimum's", row["gap"], 0.02 if near else 0.05))
        if near:
            limits.append(("max mean error (sd)", row["mean_error"], 0.05))
            limits.append(("max sd error", row["sd_error"], 0.06))
    if guide == FLOW and name in FLOW_KL:
        limits.append(("KL (nats)", row["kl"], FLOW_KL[name]))
        limits.append(("seconds", row["seconds"], 180.0))
    return [
        f"{what} {value:.3g}, at most {limit:g}"
        for what, value, limit in limits
        if value is None or not value <= limit
    ]


def requirements(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pass or fail table: how many fits of each kind show what they must."""
    kinds = {
        "mean_field: ELBO at most 0.05 below the optimum": ("mean_field", None),
        "full_rank, near Gaussian: KL at most optimum + 0.02, means 0.05 sd, sds 6 %": (
            "full_rank",
            True,
        ),
        "full_rank, the others: KL at most optimum + 0.05": ("full_rank", False),
        "affine_coupling, eight schools: KL at most 0.07 centred, 0.02 non-centred, 180 s": (
            FLOW,
            None,
        ),
    }
    table = []
    for words, (guide, near) in kinds.items():
        mine = [
            row
            for row in rows
            if row["guide"] == guide
            and (near is None or (row["posterior"] in NEAR_GAUSSIAN) == near)
            and (guide != FLOW or row["posterior"] in FLOW_KL)
        ]
        if mine:
            met = sum(not shortcomings(row) for row in mine)
            shown = f"{met} of {len(mine)}"
            table.append({"required": words, "shown": shown, "passed": met == len(mine)})
    for guide in ("mean_field", "full_rank"):
        counts = [
            row["evaluations"] for row in rows if row["guide"] == guide and "evaluations" in row
        ]
        if counts:
            middle = median(counts)
            words = f"{guide}: at most 8,000 gradient evaluations, median"
            table.append({"required": words, "shown": f"{middle:,.0f}", "passed": middle <= 8000})
    return table


def report(rows: Sequence[dict[str, Any]], draws: int) -> str:
    """All of it as Markdown."""
    shown = [
        row | {"ok": not shortcomings(row), "elbo": f"{row['elbo']:.3f}" if "elbo" in row else None}
        for row in rows
    ]
    missed = [
        f"- {row['posterior']}, {row['guide']}, seed {row['seed']}: {'; '.join(gaps)}"
        for row in rows
        if (gaps := shortcomings(row))
    ]
    parts = [
        "## Accuracy with defaults",
        f"ELBO, KL(q‖p) = log evidence − ELBO and moments on {draws:,} draws of q. Optima are those of "
        "the references (mean field and full rank), known to 0.001 to 0.015 nats. Moments are of the "
        "reported parameters.",
        markdown(COLUMNS, [row for row in shown if not row["error"]]),
        markdown(["required", "shown", "passed"], requirements(rows)),
        *(["Missed:\n\n" + "\n".join(missed)] if missed else []),
    ]
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    words = options.parser(__doc__, cap=900.0)
    words.add_argument("--posteriors", type=options.listed, default=None, help="all by default")
    words.add_argument("--guides", type=options.listed, default=None, help="all by default")
    words.add_argument("--seeds", type=options.integers, default=[0])
    words.add_argument("--draws", type=_draws, default=200_000, help="draws of q (%(default)s)")
    asked = words.parse_args(argv)
    if reason := references.missing():
        sys.exit(reason)
    rows = Records(asked.out, NAME, asked.resume).measure_all(
        "benchmarks.accuracy:one",
        _cells(asked),
        lambda row: "; ".join(shortcomings(row)) or "as required",
        cap=asked.cap or 900.0,
    )
    options.publish(asked.out, NAME, report(rows, asked.draws))
    return 0


def _cells(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """What is to be fitted: the flow on both eight schools only, unless its posteriors are named."""
    # Here, and not above: `--help` need not wait for torch.
    from pyro_vi_kit import guides

    known = [guide for guide in (*GAUSSIAN, FLOW) if guide in guides.names()]
    quick = list(references.QUICK) if asked.quick else references.names()
    named = asked.posteriors
    posteriors = options.chosen(named, references.names(), "posterior") if named else quick
    wanted = [guide for guide in known if guide != "low_rank"] if asked.quick else known
    chosen = options.chosen(asked.guides, known, "guide") if asked.guides else wanted
    return [
        {"posterior": name, "guide": guide, "seed": seed, "draws": asked.draws}
        for guide in chosen
        for name in posteriors
        for seed in asked.seeds
        if guide != FLOW or named or name in FLOW_ON
    ]


def _draws(text: str) -> int:
    count = int(text)
    if count < 1000:
        raise argparse.ArgumentTypeError("at least 1,000 draws")
    return count


if __name__ == "__main__":
    sys.exit(main())
