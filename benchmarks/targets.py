"""Four modes by a small annealed flow, and what it makes of straight lines, drawn.

    python -m benchmarks.targets [--seeds 0,1,2,3,4]

The four modes of models/gaussian_mixture_target.py are fitted by four affine coupling layers, each a
network of three linear layers with 8 hidden units between them, with objective ``annealed`` and
beside it with the plain ELBO. The log evidence is 0, so the KL is minus the ELBO. Each draw counts for
the mode that is nearest to it. Steps and CPU seconds are those of one process, start included;
compiled code takes over where it can, unless PYRO_VI_KIT_COMPILE=off.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lib import options
from benchmarks.lib.processes import ROOT
from benchmarks.lib.records import Records
from benchmarks.lib.tables import failures, markdown

NAME = "targets"
DISTANCES = (2.0, 3.0)
OBJECTIVES = ("annealed", "elbo")
LAYERS, HIDDEN = 4, (8, 8)
KL, WEIGHT = 0.10, 0.05
# Standard errors at this many draws: 0.001 of a weight of 1/4, 0.002 nats of a KL whose log weights have
# sd 0.6.
DRAWS = 100_000
LINES, REACH, POINTS = 13, 3.0, 400
COLUMNS = {
    "s": "s",
    "objective": "objective",
    "seed": "seed",
    "kl": "KL (nats)",
    "kl_se": "s.e.",
    "weights": "weights",
    "steps": "steps",
    "cpu": "CPU seconds",
    "status": "ended",
    "ok": "KL ≤ 0.10, weights 0.25 ± 0.05",
}


def one(s: float, objective: str, seed: int) -> dict[str, Any]:
    """One fit of the four modes, in the process of a worker."""
    import torch

    import pyro_vi_kit as vi
    from pyro_vi_kit.model.modelfile import load_model_file

    torch.set_num_threads(1)
    fn = load_model_file(ROOT / "models" / "gaussian_mixture_target.py").fn
    guide = vi.guides.AffineCoupling(layers=LAYERS, hidden=HIDDEN)
    started = time.process_time()
    posterior = vi.fit(vi.Model(fn, s), guide, objective, seed=seed, progress=False)
    cpu = time.process_time() - started
    log_w = posterior.log_weights(DRAWS, seed=1)
    x = posterior.sample(DRAWS, seed=2)["x"]
    # The nearest mode of four at the corners of a square is the one in the same quadrant.
    right, up = x[:, 0] > 0, x[:, 1] > 0
    shares = [(a & b).mean() for a in (right, ~right) for b in (up, ~up)]
    trained = posterior.approximation.guide.families["latent"]  # type: ignore[attr-defined]
    return {
        "kl": float(-log_w.mean()),
        "kl_se": float(log_w.std() / DRAWS**0.5),
        "shares": [float(share) for share in shares],
        "steps": len(posterior.losses),
        "cpu": cpu,
        "status": posterior.status.reason,
        "lines": mapped_lines(trained) if objective == "annealed" else None,
    }


def mapped_lines(flow: Any) -> list[list[list[list[float]]]]:
    """A grid of straight lines and what a flow makes of it: pairs of polylines `[n, 2]`."""
    import torch

    along = torch.linspace(-REACH, REACH, POINTS, dtype=torch.float64)
    found = []
    for axis in (0, 1):
        for at in torch.linspace(-REACH, REACH, LINES, dtype=torch.float64):
            line = torch.empty(POINTS, 2, dtype=torch.float64)
            line[:, axis], line[:, 1 - axis] = at, along
            with torch.no_grad():
                y = line
                for transform in flow().transforms:
                    y = transform(y)
            found.append([line.round(decimals=3).tolist(), y.round(decimals=3).tolist()])
    return found


def within(row: Mapping[str, Any]) -> bool:
    """Whether a fit is as good as it must be."""
    even = all(abs(share - 0.25) <= WEIGHT for share in row["shares"])
    return row["kl"] <= KL and even


def requirements(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What is required, and whether it was met."""
    table = []
    for s in DISTANCES:
        fits = [r for r in rows if r["s"] == s and r["objective"] == "annealed"]
        if fits:
            met = sum(not r["error"] and within(r) for r in fits)
            table.append(
                {
                    "required": f"s = {s:g}, annealed: KL at most {KL:.2f}, weights 0.25 ± {WEIGHT}",
                    "shown": f"{met} of {len(fits)} seeds",
                    "passed": met == len(fits),
                }
            )
    return table


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    """All of it as Markdown."""
    fine = [dict(row) | {"ok": within(row)} for row in rows if not row["error"]]
    fine = [r | {"weights": _in_words(r["shares"])} for r in fine]
    return "\n\n".join(
        [
            "## Four modes, one small flow",
            f"Four modes at (±s, ±s), sd 0.7: `AffineCoupling(layers={LAYERS}, hidden={HIDDEN})` on "
            f"{DRAWS:,} draws.",
            *([markdown(COLUMNS, fine)] if fine else []),
            markdown(["required", "shown", "passed"], requirements(rows)),
            *failures(rows, lambda r: f"{r['objective']}, seed {r['seed']}"),
        ]
    )


def _in_words(shares: Any) -> str:
    """Weights of the modes, in one cell of a table."""
    return " ".join(f"{share:.2f}" for share in shares)


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """What the first annealed flow of each distance makes of lines; False without matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    drawn = {r["s"]: r for r in reversed(rows) if not r["error"] and r.get("lines")}
    if not drawn:
        return False
    figure, axes = plt.subplots(
        1, 1 + len(drawn), figsize=(5 * (1 + len(drawn)), 5.6), layout="constrained"
    )
    first = next(iter(drawn.values()))
    _draw_lines(axes[0], [base for base, _ in first["lines"]], "straight lines in the noise")
    for ax, (s, row) in zip(axes[1:], sorted(drawn.items()), strict=True):
        _draw_lines(ax, [image for _, image in row["lines"]], f"through the flow, s = {s:g}")
        for corner in ((s, s), (s, -s), (-s, s), (-s, -s)):
            ax.add_patch(plt.Circle(corner, 2 * 0.7, fill=False, color="black", linestyle=":"))
        ax.set(xlim=(-s - 3, s + 3), ylim=(-s - 3, s + 3))
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def _draw_lines(ax: Any, lines: Sequence[Any], title: str) -> None:
    """Lines along the second axis in warm colours, along the first in cold ones, by where they lie."""
    import numpy as np
    from matplotlib import colormaps

    for i, line in enumerate(lines):
        shade = 0.3 + 0.6 * (i % LINES) / (LINES - 1)
        colour = colormaps["autumn" if i < LINES else "winter"](shade)
        ax.plot(*np.asarray(line).T, color=colour, linewidth=0.9)
    ax.set(title=title, aspect="equal")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    words = options.parser(__doc__, cap=600.0)
    words.add_argument("--seeds", type=options.integers, default=None, help="0 to 4 by default")
    asked = words.parse_args(argv)
    rows = Records(asked.out, NAME, asked.resume).measure_all(
        "benchmarks.targets:one",
        cells(asked.seeds or list(range(5)), quick=asked.quick),
        lambda row: f"KL {row['kl']:.3f} nats in {row['cpu']:.0f} CPU seconds",
        cap=asked.cap or 600.0,
    )
    picture = asked.out / f"{NAME}.png"
    if plot(rows, picture):
        options.say(f"written: {picture}")
    options.publish(asked.out, NAME, report(rows))
    return 0


def cells(seeds: Sequence[int], *, quick: bool = False) -> list[dict[str, Any]]:
    """What is fitted: by the plain ELBO once for each distance."""
    seeds = seeds[:1] if quick else seeds
    return [
        {"s": s, "objective": objective, "seed": seed}
        for s in (DISTANCES[:1] if quick else DISTANCES)
        for objective in OBJECTIVES
        for seed in (seeds if objective == "annealed" else seeds[:1])
    ]


if __name__ == "__main__":
    sys.exit(main())
