"""Neal's funnel by every flow: the log evidence, which is known, from importance weights.

    python -m benchmarks.funnel [--guides affine_coupling,autoregressive] [--seeds 0,1,2]

The target is that of models/funnel.py, in ten dimensions, a density of its own: its log evidence is
0, and minus a guide's ELBO is its KL(q‖p). Every fit is a cold start in a process of its own, with no
option but guide and seed. Of each seed that flow counts which has the best ELBO: who does not know the
truth would choose it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.families import FLOWS
from benchmarks.lib import options
from benchmarks.lib.processes import ROOT
from benchmarks.lib.records import Records
from benchmarks.lib.tables import failures, markdown

NAME = "funnel"
QUICK = ("affine_coupling", "autoregressive")
SEEDS = (0, 1, 2)
LOG_EVIDENCE, WITHIN = 0.0, 0.05
_SEED = 314_159
COLUMNS = {
    "guide": "guide",
    "seed": "seed",
    "elbo": "ELBO (nats)",
    "elbo_se": "s.e.",
    "log_z": "log evidence (nats)",
    "log_z_se": "its s.e.",
    "khat": "k-hat",
    "verdict": "verdict",
    "seconds": "seconds",
    "status": "ended",
}
REQUIRED = {
    "seed": "seed",
    "guide": "best flow by ELBO",
    "log_z": "log evidence (nats)",
    "log_z_se": "its s.e.",
    "passed": f"within {WITHIN} of {LOG_EVIDENCE:g}",
}


def one(guide: str, seed: int, draws: int) -> dict[str, Any]:
    """One fit, in the process of a worker."""
    import torch

    import pyro_vi_kit as vi
    from benchmarks.lib.quality import elbo_of
    from pyro_vi_kit.model.modelfile import load_model_file

    torch.set_num_threads(1)
    model = load_model_file(ROOT / "models" / "funnel.py")
    posterior = vi.fit(model, guide=guide, seed=seed, progress=False)
    elbo, elbo_se = elbo_of(posterior, draws)
    log_z, log_z_se = posterior.evidence(draws, seed=_SEED)
    return {
        "elbo": elbo,
        "elbo_se": elbo_se,
        "log_z": log_z,
        "log_z_se": log_z_se,
        "khat": posterior.khat,
        "verdict": str(getattr(posterior.verdict, "level", None)),
        "seconds": posterior.seconds,
        "status": posterior.status.reason,
    }


def requirements(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each seed the flow with the best ELBO, and whether its log evidence is near enough."""
    table = []
    for seed in dict.fromkeys(row["seed"] for row in rows):
        mine = [row for row in rows if row["seed"] == seed and not row.get("error")]
        best = max(mine, key=lambda row: row["elbo"], default=None)
        if best is None:
            table.append({"seed": seed, "guide": "none", "passed": False})
            continue
        line = {name: best[name] for name in REQUIRED if name != "passed"}
        table.append(line | {"passed": abs(best["log_z"] - LOG_EVIDENCE) <= WITHIN})
    return table


def report(rows: Sequence[dict[str, Any]], draws: int) -> str:
    """All of it as Markdown."""
    shown = [row | {"elbo": f"{row['elbo']:.4f}"} for row in rows if not row["error"]]
    parts = [
        "## Funnel",
        "Neal's funnel in 10 dimensions, log evidence 0. ELBO and log evidence by importance weights on "
        f"{draws:,} draws of q, with defaults.",
        markdown(COLUMNS, shown),
        "Log evidence by importance weights from the best flow:",
        markdown(REQUIRED, requirements(rows)),
        *failures(rows, lambda r: f"{r['guide']}, seed {r['seed']}"),
    ]
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    words = options.parser(__doc__, cap=600.0)
    words.add_argument("--guides", type=options.listed, default=None, help=", ".join(FLOWS))
    words.add_argument(
        "--seeds", type=options.integers, default=None, help="0,1,2; with --quick only 0"
    )
    words.add_argument("--draws", type=int, default=100_000, help="draws of q (%(default)s)")
    asked = words.parse_args(argv)
    guides = QUICK if asked.quick else FLOWS
    if asked.guides:
        guides = options.chosen(asked.guides, FLOWS, "guide")
    seeds = asked.seeds or (SEEDS[:1] if asked.quick else SEEDS)
    cells = [{"guide": g, "seed": s, "draws": asked.draws} for s in seeds for g in guides]
    rows = Records(asked.out, NAME, asked.resume).measure_all(
        "benchmarks.funnel:one",
        cells,
        lambda row: f"log evidence {row['log_z']:+.4f} in {row['seconds']:.1f} s",
        cap=asked.cap or 600.0,
    )
    options.publish(asked.out, NAME, report(rows, asked.draws))
    return 0


if __name__ == "__main__":
    sys.exit(main())
