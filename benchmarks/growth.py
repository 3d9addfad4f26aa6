"""How time and memory grow with particles, dimensions and data, as log-log tables with slopes.

    python -m benchmarks.growth [--axes particles,dims,data] [--seconds 3]

A Bayesian regression with standard-normal coefficients: particles on 1,000 rows of 20 columns,
dimensions on twice as many rows as coefficients, data on 10 columns. For each size: a step of our
stochastic engine and one of a hand-written torch loop (mean field, Adam, the same arithmetic), and a
whole `vi.fit()`. Every cell runs in a process of its own; memory is that process's peak above what it
held with its imports done and its data made. Slopes are of log
time on log size over the upper half of the sizes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.lib import options
from benchmarks.lib.records import Records
from benchmarks.lib.tables import DASH, failures, markdown, number, slope

NAME = "growth"
WORKER = "benchmarks.peers.regression"
SIZES = {
    "particles": (1, 4, 16, 64, 256),
    "dims": (10, 30, 100, 300, 500, 1000),
    "data": (1_000, 10_000, 100_000, 1_000_000),
}
QUICK = {"particles": (1, 16, 256), "dims": (10, 100, 300), "data": (1_000, 10_000, 100_000)}
WORDS = {"particles": "particles", "dims": "dimensions", "data": "rows of data"}
LARGEST_DENSE = 500


def cells(axis: str, size: int) -> list[dict[str, Any]]:
    """What is measured at one size: ``kind`` (ours, by_hand or fit) with its arguments."""
    shape: dict[str, Any] = {"rows": 1000, "columns": 20, "particles": 10, "family": "logistic"}
    if axis == "particles":
        shape["particles"] = size
        return [{"kind": kind, "guide": "mean_field", **shape} for kind in ("ours", "by_hand")]
    if axis == "dims":
        shape |= {"rows": 2 * size, "columns": size, "family": "linear"}
        found = [
            {"kind": kind, "guide": "mean_field", **shape} for kind in ("ours", "by_hand", "fit")
        ]
        if size <= LARGEST_DENSE:
            found.append({"kind": "fit", "guide": "full_rank", **shape})
        return found
    shape |= {"rows": size, "columns": 10}
    found = [{"kind": kind, "guide": "mean_field", **shape} for kind in ("ours", "by_hand")]
    for family in ("logistic", "linear"):
        found.append({"kind": "fit", "guide": "full_rank", **shape, "family": family})
    return found


def label(cell: dict[str, Any]) -> str:
    """The column of a cell."""
    if cell["kind"] == "fit":
        return f"vi.fit {cell['guide']}, {cell['family']} (ms)"
    return {"ours": "our step (ms)", "by_hand": "torch by hand (ms)"}[cell["kind"]]


def table(axis: str, rows: Sequence[dict[str, Any]], key: str) -> str:
    """Sizes down, what was measured across, and slopes below.

    Args:
        axis: particles, dims or data.
        rows: The rows of this axis.
        key: ``ms`` or ``peak_mib``.
    """
    series = _series(rows, key)
    names = [name if key == "ms" else name.replace(" (ms)", " (MiB)") for name in series]
    sizes = sorted({row["size"] for row in rows})
    lines: list[dict[str, Any]] = [
        {WORDS[axis]: f"{size:,}"}
        | {name: values.get(size) for name, values in zip(names, series.values(), strict=True)}
        for size in sizes
    ]
    if key == "ms":
        slopes: dict[str, Any] = {WORDS[axis]: "slope"}
        for name, values in series.items():
            upper = sorted(values)[-max(2, len(values) // 2) :]
            known = len(upper) > 1
            slopes[name] = f"{slope(upper, [values[s] for s in upper]):.2f}" if known else DASH
        lines.append(slopes)
    return markdown([WORDS[axis], *names], lines)


def _series(rows: Sequence[dict[str, Any]], key: str) -> dict[str, dict[int, float]]:
    """What was measured, by column and size."""
    series: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["error"] is None:
            series.setdefault(label(row), {})[row["size"]] = row[key]
    return series


def plot(axis: str, rows: Sequence[dict[str, Any]], path: Path) -> bool:
    """A log-log picture of one axis; False where matplotlib is not installed."""
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for ax, key, what in zip(axes, ("ms", "peak_mib"), ("ms", "MiB at the peak"), strict=True):
        for name, values in _series(rows, key).items():
            sizes = sorted(values)
            heights = [max(values[size], 1e-3) for size in sizes]
            ax.loglog(sizes, heights, marker="o", label=name.removesuffix(" (ms)"))
        ax.set(xlabel=WORDS[axis], ylabel=what)
        ax.grid(alpha=0.3, which="both")
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def report(rows: Sequence[dict[str, Any]]) -> str:
    """All of it as Markdown."""
    parts = [
        "## Growth",
        "Milliseconds of a stochastic step (mean field; 10 particles where not said otherwise), of the "
        "same step written by hand, and of whole fits; below them the most memory (MiB) above imports "
        "and data. Slopes are over the upper half of the sizes.",
    ]
    for axis in dict.fromkeys(row["axis"] for row in rows):
        mine = [row for row in rows if row["axis"] == axis]
        parts += [f"### {WORDS[axis]}", table(axis, mine, "ms"), table(axis, mine, "peak_mib")]
        parts += failures(mine, lambda r: f"{label(r)} at {r['size']:,}")
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    words = options.parser(__doc__, cap=600.0)
    words.add_argument("--axes", type=options.listed, default=list(SIZES), help=", ".join(SIZES))
    words.add_argument("--seconds", type=options.positive, default=None, help="of steps a cell (3)")
    asked = words.parse_args(argv)
    seconds = asked.seconds or (0.7 if asked.quick else 3.0)
    cap = asked.cap or (60.0 if asked.quick else 600.0)
    records = Records(asked.out, NAME, asked.resume)
    rows = []
    for axis in options.chosen(asked.axes, list(SIZES), "axis"):
        for size in (QUICK if asked.quick else SIZES)[axis]:
            for cell in cells(axis, size):
                key = {"axis": axis, "size": size, "seconds": seconds, **cell}
                arguments = cell | {"seconds": seconds}
                row = records.measure(key, f"{WORKER}:run", arguments, cap=cap)
                rows.append(row)
                found = row["error"] or f"{number(row['ms'])}, {number(row['peak_mib'])} MiB"
                options.say(f"{WORDS[axis]} {size:,}: {label(row)} {found}")
        picture = asked.out / f"{NAME}_{axis}.png"
        if plot(axis, [row for row in rows if row["axis"] == axis], picture):
            options.say(f"written: {picture}")
    options.publish(asked.out, NAME, report(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
