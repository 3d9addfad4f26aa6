"""Minibatches with a latent for every datum: the same posterior, steps that do not grow, true bounds.

    python -m benchmarks.minibatches [--latents 500,5000,50000] [--tol 0.002] [--seeds 0,1,2]

A mean-field fit of a hierarchical regression (85 groups, 900 rows) in minibatches of 17 groups beside
the fit of the full data; a captured step, and the memory, of guides that store two numbers for each of N
latents; and the importance-weighted bound on minibatches of a model whose evidence is known, which stock
`RenyiELBO` exceeds, since it scales inside the logsumexp.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.lib import options
from benchmarks.lib.records import Records
from benchmarks.lib.tables import markdown

NAME = "minibatches"
WORKER = "benchmarks.peers.rows"
LATENTS = (500, 5_000, 50_000, 500_000)
AGREEMENT = {
    "seed": "seed",
    "steps": "steps",
    "seconds": "minibatches (s)",
    "full_seconds": "full data (s)",
    "mean_error_sd": "largest mean error (sd)",
    "sd_error": "largest sd error (share)",
    "status": "status",
}
STEPS = {
    "latents": "latents",
    "microseconds": "a step (µs)",
    "engine": "step is",
    "bytes_a_latent": "stored for a latent (bytes)",
    "grown_mib": "memory above the model (MiB)",
}
BOUNDS = {
    "evidence": "log evidence (nats)",
    "ours": "ours (nats)",
    "ours_se": "s.e.",
    "stock": "stock RenyiELBO (nats)",
    "stock_se": "s.e.",
}


def report(rows: Sequence[dict[str, Any]]) -> str:
    """All of it as Markdown."""

    def of(what: str) -> list[dict[str, Any]]:
        return [row for row in rows if row["what"] == what and row["error"] is None]

    parts = [
        "## Minibatches and a latent for every datum",
        "Mean field on a hierarchical regression, 17 of 85 groups a step, beside the fit of the full "
        "data (aim: within 0.02 sd).",
        markdown(AGREEMENT, of("agreement")),
        "A captured step on 100 of N rows. The two numbers of each lie in a table, with Adam's moments "
        "and an average (aim: no growth with N).",
        markdown(STEPS, of("steps")),
        "The importance-weighted bound, N = 20, B = 5, K = 64 draws of the prior (aim: not above the "
        "evidence).",
        markdown(BOUNDS, of("bounds")),
    ]
    failed = [f"- {row['what']}: {row['error']}" for row in rows if row["error"]]
    return "\n\n".join([*parts, *failed])


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    words = options.parser(__doc__, cap=300.0)
    words.add_argument(
        "--latents", type=options.integers, default=None, help="numbers of latents, N"
    )
    words.add_argument("--batch", type=int, default=100, help="rows of a step (%(default)s)")
    words.add_argument("--tol", type=options.positive, default=0.002, help="nats (%(default)s)")
    words.add_argument("--seeds", type=options.integers, default=None, help="one fit each (0,1,2)")
    asked = words.parse_args(argv)
    cap = asked.cap or (120.0 if asked.quick else 300.0)
    records = Records(asked.out, NAME, asked.resume)
    cells: list[dict[str, Any]] = [
        {
            "what": "agreement",
            "groups": 85,
            "rows": 900,
            "batch": 17,
            "seed": seed,
            "tol": asked.tol,
        }
        for seed in asked.seeds or ([0] if asked.quick else [0, 1, 2])
    ]
    seconds = 1.0 if asked.quick else 4.0
    cells += [
        {"what": "steps", "latents": n, "batch": asked.batch, "seconds": seconds}
        for n in asked.latents or (LATENTS[:3] if asked.quick else LATENTS)
    ]
    cells.append({"what": "bounds", "rows": 20, "batch": 5, "particles": 64, "repeats": 400})
    found = []
    for key in cells:
        arguments = {name: value for name, value in key.items() if name != "what"}
        row = records.measure(key, f"{WORKER}:{key['what']}", arguments, cap=cap)
        found.append(row)
        options.say(f"{key['what']}: {row['error'] or 'done'}")
    options.publish(asked.out, NAME, report(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
