"""Discrete latents: all their values side by side in one run, summed out exactly, drawn exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_vi_kit.core.errors import ModelError
from pyro_vi_kit.model.log_density.drawn import Drawn
from pyro_vi_kit.model.log_density.elimination import Factor, Name, Plates, draw, eliminate
from pyro_vi_kit.model.log_density.visits import Marginal, Visit, kind_of

Values = dict[str, Tensor]

# Of one point where discrete latents hold all their values; of some thousand, as a fit has, 2 GB.
_MOST = 250_000
# Or so many for each number of data and latents: long data are no reason to refuse.
_EACH = 1000


class Enumeration(EnumMessenger):
    """Gives each discrete latent all its values at once, along dims left of every plate.

    The user need not mark sites with ``infer={"enumerate": "parallel"}``. `pyro.markov` lets dims be
    used again.

    Args:
        nesting: Batch dims that plates may take, counted from the right.
        drawn: Sites that have values of their own.
    """

    def __init__(self, nesting: int, drawn: Drawn | None = None) -> None:
        super().__init__(first_available_dim=-1 - nesting)
        self.nesting = nesting
        self.drawn = drawn

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], _Subsample):
            return
        if not msg["done"] and kind_of(msg) == "discrete":
            summed = self.drawn is None or self.drawn.of(msg["name"]) is None
            how = "parallel" if summed else None
            options = {"enumerate": how, "expand": False, "num_samples": None}
            msg["infer"] = {**msg["infer"], **options}
        super()._pyro_sample(msg)

    def _pyro_post_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], _Subsample):
            return
        # Pyro's own looks at `value.data`, which torch.func.vmap refuses.
        shape = msg["value"].shape[: msg["value"].dim() - msg["fn"].event_dim]
        known = msg["infer"].setdefault("_dim_to_id", {})
        known.update(self._param_dims.get(msg["name"], {}))
        self._value_dims[msg["name"]] = {
            dim: id_ for dim, id_ in known.items() if len(shape) >= -dim and shape[dim] > 1
        }


class Enumerated:
    """The sites of one run under `Enumeration` that depend on discrete latents, as factors.

    Args:
        visits: The run's sites.
        nesting: That of the `Enumeration`.

    Attributes:
        factors: The log density of each such site, unscaled, by name.

    Raises:
        ModelError: If a site mixes rows of an enumerated one, or dims do not say what they are.
    """

    def __init__(self, visits: Mapping[str, Visit], nesting: int) -> None:
        self._visits = visits
        self._homes: dict[int, Plates] = {}
        self._variables: dict[str, int] = {}
        for visit in visits.values():
            dim = visit.infer.get("_enumerate_dim")
            if dim is not None:
                self._variables[visit.name] = visit.infer["_dim_to_id"][dim]
                self._homes[self._variables[visit.name]] = _plates(visit)
        self.factors = {
            visit.name: self._factor(visit, nesting)
            for visit in visits.values()
            if visit.counts and self._depends(visit, nesting)
        }

    def marginals(self) -> list[Marginal]:
        """The log densities of these sites with every discrete latent summed out."""
        return self._marginals(list(self.factors.values()))

    def total(self) -> Tensor:
        """The log joint of the run, discrete latents summed out, without any scale, nats."""
        others = {n: v for n, v in self._visits.items() if n not in self.factors}
        return log_total(others) + sum(part.value.sum() for part in self.marginals())

    def likelihood(self, name: str) -> Tensor | None:
        """The log density of each observation, `[*batch]`, without the site's scale, nats.

        That is log p(y | continuous latents), other observations left aside; only where the discrete
        latents that the site depends on lie in exactly its plates, else None.
        """
        visit = self._visits[name]
        if not visit.frames:
            return None
        hidden = [
            f for n, f in self.factors.items() if n != name and self._visits[n].kind != "observed"
        ]
        with_it = next(
            m for m in self._marginals([*hidden, self.factors[name]]) if name in m.sources
        )
        if len(with_it.frames) != len(visit.frames):
            return None
        rows = with_it.value
        for part in self._marginals([f for f in hidden if f.sources <= with_it.sources]):
            surplus = tuple(range(len(visit.frames), len(part.frames)))
            rows = rows - (part.value.sum(surplus) if surplus else part.value)
        return _in_place(rows, visit)

    def draw(self) -> tuple[Values, Tensor]:
        """One exact draw of all discrete latents given the continuous ones, and its log density.

        Uses torch's global random state.
        """
        _, steps = eliminate(self.factors.values(), self._homes)
        drawn, log_q = draw(steps, self._homes)
        values = {}
        for name, variable in self._variables.items():
            visit = self._visits[name]
            shape = _batch_shape(visit)
            index = torch.zeros(shape, dtype=torch.long)
            if variable in drawn:  # a site of one state is in no sum
                index = _in_place(drawn[variable].value, visit, drawn[variable].names)
            states = visit.fn.enumerate_support(expand=False)
            states = states.reshape(states.shape[0], *visit.fn.event_shape)
            values[name] = states[index.reshape(-1)].reshape(shape + visit.fn.event_shape)
        return values, log_q

    def _marginals(self, factors: Sequence[Factor]) -> list[Marginal]:
        results, _ = eliminate(factors, self._homes)
        return [self._marginal(result) for result in results]

    def _marginal(self, result: Factor) -> Marginal:
        members = [self._visits[name] for name in sorted(result.sources)]
        frames = next(m.frames for m in members if _plates(m) == result.plates)
        value = _ordered(result, [frame.name for frame in frames])
        floor = _floor(value.dtype)
        value = torch.where(value > 0.1 * floor, value, -torch.inf)
        return Marginal(value, frames, _common_scale(members), result.sources)

    def _depends(self, visit: Visit, nesting: int) -> bool:
        """Whether a site's log density has a dim for some discrete latent."""
        mask = visit.mask.dim() if isinstance(visit.mask, Tensor) else 0
        return visit.name in self._variables or max(visit.width, mask) > nesting

    def _factor(self, visit: Visit, nesting: int) -> Factor:
        log_prob = visit.unscaled()
        sizes = {frame.dim: frame.size for frame in visit.frames}
        rank = max([log_prob.dim(), *(-int(dim or 0) for dim in sizes)])
        shape = (1,) * (rank - log_prob.dim()) + tuple(log_prob.shape)
        shape = [sizes.get(i - rank, size) for i, size in enumerate(shape)]
        names = [_name_of(visit, i - rank, size, nesting) for i, size in enumerate(shape)]
        log_prob = log_prob.expand(shape)
        # Dims of the batch that are no plate's, and those of size 1.
        unnamed = [i for i, name in enumerate(names) if name is None]
        log_prob = log_prob.sum(unnamed) if unnamed else log_prob
        factor = Factor(
            log_prob.clamp(min=_floor(log_prob.dtype)),
            tuple(name for name in names if name is not None),
            _plates(visit),
            frozenset([visit.name]),
        )
        for variable in factor.variables:
            outside = self._homes[variable] - factor.plates
            if outside:
                raise ModelError(_misplaced(visit, f"mixes rows of plate {sorted(outside)[0]!r}"))
        return factor


def _name_of(visit: Visit, dim: int, size: int, nesting: int) -> Name | None:
    """The plate or the variable of a dim of a site's log density; None where it is of neither."""
    plate = next((frame.name for frame in visit.frames if frame.dim == dim), None)
    if plate is not None or size == 1 or dim >= -nesting:
        return plate
    variable = visit.infer.get("_dim_to_id", {}).get(dim)
    if variable is None:
        raise ModelError(_misplaced(visit, "has a dim that no plate and no latent made"))
    return variable


def log_total(visits: Mapping[str, Visit]) -> Tensor:
    """The sum of these sites' log densities, without scale and log determinants, nats."""
    parts = [v.unscaled().sum() for v in visits.values() if v.counts]
    return torch.stack(parts).sum() if parts else torch.zeros(())


def _plates(visit: Visit) -> Plates:
    return frozenset(frame.name for frame in visit.frames)


def _batch_shape(visit: Visit) -> torch.Size:
    """The batch shape of a site without enumerated dims: that of its plates."""
    depth = max([-int(frame.dim or 0) for frame in visit.frames], default=0)
    sizes = {int(frame.dim or 0): frame.size for frame in visit.frames}
    return torch.Size([sizes.get(d, 1) for d in range(-depth, 0)])


def _in_place(value: Tensor, visit: Visit, names: Sequence[Any] | None = None) -> Tensor:
    """A tensor with one dim per plate of a site, in the site's own batch shape."""
    own = [frame.name for frame in visit.frames]
    names = own if names is None else names
    dims = {frame.name: int(frame.dim or 0) for frame in visit.frames}
    order = sorted(range(len(names)), key=lambda i: dims[names[i]])
    return value.permute(order).reshape(_batch_shape(visit))


def _ordered(factor: Factor, names: Sequence[str]) -> Tensor:
    return factor.value.permute([factor.names.index(name) for name in names])


def _floor(dtype: torch.dtype) -> float:
    """What stands for log 0: it keeps the gradients of sums over impossible states finite."""
    return -1e200 if dtype == torch.float64 else -1e30


def _common_scale(members: Sequence[Visit]) -> Any:
    first = members[0].scale
    for visit in members[1:]:
        if visit.scale is not first and not _equal(visit.scale, first):
            raise ModelError(
                f"sites {members[0].name!r} and {visit.name!r} depend on the same discrete latents "
                "but are scaled differently (poutine.scale, a subsampled plate): give them one "
                "scale, and draw minibatches only of plates that enclose the discrete sites"
            )
    return first


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other


def _misplaced(visit: Visit, what: str) -> str:
    return (
        f"site {visit.name!r} {what} where discrete latents hold all their values at once: use them "
        "as indices, a[..., z], or in elementwise operations, and put sites that depend on them into "
        "the same plates"
    )


class StatesError(ModelError):
    """Discrete latents have too many joint values to hold at once."""


class Sizes(TorchFunctionMode):
    """Watches a run of a model whose discrete latents are summed out.

    Args:
        numbers: Of data and latents.
        sites: The discrete latents.

    Attributes:
        largest: Of the largest tensor so far.
    """

    def __init__(self, numbers: int, sites: list[str]) -> None:
        super().__init__()
        self._limit = max(_MOST, _EACH * numbers)
        self._sites = sites
        self.largest = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # What tensors of different shapes broadcast to, before it is made.
        shapes = [tuple(value.shape) for value in args if isinstance(value, Tensor)]
        self._note(_broadcast(shapes))
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self._note(result.numel())
        return result

    def _note(self, numbers: int) -> None:
        self.largest = max(self.largest, numbers)
        if numbers > self._limit:
            names = ", ".join(self._sites[:5]) + (", ..." if len(self._sites) > 5 else "")
            raise StatesError(
                f"summing out the {len(self._sites)} discrete latent site(s) {names} needs more than "
                f"{self._limit:,} numbers at once, since one site depends on all of them: let each "
                "observation depend on few, put independent sites into a pyro.plate and chains into "
                "pyro.markov"
            )


def _broadcast(shapes: list[tuple[int, ...]]) -> int:
    """Numbers of the shape that these make together; 0 where they make none."""
    if len(shapes) < 2:
        return 0
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    sizes = [{size for size in column if size != 1} for column in zip(*padded, strict=True)]
    if any(len(size) > 1 for size in sizes):
        return 0
    return math.prod(size.pop() for size in sizes if size)
