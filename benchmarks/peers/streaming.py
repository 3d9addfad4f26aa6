"""Logistic regression on a file that is never read as a whole: our steps, our fits, a torch loop."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pyro_vi_kit import guides, objectives
from pyro_vi_kit.core.runtime import RandomStream
from pyro_vi_kit.fitting import fit as fitting
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.model.model import Model
from pyro_vi_kit.optimize import engines

RATE = 0.005
_PIECE = 50_000
_TURN = 20
_STATUS = Path("/proc/self/status")


class Mapped(Dataset[Any]):
    """Rows ``x, y`` of two memory-mapped files, one by one or by an array of row numbers."""

    def __init__(self, folder: str | Path, rows: int, columns: int) -> None:
        x, y = _files(Path(folder), rows)
        self.x = np.memmap(x, dtype=np.float32, mode="r", shape=(rows, columns))
        self.y = np.memmap(y, dtype=np.float32, mode="r", shape=(rows,))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Any) -> tuple[Any, Any]:
        return self.x[index], self.y[index]


def write(folder: str, rows: int, columns: int) -> None:
    """Make the data, piece by piece, where they are not there yet."""
    files = _files(Path(folder), rows)
    if all(file.exists() for file in files):
        return
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(columns, generator=generator) / columns**0.5
    with files[0].open("wb") as xs, files[1].open("wb") as ys:
        for start in range(0, rows, _PIECE):
            x = torch.randn(min(_PIECE, rows - start), columns, generator=generator)
            y = torch.bernoulli((x @ weights).sigmoid(), generator=generator)
            xs.write(x.numpy().tobytes())
            ys.write(y.numpy().tobytes())


def logistic(x: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(x.new_zeros(x.shape[-1]), 1.0).to_event(1))
    with pyro.plate("row", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ beta), obs=y)


def steps(folder: str, rows: int, columns: int, batch: int, seconds: float) -> dict[str, float]:
    """Rows a second of steps with one particle, mean field, Adam, the contestants taking turns.

    Args:
        folder: Where the data are.
        rows: N.
        columns: D.
        batch: B.
        seconds: How long to make steps, all contestants together.

    Returns:
        Rows a second, ``ours`` and ``by_hand``, the median over turns; and ``ratio``, the median of the
        ratios of turns next to each other.
    """
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    data = Mapped(folder, rows, columns)
    advance = {
        "ours": _ours(data, batch),
        "by_hand": _by_hand(data, batch),
    }
    turns: dict[str, list[float]] = {name: [] for name in advance}
    for step in advance.values():
        step(_TURN)
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or len(turns["ours"]) < 5:
        for name, step in advance.items():
            before = time.perf_counter()
            step(_TURN)
            turns[name].append(_TURN * batch / (time.perf_counter() - before))
    found = {name: median(values) for name, values in turns.items()}
    pairs = zip(turns["ours"], turns["by_hand"], strict=True)
    return found | {"ratio": median(a / b for a, b in pairs)}


def fit(folder: str, rows: int, columns: int, batch: int) -> dict[str, Any]:
    """A whole fit: its seconds, its memory, and how far it is from the optimum on all data."""
    torch.set_num_threads(1)
    _warm_up()
    data = Mapped(folder, rows, columns)
    with _peak() as peak:
        started = time.perf_counter()
        posterior = fitting.fit(
            Model(logistic, data), "mean_field", batch_size=batch, seed=0, progress=False
        )
        seconds = time.perf_counter() - started
        family: Any = posterior.approximation.guide.families["latent"]  # type: ignore[attr-defined]
        q = family()
    loc, sd = optimum(data, q.mean.detach(), q.stddev.detach())
    return {
        "seconds": seconds,
        "epochs": len(posterior.losses) * batch / rows,
        "peak_mib": peak["mib"],
        "mean_error_sd": float(((q.mean.detach() - loc) / sd).abs().max()),
        "sd_error": float((q.stddev.detach() / sd - 1).abs().max()),
        "status": posterior.status.reason,
    }


def optimum(data: Mapped, loc: Tensor, sd: Tensor, draws: int = 64) -> tuple[Tensor, Tensor]:
    """The best mean-field Gaussian on all data, by L-BFGS on fixed antithetic draws: means and sds.

    In units of a Gaussian near it, which decides how fast it is found and not what is found.
    """
    generator = torch.Generator().manual_seed(1)
    half = torch.randn(draws // 2, len(loc), generator=generator, dtype=torch.float64)
    noise = torch.cat([half, -half])
    noise = noise / noise.square().mean(0).sqrt()
    parameters = torch.zeros(2, len(loc), dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS(
        [parameters],
        max_iter=50,
        tolerance_grad=1e-3,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        search.zero_grad()
        total = 0.0
        for start in range(0, len(data), _PIECE):
            x, y = (_tensor(part) for part in data[slice(start, start + _PIECE)])
            beta = loc + sd * parameters[0] + sd * parameters[1].exp() * noise
            mean = beta @ x.T
            part = (torch.nn.functional.softplus(mean) - y * mean).sum() / draws
            part.backward()
            total += float(part.detach())
        beta = loc + sd * parameters[0] + sd * parameters[1].exp() * noise
        rest = 0.5 * beta.square().sum() / draws - parameters[1].sum()
        rest.backward()
        return rest.detach() + total

    search.step(loss)
    with torch.no_grad():
        return loc + sd * parameters[0], sd * parameters[1].exp()


def _ours(data: Mapped, batch: int) -> Callable[[int], object]:
    density = Density(Model(logistic, data))
    with RandomStream(0):
        trained = guides.specify("mean_field").build(density)
    batches = engines.StreamedBatches(density, batch, 0)
    engine = engines.CapturedEngine(
        trained, objectives.Elbo(particles=1), seed=0, batches=batches, estimator="dreg"
    )
    return lambda steps: engine.run(steps, RATE)


def _by_hand(data: Mapped, batch: int) -> Callable[[int], object]:
    columns = data.x.shape[1]
    loc = torch.zeros(columns, requires_grad=True)
    log_scale = torch.full((columns,), math.log(0.1), requires_grad=True)
    optimizer = torch.optim.Adam([loc, log_scale], lr=RATE, fused=True)
    scale = len(data) / batch
    generator = np.random.default_rng(0)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            order = generator.permutation(len(data))
            for start in range(0, len(data) - batch + 1, batch):
                x, y = data[order[start : start + batch]]
                yield _tensor(x), _tensor(y)

    source = batches()

    def advance(steps: int) -> None:
        for _ in range(steps):
            x, y = next(source)
            noise = torch.randn(columns)
            beta = loc + log_scale.exp() * noise
            mean = x @ beta
            log_p = scale * (y * mean - torch.nn.functional.softplus(mean)).sum()
            log_p = log_p - 0.5 * (beta**2).sum()
            log_q = (-0.5 * noise**2 - log_scale).sum()
            optimizer.zero_grad()
            (log_q - log_p).backward()
            optimizer.step()

    return advance


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float64))


def _files(folder: Path, rows: int) -> tuple[Path, Path]:
    return folder / f"x_{rows}.f32", folder / f"y_{rows}.f32"


def _warm_up() -> None:
    """What is done once in a process is no memory of this size."""
    x = torch.randn(4000, 3)
    data = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).float())
    fitting.fit(Model(logistic, data), "mean_field", batch_size=1000, seed=0, progress=False)


@contextlib.contextmanager
def _peak() -> Iterator[dict[str, float]]:
    """The most memory of its own that the process has had inside, above what it had before, MiB.

    Pages of the mapped file are not counted: they are the system's cache, and make way for others.
    """
    found, done, before = {"mib": math.nan}, threading.Event(), _own_memory()
    most = [before]

    def watch() -> None:
        while not done.wait(0.005):
            most[0] = max(most[0], _own_memory())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
        found["mib"] = most[0] - before


def _own_memory() -> float:
    """Anonymous resident memory, MiB; NaN where the system does not say it."""
    if not _STATUS.exists():
        return math.nan
    lines = (line for line in _STATUS.read_text().splitlines() if line.startswith("RssAnon"))
    return int(next(lines).split()[1]) / 1024
