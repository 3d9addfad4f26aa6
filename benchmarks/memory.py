"""Whether many fits in one process take more and more memory.

    python -m benchmarks.memory                # 200 fits, some minutes
    python -m benchmarks.memory --fits 60

Each fit is of a model of its own, on data of another length than the one before, by one guide after
another, with its verdict, an export and now and then NUTS: all that a fit builds (recordings, replays,
compiled code) has to go with it. What a process takes once (imports, caches of torch's) it has taken
after the first fits, so that these are left out: from then on memory may grow by 5 % at the most.
"""

from __future__ import annotations

import gc
import os
import resource
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.lib import options, processes
from benchmarks.lib.tables import markdown

GUIDES = ("full_rank", "affine_coupling", "mean_field", "delta", "laplace")
MOST_GROWTH = 0.05
# Fits that are left out, of each kind five.
WARM_UP = 30
_NUTS_EVERY = 6


def resident_mib() -> float:
    """What the process holds now; on systems that do not say it, the most that it ever held."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        pages = int(statm.read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def model_of(rows: int, seed: int) -> Any:
    """A regression of its own."""
    import pyro
    import pyro.distributions as dist
    import torch

    import pyro_vi_kit as vi

    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 2, generator=generator)
    y = x @ torch.tensor([1.0, -0.5]) + 0.5 * torch.randn(rows, generator=generator)

    def line(x: torch.Tensor, y: torch.Tensor) -> None:
        slope = pyro.sample("slope", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(x @ slope, scale), obs=y)

    return vi.Model(line, x, y)


def fit_once(number: int) -> None:
    """One fit with all that follows it."""
    import pyro_vi_kit as vi

    model = model_of(40 + number % 7, number)
    if number % _NUTS_EVERY == _NUTS_EVERY - 1:
        vi.nuts(model, chains=1, draws=1500, tune=100, seed=number, progress=False)
        return
    guide = GUIDES[number % len(GUIDES)]
    steps = 60 if guide == "affine_coupling" else None
    posterior = vi.fit(model, guide=guide, seed=number, progress=False, steps=steps)
    if guide != "delta":
        _ = posterior.verdict
    with tempfile.TemporaryDirectory() as folder:
        posterior.save(Path(folder) / "saved.nc")


def resident(fits: int, every: int) -> list[dict[str, Any]]:
    """Memory after every so many fits, in this process."""
    warnings.simplefilter("ignore")
    rows = []
    for number in range(fits):
        fit_once(number)
        if (number + 1) % every == 0 or number + 1 == WARM_UP:
            gc.collect()
            rows.append({"fits": number + 1, "MiB": resident_mib()})
    return rows


def growth(rows: Sequence[dict[str, Any]]) -> float:
    """By which part memory grew from the end of the warm-up to the last fit."""
    first = next(row["MiB"] for row in rows if row["fits"] >= WARM_UP)
    return rows[-1]["MiB"] / first - 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """Measure in a fresh process, and print the table."""
    words = options.parser(__doc__)
    words.add_argument("--fits", type=int, default=None, help=f"200; at least {WARM_UP + 1}")
    asked = words.parse_args(argv)
    fits = max(asked.fits or (60 if asked.quick else 200), WARM_UP + 1)
    target, arguments = "benchmarks.memory:resident", {"fits": fits, "every": max(1, fits // 10)}
    result = processes.call(target, arguments, cap=60.0 * fits)
    if result.error is not None:
        sys.exit(result.error)
    grown = growth(result.value)
    print(markdown(["fits", "MiB"], result.value))
    print(f"\n{grown:+.1%} from fit {WARM_UP} on, where at most {MOST_GROWTH:+.0%} is allowed")
    return int(grown > MOST_GROWTH)


if __name__ == "__main__":
    sys.exit(main())
