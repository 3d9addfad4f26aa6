"""Data that are never in memory: rows a second, memory that does not grow with N, and accuracy.

    python -m benchmarks.streaming [--rows 100000,1000000] [--columns 50] [--batch 4096]

A Bayesian logistic regression on a memory-mapped file of float32, which is written once into a
temporary folder. Rows a second are of steps with one particle (mean field, Adam, float64, one thread),
ours beside a hand-written torch loop that reads the same file and shuffles it as well; they take turns
in one process, and ratios are of turns next to each other. Then a whole `vi.fit(model, "mean_field",
batch_size=4096)`, its most memory, and how far it is from the optimum of the mean-field ELBO on all
data, found by full-data L-BFGS.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from benchmarks.lib import options
from benchmarks.lib.processes import call
from benchmarks.lib.records import Records
from benchmarks.lib.tables import failures, markdown

NAME = "streaming"
WORKER = "benchmarks.peers.streaming"
ROWS = (100_000, 1_000_000)
QUICK = (20_000, 100_000)
SPEED = {
    "rows": "rows of data",
    "ours": "ours (rows/s)",
    "by_hand": "torch by hand (rows/s)",
    "ratio": "ours / by hand",
}
FIT = {
    "rows": "rows of data",
    "seconds": "vi.fit (s)",
    "epochs": "epochs",
    "peak_mib": "memory (MiB)",
    "mean_error_sd": "mean off by (sd)",
    "sd_error": "sd off by (share)",
    "status": "status",
}


def report(rows: Sequence[dict[str, Any]]) -> str:
    """All of it as Markdown."""
    parts = [
        "## Streaming",
        "Logistic regression on a memory-mapped file, mean field. Steps with one particle beside a "
        "hand-written torch loop on the same file; the aim is a ratio of at least 0.9.",
        markdown(SPEED, [row for row in rows if row["what"] == "steps" and row["error"] is None]),
        "Whole fits: most anonymous memory above imports (pages of the file are the system's cache), "
        "and the largest error over coefficients against the mean-field optimum on all data; the aims "
        "are memory that does not grow with rows, and 0.1 sd.",
        markdown(FIT, [row for row in rows if row["what"] == "fit" and row["error"] is None]),
    ]
    parts += failures(rows, lambda r: f"{r['what']} at {r['rows']:,}")
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    words = options.parser(__doc__, cap=900.0)
    words.add_argument("--rows", type=options.integers, default=None, help="rows of data, N")
    words.add_argument("--columns", type=int, default=50, help="coefficients (%(default)s)")
    words.add_argument("--batch", type=int, default=4096, help="rows of a batch (%(default)s)")
    words.add_argument("--seconds", type=options.positive, default=None, help="of steps (30)")
    asked = words.parse_args(argv)
    cap = asked.cap or (120.0 if asked.quick else 900.0)
    seconds = asked.seconds or (4.0 if asked.quick else 30.0)
    records = Records(asked.out, NAME, asked.resume)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for rows in asked.rows or (QUICK if asked.quick else ROWS):
            shape = {"rows": rows, "columns": asked.columns}
            call(f"{WORKER}:write", {"folder": folder, **shape}, cap=cap)
            for what, more in (("steps", {"seconds": seconds}), ("fit", {})):
                key = {"what": what, **shape, "batch": asked.batch, **more}
                arguments = {k: v for k, v in key.items() if k != "what"} | {"folder": folder}
                row = records.measure(key, f"{WORKER}:{what}", arguments, cap=cap)
                found.append(row)
                options.say(f"{what} at {rows:,} rows: {row['error'] or 'done'}")
    options.publish(asked.out, NAME, report(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
