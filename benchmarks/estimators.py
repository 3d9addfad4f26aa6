"""Gradient estimators: signal-to-noise against the number of particles, and noise at the optimum.

    python -m benchmarks.estimators [--dims 10] [--replicates 4096]

The model of Rainforth et al. (2018): z ~ N(0, I), x | z ~ N(z, I), and a guide N(m, 2/3 I) whose
mean is off the posterior's x / 2. Every replicate is a row of one plate with guide parameters of
its own, so that one backward pass gives all replicates' gradients. The signal-to-noise ratio is the
root of the squared mean gradient over its variance, both summed over the means' coordinates; the
mean is the same for all estimators and taken from the doubly reparameterised one, whose noise is
least. Of the importance-weighted bound the pathwise gradient's ratio falls as K^(-1/2), which
DReG's does not: it grows as K^(1/2) (Tucker et al. 2019).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.lib import options
from benchmarks.lib.processes import call
from benchmarks.lib.records import Records
from benchmarks.lib.tables import markdown, slope

NAME = "estimators"
PAIRS = (
    ("iwae", "pathwise"),
    ("iwae", "dreg"),
    ("iwae", "score"),
    ("elbo", "pathwise"),
    ("elbo", "dreg"),
    ("elbo", "score"),
    ("forward_kl", "dreg"),
    ("forward_kl", "score"),
)
PARTICLES = (2, 8, 32, 128, 512, 2048)
QUICK = (2, 8, 32, 128)
# VIMCO holds a table of K by K for each replicate.
LARGEST_SCORE = 128
# Slopes are of what comes behind the first: they are asymptotic.
REQUIRED = {("iwae", "pathwise"): -0.5, ("iwae", "dreg"): 0.5}
WITHIN = 0.15
# Numbers that one tensor may hold.
_NUMBERS = 4_000_000


def one(objective: str, estimator: str, cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Signal and noise of one pair in each of these cells, in the process of a worker."""
    import torch

    torch.set_num_threads(1)
    return [cell | _measured(objective, estimator, **cell) for cell in cells]


def _measured(
    objective: str, estimator: str, particles: int, dims: int, replicates: int, offset: float
) -> dict[str, Any]:
    import torch

    torch.manual_seed(particles)
    width = particles * (particles if estimator == "score" else dims)
    rows = max(8, min(replicates, _NUMBERS // width))
    chunks = -(-replicates // rows)

    def all_of(name: str) -> Any:
        parts = [_gradients(objective, name, particles, dims, rows, offset) for _ in range(chunks)]
        return torch.cat(parts)

    found = all_of(estimator)
    # The mean is the same for all estimators, and best known from the one of the least noise.
    clear = found if estimator == "dreg" else all_of("dreg")
    squares = clear.mean(0).square() - clear.var(0) / len(clear)
    signal, noise = float(squares.sum().clamp_min(0.0)), float(found.var(0).sum())
    return {
        "signal": math.sqrt(signal),
        "noise": math.sqrt(noise),
        "snr": math.sqrt(signal / max(noise, 1e-300)),
    }


def _gradients(
    objective: str, estimator: str, particles: int, dims: int, rows: int, offset: float
) -> Any:
    """Gradients of the guide's means, one for each replicate, `[rows, dims]`."""
    import pyro
    import pyro.distributions as dist
    import torch

    import pyro_vi_kit as vi
    from pyro_vi_kit import guides, objectives
    from pyro_vi_kit.model.log_density import Density
    from pyro_vi_kit.objectives import surrogate

    x = torch.linspace(-1.0, 1.0, dims, dtype=torch.float64)

    def model(y: Any) -> None:
        with pyro.plate("replicate", len(y)) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(dims), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y[index])

    density = Density(vi.Model(model, x.expand(rows, dims).clone()))
    guide = guides.per_datum(guides.MeanField(), density, list(density.structure.plates.values()))
    table = guide.table(guide.blocks[0])
    if table is None:
        raise AssertionError("a guide per datum has a table")
    # At offset zero the guide is the posterior itself.
    variance = 0.5 if offset == 0.0 else 2.0 / 3.0
    with torch.no_grad():
        table.rows[:, :dims] = 0.5 * x + offset
        table.rows[:, dims:] = 0.5 * math.log(variance)
    goal = objectives.make(objective, particles=particles)
    _, loss = surrogate(guide, goal, particles, share=goal.multi_sample, estimator=estimator)
    (gradient,) = torch.autograd.grad(-loss, [table.rows])
    return gradient[:, :dims]


def cells(
    estimator: str, quick: bool, dims: int, replicates: int, offset: float
) -> list[dict[str, Any]]:
    """What is measured of a pair: each K away from the optimum, and few of them there."""
    found = []
    for particles in QUICK if quick else PARTICLES:
        if estimator == "score" and particles > LARGEST_SCORE:
            continue
        cell = {"particles": particles, "dims": dims}
        found.append(cell | {"replicates": replicates, "offset": offset})
        if particles <= PARTICLES[1]:
            found.append(cell | {"replicates": 1024, "offset": 0.0})
    return found


def slopes(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The power of K that each pair's ratio goes with, and whether it is the one that is known."""
    table = []
    for pair in PAIRS:
        mine = [
            row
            for row in rows
            if (row["objective"], row["estimator"]) == pair and row["offset"] > 0
        ]
        mine = [row for row in mine if row["particles"] > PARTICLES[0] and row.get("snr")]
        if len(mine) < 2:
            continue
        power = slope([row["particles"] for row in mine], [row["snr"] for row in mine])
        known = REQUIRED.get(pair)
        table.append(
            {
                "objective": pair[0],
                "estimator": pair[1],
                "power of K": power,
                "known": known,
                "passed": None if known is None else abs(power - known) <= WITHIN,
            }
        )
    return table


def report(rows: Sequence[dict[str, Any]], dims: int) -> str:
    """All of it as Markdown."""
    sizes = sorted({row["particles"] for row in rows})
    ratios, noises = [], []
    for objective, estimator in PAIRS:
        for target, off in ((ratios, True), (noises, False)):
            mine = {
                row["particles"]: row
                for row in rows
                if (row["objective"], row["estimator"]) == (objective, estimator)
                and (row["offset"] > 0) == off
                and not row["error"]
            }
            if mine:
                key = "snr" if off else "noise"
                line = {f"K = {k:,}": mine[k][key] for k in sizes if k in mine}
                target.append({"objective": objective, "estimator": estimator, **line})
    heads = ["objective", "estimator", *(f"K = {k:,}" for k in sizes)]
    few = ["objective", "estimator", *(h for h in heads[2:] if any(h in line for line in noises))]
    return "\n\n".join(
        [
            "## Gradient estimators",
            f"Signal-to-noise ratio of the gradient in {dims} means, away from the optimum:",
            markdown(heads, ratios),
            "The power of K that it goes with, behind the first K; with what is known (Rainforth et al. "
            f"2018; Tucker et al. 2019), to be met within {WITHIN}:",
            markdown(["objective", "estimator", "power of K", "known", "passed"], slopes(rows)),
            "Noise (standard deviation of the whole gradient) where the guide is the posterior:",
            markdown(few, noises),
        ]
    )


def plot(rows: Sequence[dict[str, Any]], path: Path) -> bool:
    """The known figure; False where matplotlib is not installed."""
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, ax = plt.subplots(figsize=(6.5, 4.5), layout="constrained")
    styles = {"pathwise": "o-", "dreg": "s-", "score": "^:"}
    colours = {"iwae": "C0", "elbo": "C1", "forward_kl": "C2"}
    for objective, estimator in PAIRS:
        mine = [
            row
            for row in rows
            if (row["objective"], row["estimator"]) == (objective, estimator)
            and row["offset"] > 0
            and row.get("snr")
        ]
        x, y = [row["particles"] for row in mine], [row["snr"] for row in mine]
        ax.loglog(
            x, y, styles[estimator], color=colours[objective], label=f"{objective}, {estimator}"
        )
    ax.set(xlabel="particles K", ylabel="signal-to-noise ratio of the gradient")
    ax.grid(alpha=0.3, which="both")
    ax.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    words = options.parser(__doc__, cap=300.0)
    words.add_argument("--dims", type=int, default=10, help="(%(default)s)")
    words.add_argument("--replicates", type=int, default=None, help="(4096; with --quick 512)")
    words.add_argument("--offset", type=options.positive, default=0.1, help="of each mean")
    asked = words.parse_args(argv)
    replicates = asked.replicates or (512 if asked.quick else 4096)
    records = Records(asked.out, NAME, asked.resume)
    rows = []
    for objective, estimator in PAIRS:
        mine = cells(estimator, asked.quick, asked.dims, replicates, asked.offset)
        pair = {"objective": objective, "estimator": estimator}
        known = [records.find(pair | cell) for cell in mine]
        missing = [cell for cell, row in zip(mine, known, strict=True) if row is None]
        rows += [row for row in known if row is not None]
        if not missing:
            continue
        done = call("benchmarks.estimators:one", pair | {"cells": missing}, cap=asked.cap or 300.0)
        for row in done.value or missing:
            rows.append(records.add(pair | row | {"error": done.error}))
            key = "snr" if row["offset"] else "noise"
            found = done.error or f"{key} {row[key]:.3g}"
            options.say(f"{objective}, {estimator}, K = {row['particles']}: {found}")
    picture = asked.out / f"{NAME}.png"
    if plot(rows, picture):
        options.say(f"written: {picture}")
    options.publish(asked.out, NAME, report(rows, asked.dims))
    return 0


if __name__ == "__main__":
    sys.exit(main())
