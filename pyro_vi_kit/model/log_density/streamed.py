"""The data plate of a streamed model: the one that is as long as the batch, found by running it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vi_kit.core.errors import ModelError
from pyro_vi_kit.core.runtime import validation
from pyro_vi_kit.model.data import Stream
from pyro_vi_kit.model.log_density.batching import agree
from pyro_vi_kit.model.log_density.handlers import Replay
from pyro_vi_kit.model.log_density.raised import Problem
from pyro_vi_kit.model.log_density.runner import Runner
from pyro_vi_kit.model.log_density.visits import Terms, Visit

_REMEDY = "put what each row says into a plate as long as the batch, pyro.plate('row', len(x))"


@dataclass(frozen=True)
class Streamed:
    """How a batch stands for all data.

    Attributes:
        plate: The data plate.
        rows: N, rows of all data.
        tensors: How many of the density's data tensors, the first ones, a batch replaces.
        inside: Sites that are about a batch, and so not among the draws of a posterior.
    """

    plate: str
    rows: int
    tensors: int
    inside: frozenset[str]

    def scale(self, data: Sequence[Tensor]) -> float:
        """N / B for this batch."""
        return self.rows / data[0].shape[0]

    def split(self, terms: Terms) -> tuple[Tensor, Tensor]:
        """The log joint in what a batch does not change, and the sum over its rows: `[K]` each, nats."""
        shared = terms.shared
        for name, rows in terms.local.items():
            if name != self.plate:
                shared = shared + terms.scale[name] * rows.sum(-1)
        return shared, terms.local[self.plate].sum(-1)

    def completed(self, batch: Sequence[Tensor], data: Sequence[Tensor]) -> list[Tensor]:
        """A batch's tensors, and behind them those of ``data`` that are the same for all batches.

        A batch is read into the CPU's memory, and brought to where the data are.
        """
        batch = [tensor.to(own.device) for tensor, own in zip(batch, data, strict=False)]
        return [*batch, *data[self.tensors :]]


def streamed(runner: Runner, stream: Stream) -> Streamed:
    """Compare a run on the example batch with one on a batch of another length.

    Raises:
        ModelError: If no plate, or no single outermost one, follows the batch; if anything outside of
            it depends on the batch, or a row in it on other rows.
    """
    one, other = _two_runs(runner, stream.tensors)
    plate = _data_plate(one, other)
    # Discrete latents are drawn anew in each run, and so are the rows that depend on them.
    comparable = all(visit.kind != "discrete" for visit in one.values())
    for name, visit in one.items():
        problem = _site_problem(plate, visit, other.get(name), comparable)
        if problem is not None:
            raise ModelError(str(problem))
    inside = {
        name
        for name, visit in one.items()
        if plate in _plates(visit) or not _same(visit.value, other[name].value)
    }
    return Streamed(plate, stream.rows, stream.tensors, frozenset(inside))


def _two_runs(runner: Runner, tensors: int) -> tuple[dict[str, Visit], dict[str, Visit]]:
    """The sites on a batch, and on the first half of it, latents alike."""
    batch, rest = runner.data[:tensors], runner.data[tensors:]
    if len(batch[0]) == 1:
        batch = [tensor.repeat(2, *(1,) * (tensor.dim() - 1)) for tensor in batch]
    half = [tensor[: (len(tensor) + 1) // 2] for tensor in batch]
    full, part = Replay(fill=_somewhere), Replay(fill=_somewhere)
    with runner.first_runs(), validation(False), torch.no_grad():
        runner.run(full, {}, [*batch, *rest])
        runner.run(part, {}, [*half, *rest])
    return full.visits, part.visits


def _somewhere(shape: torch.Size) -> Tensor:
    """A point at which latents differ from one another and batches of any length agree."""
    return torch.full(shape, 0.3)


def _data_plate(one: Mapping[str, Visit], other: Mapping[str, Visit]) -> str:
    sizes: dict[str, set[int]] = {}
    for visit in [*one.values(), *other.values()]:
        for frame in visit.frames:
            sizes.setdefault(frame.name, set()).add(frame.size)
    following = {name for name, found in sizes.items() if len(found) > 1}
    if not following:
        raise ModelError(
            "no plate of the streamed model follows the batch, so that its rows cannot be scaled to "
            f"all data: {_REMEDY}"
        )
    outermost = {
        frame.name
        for visit in one.values()
        for frame in [f for f in visit.frames if f.name in following][:1]
    }
    if len(outermost) > 1:
        raise ModelError(
            f"several plates of the streamed model follow the batch, {', '.join(sorted(outermost))}: "
            "write one plate around all that a row says"
        )
    return outermost.pop()


def _site_problem(
    plate: str, visit: Visit, other: Visit | None, comparable: bool
) -> Problem | None:
    """What is wrong with one site of a streamed model."""
    if other is None:
        return Problem(
            f"site {visit.name!r} is met on a batch of some length only",
            "do not branch on the data",
        )
    plates = _plates(visit)
    if plate in plates and plates[0] != plate:
        return Problem(
            f"site {visit.name!r} is in plate {plate!r}, which follows the batch, inside plate "
            f"{plates[0]!r}",
            f"make {plate!r} the outermost plate, with the lowest dim",
        )
    if visit.kind == "deterministic" and not (visit.counts and visit.unscaled().any()):
        return None
    if plate not in plates:
        return _shared_problem(visit, other)
    if visit.kind not in ("observed", "factor") or not comparable:
        return None
    if not _same(_rows_of(visit, other), _rows_of(other, other)):
        return Problem(
            f"a row of site {visit.name!r} depends on which other rows are in the batch",
            "compute means, ranks and the like from all data beforehand, and pass them with kwargs=",
        )
    return None


def _shared_problem(visit: Visit, other: Visit) -> Problem | None:
    """What is outside the data plate has to be the same for all batches."""
    if visit.kind == "discrete":
        return Problem(
            f"discrete latent site {visit.name!r} of a streamed model is in no plate that follows the "
            "batch, and cannot be summed out a batch at a time",
            "pass the data as tensors, vi.Model(fn, x, y)",
        )
    if visit.kind == "latent" and visit.value.shape != other.value.shape:
        return Problem(
            f"latent site {visit.name!r} is as long as the batch, but in no plate that follows it",
            _REMEDY,
        )
    if not _same(visit.log_prob(), other.log_prob()):
        return Problem(
            f"site {visit.name!r} depends on the batch, but is in no plate that follows it", _REMEDY
        )
    return None


def _rows_of(visit: Visit, like: Visit) -> Tensor:
    """The log densities of the rows that two runs have in common, unscaled."""
    dim, size = like.frames[0].dim or -1, like.frames[0].size
    log_prob = visit.unscaled()
    if log_prob.dim() < -dim or log_prob.shape[dim] < size:
        return log_prob
    return log_prob.narrow(dim, 0, size)


def _plates(visit: Visit) -> list[str]:
    return [frame.name for frame in visit.frames]


def _same(one: Tensor, other: Tensor) -> bool:
    return agree(one, other, 1e-9, 1e-4) if one.is_floating_point() else torch.equal(one, other)
