"""Run a Pyro model once, with every latent, parameter and minibatch index given from outside.

The handler sits outside the model, so it sees each site after plates, conditioning, scaling and
masking have had their say. Transforms are rebuilt from the site's own distribution at every run:
a support may depend on other latents, and a cached transform would silently be wrong there.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import SubsampleMessenger, _Subsample
from torch import Tensor, nn
from torch.distributions import constraints, transform_to

from pyro_vi_kit.core.errors import ModelError
from pyro_vi_kit.model.log_density import supports
from pyro_vi_kit.model.log_density.drawn import Choice, Drawn, hardened
from pyro_vi_kit.model.log_density.initial import InitFunction, point_at
from pyro_vi_kit.model.log_density.visits import ParamVisit, Visit, kind_of

# What a latent without a given value starts from: the image of the origin of unconstrained space.
# Priors are not sampled for it, since improper ones cannot be.
Fill = Callable[[torch.Size], Tensor]


@dataclass
class Replay(Messenger):
    """Sets what is given, and keeps what it saw.

    Args:
        unconstrained: Unconstrained value of each latent, `[*batch, *event]` by name.
        constrained: Values for latents that are given on their own scale instead; discrete ones too,
            where they have the site's shape.
        enumerate: Leave discrete latents to an `Enumeration` around the model.
        params: Unconstrained value of each learned parameter.
        init: Gives constrained values of latents that nothing was given for; see `initial`.
        fill: Makes the unconstrained value of a latent that nothing was given for.
        simulate: Draw observed sites anew instead of using the data.
        sample_latents: Draw latents from their conditional prior where nothing was given.
        drawn: Discrete latents that are not summed out, and are latents like the continuous ones.
        guarded: Sites whose density is zero where `supports` says that it is not defined.

    Attributes:
        declared: The subsample size of each plate that declares one.
        visits: The sites that were met.
        param_visits: The parameters that were met.
    """

    unconstrained: Mapping[str, Tensor] = field(default_factory=dict)
    constrained: Mapping[str, Tensor] = field(default_factory=dict)
    enumerate: bool = False
    params: Mapping[str, Tensor] = field(default_factory=dict)
    init: InitFunction | None = None
    fill: Fill = torch.zeros
    simulate: bool = False
    sample_latents: bool = False
    drawn: Drawn | None = None
    guarded: frozenset[str] = frozenset()
    declared: dict[str, int] = field(default_factory=dict)
    visits: dict[str, Visit] = field(default_factory=dict)
    param_visits: dict[str, ParamVisit] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], _Subsample):
            return
        if msg["name"] in self.visits:
            raise ModelError(
                f"two sites are named {msg['name']!r}: give each pyro.sample statement a name of "
                "its own, as in f'x_{i}' in a loop"
            )
        made = supports.taken()
        _require_tensors(msg)
        kind = kind_of(msg)
        visit = Visit(
            name=msg["name"],
            kind=kind,
            fn=msg["fn"],
            value=msg["value"],
            frames=tuple(f for f in msg["cond_indep_stack"] if f.vectorized and f.size > 0),
            scale=msg["scale"],
            mask=msg["mask"],
            infer=msg["infer"],
            guarded=msg["name"] in self.guarded,
            made=made if kind == "factor" else (),
        )
        relaxed = None if self.drawn is None else self.drawn.of(visit.name)
        if kind == "discrete" and relaxed is not None:
            visit.kind = "latent"
            self._set_drawn(visit, relaxed)
        elif kind == "latent":
            self._set_latent(visit, msg)
        else:
            self._set_other(visit)
        msg["value"] = visit.value
        msg["done"] = True
        self.visits[visit.name] = visit

    def _set_other(self, visit: Visit) -> None:
        """Give a site its value that is no latent, or a discrete one that is to be summed out."""
        if visit.kind == "discrete" and not self.enumerate:
            given = self.constrained.get(visit.name)
            # Rows of new data are other rows: theirs are drawn.
            fits = given is not None and given.shape == visit.fn.shape()
            visit.value = given if fits and given is not None else visit.fn.sample()
        elif visit.kind == "observed" and self.simulate:
            _require_length(visit)
            visit.value = visit.fn.sample()
        elif visit.value is None:
            visit.value = visit.fn()  # computed: what a Delta holds, with its ties to latents

    def _set_drawn(self, visit: Visit, relaxed: bool) -> None:
        """Give a discrete latent its value: unconstrained, constrained, prior, fill."""
        visit.choice = choice = Choice.of(visit.name, visit.fn, relaxed)
        given = self.unconstrained.get(visit.name)
        value = self.constrained.get(visit.name)
        # Rows of new data are other rows: theirs are drawn.
        moved = self.simulate and given is not None and given.shape != choice.shape()
        if moved or (self.sample_latents and given is None):
            visit.value = visit.fn.sample() if moved or value is None else value
            return
        if given is None and value is not None:
            given = choice.weights(value, torch.empty((), dtype=torch.get_default_dtype()))
        visit.unconstrained = hardened(self.fill(choice.shape())) if given is None else given
        visit.value = choice.value(visit.unconstrained)
        batch = visit.unconstrained.shape[: visit.unconstrained.dim() - 1 - choice.inner]
        visit.log_det = visit.unconstrained.new_zeros(batch)

    def _set_latent(self, visit: Visit, msg: Any) -> None:
        """Give the latent its value, by the first of: unconstrained, constrained, prior, init, fill."""
        if self.sample_latents and visit.name not in self.unconstrained:
            given = self.constrained.get(visit.name)
            visit.value = visit.fn.sample() if given is None else given
            return
        transform: Any = supports.bijector(visit.name, visit.fn)
        if visit.name in self.unconstrained:
            visit.unconstrained = self.unconstrained[visit.name]
        elif visit.name in self.constrained:
            visit.unconstrained = transform.inv(self.constrained[visit.name])
        else:
            origin = self.fill(transform.inverse_shape(visit.fn.shape()))
            init = self.init
            visit.unconstrained = origin if init is None else point_at(msg, init, transform, origin)
        visit.value = transform(visit.unconstrained)
        if self.enumerate:
            _require_one_value(visit, transform)
        visit.log_det = visit.summed(
            transform.log_abs_det_jacobian(visit.unconstrained, visit.value)
        )

    def _pyro_param(self, msg: Any) -> None:
        name = msg["name"]
        owner, attribute = _owner_of_param()
        constraint = msg["kwargs"].get("constraint", constraints.real)
        if isinstance(owner, PyroModule):
            # A PyroModule's param statement may leave the constraint to the parameter store.
            own_name = attribute.removesuffix("_unconstrained")
            constraint = owner._pyro_params.get(own_name, (constraint, None))[0]
        self.param_visits[name] = ParamVisit(name, constraint, owner, attribute)
        if name in self.params:
            value = transform_to(constraint)(self.params[name])
            if msg["kwargs"].get("event_dim") is not None:
                # A subsampled plate notes its rows on what `unconstrained` points to; not on ours.
                value = value.view_as(value)
                value.unconstrained = weakref.ref(value)
            msg["value"] = value
            msg["done"] = True

    def _pyro_post_param(self, msg: Any) -> None:
        # Before plates take their rows of it: this handler is the outermost.
        self.param_visits[msg["name"]].value = msg["value"]


def _owner_of_param() -> tuple[nn.Module | None, str]:
    """The submodule and attribute behind the param message under way, read off the call stack.

    Pyro's param messages carry a name and a tensor, not the module whose attribute the tensor is.
    The module's forward pass reads that attribute: setting the message's value changes nothing.
    """
    frame = sys._getframe(1)
    for _ in range(60):
        if frame is None:
            break
        if frame.f_code is pyro.module.__code__:
            module, path = frame.f_locals["nn_module"], frame.f_locals["param_name"]
            return _holder_of(module, path)
        if frame.f_code is PyroModule.__getattr__.__code__:
            module, attribute = frame.f_locals["self"], frame.f_locals["name"]
            if attribute in module.__dict__.get("_pyro_params", {}):
                attribute += "_unconstrained"
            if attribute in module._parameters:
                return module, attribute
        frame = frame.f_back
    return None, ""


def _holder_of(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The submodule that holds the parameter ``path``, and the parameter's name in it."""
    *parents, attribute = path.split(".")
    for parent in parents:
        # Not getattr: a PyroModule answers attribute access with param statements.
        module = module._modules[parent]  # type: ignore[assignment]
    return module, attribute


def _require_tensors(msg: Any) -> None:
    """Refuse a distribution that does not say its shape and support, and data that are no tensor.

    Raises:
        ModelError: If the site has either.
    """
    name, fn, value = msg["name"], msg["fn"], msg["value"]
    needed = ("batch_shape", "event_shape", "event_dim", "support")
    missing = [what for what in needed if not hasattr(type(fn), what) and what not in vars(fn)]
    if missing:
        kind = type(fn).__name__
        instead = (
            f", or write pyro.factor({name!r}, {kind}(...).log_prob(value).sum()) in its place"
        )
        raise ModelError(
            f"the distribution of site {name!r}, {kind}, does not say its {', '.join(missing)}: "
            "derive it from pyro.distributions.TorchDistribution, with batch_shape, event_shape and a "
            "support"
            f"{instead if msg['is_observed'] else ''}"
        )
    if msg["is_observed"] and value is not None and not isinstance(value, Tensor):
        raise ModelError(
            f"the data at site {name!r} are of type {type(value).__name__}, and Pyro takes tensors: "
            "obs=torch.as_tensor(...)"
        )


def _require_length(visit: Visit) -> None:
    """Refuse to draw a series of no length: Pyro asserts that there is one."""
    base = supports.innermost(visit.fn)
    if getattr(base, "duration", 0) is None:
        raise ModelError(
            f"site {visit.name!r} cannot be drawn: its {type(base).__name__} has no length of its own; "
            "give it duration=..., such as the length of the data"
        )


def _require_one_value(visit: Visit, transform: Any) -> None:
    """Refuse a support that depends on discrete latents, which hold all their values at once."""
    inner = visit.fn.event_dim + transform.domain.event_dim - transform.codomain.event_dim
    given = 0 if visit.unconstrained is None else visit.unconstrained.dim() - inner
    if visit.value.dim() - visit.fn.event_dim > given:
        raise ModelError(
            f"the support of latent {visit.name!r} depends on discrete latents, so that it has no one "
            "value for all of theirs: give it a fixed support"
        )


@contextlib.contextmanager
def subsample_indices(
    index: Mapping[str, Tensor],
    declared: dict[str, int] | None = None,
    streamed_rows: int | None = None,
    at_hand: Container[str] = (),
) -> Iterator[None]:
    """Make every plate use these indices, all of its rows where none are given.

    A plate that declares ``subsample_size`` refuses any other length, and only this function stands
    between the declaration and the refusal. Call it under the lock of `runtime`.

    Args:
        index: Indices [B] by plate name.
        declared: Filled with the subsample size of each plate that declares one.
        streamed_rows: N of a streamed model. A plate of that size that declares a subsample has it at
            hand already, as its arguments: its rows are the first ones.
        at_hand: Other plates that have the subsample they declare as their arguments.
    """
    original = SubsampleMessenger._subsample

    def subsample(
        name: str,
        size: int | None = None,
        subsample_size: int | None = None,
        subsample: Any = None,
        use_cuda: bool | None = None,
        device: str | None = None,
    ) -> Any:
        if size is None or subsample is not None:
            return original(name, size, subsample_size, subsample, use_cuda, device)
        if declared is not None and subsample_size is not None and subsample_size < size:
            declared[name] = int(subsample_size)
        given = index.get(name)
        here = size == streamed_rows or name in at_hand
        if given is None and subsample_size is not None and here:
            first = torch.arange(min(subsample_size, size), device=device)
            return original(name, size, None, first, use_cuda, device)
        chosen = torch.arange(size, device=device) if given is None else given
        return original(name, size, None, chosen, use_cuda, device)

    SubsampleMessenger._subsample = staticmethod(subsample)
    try:
        yield
    finally:
        SubsampleMessenger._subsample = staticmethod(original)


@dataclass(eq=False)  # a stack of handlers asks which of them it holds
class ArgumentRows(Messenger):
    """Gives plates the sizes that Pyro does not know, and sites in them the scale that follows.

    ``pyro.plate("data")`` has no size: a site in it has as many rows as its distribution or its data
    have there, and one that has a single row is outside of it, as Pyro's broadcasting leaves it. Call it
    inside of the handler that reads the sites.

    Args:
        sizes: N of plates of which the model's arguments hold some rows, by name.
    """

    sizes: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self._found: dict[str, int] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], _Subsample):
            return
        frames = (self._sized(frame, msg) for frame in msg["cond_indep_stack"])
        msg["cond_indep_stack"] = tuple(frame for frame in frames if frame is not None)

    def _sized(self, frame: CondIndepStackFrame, msg: Any) -> CondIndepStackFrame | None:
        """The plate with its sizes; None where the site is outside of it."""
        if frame.dim is not None and frame.size == -1:
            length = _length(msg, frame.dim)
            if length == 1:
                return None
            known = self._found.setdefault(frame.name, length)
            if known != length:
                raise ModelError(
                    f"plate {frame.name!r} has no size of its own, and its sites have {known} and "
                    f"{length} rows (site {msg['name']!r}): give it one, "
                    f"pyro.plate({frame.name!r}, size)"
                )
            frame = frame._replace(size=length, full_size=length)
        total = self.sizes.get(frame.name)
        if total is None or frame.full_size not in (None, frame.size):
            return frame
        msg["scale"] = msg["scale"] * (total / frame.size)
        return frame._replace(full_size=total)


def _length(msg: Any, dim: int) -> int:
    """How many rows a site has along a batch dim."""
    shapes = [tuple(msg["fn"].batch_shape)]
    value = msg["value"]
    if msg["is_observed"] and isinstance(value, Tensor):
        shapes.append(tuple(value.shape[: value.dim() - msg["fn"].event_dim]))
    return max((shape[dim] for shape in shapes if len(shape) >= -dim), default=1)


def misfits(visits: Mapping[str, Any], declared: Mapping[str, int]) -> bool:
    """Whether data are as long as the subsample that their plate declares, and the plate is not."""
    for visit in visits.values():
        if visit.kind != "observed" or not isinstance(visit.value, Tensor):
            continue
        shape = visit.value.shape[: visit.value.dim() - visit.fn.event_dim]
        for frame in visit.frames:
            length = shape[frame.dim] if len(shape) >= -frame.dim else 1
            if length == declared.get(frame.name) != frame.size:
                return True
    return False


def rows_among(
    data: Sequence[Tensor], sizes: Mapping[str, int], index: Mapping[str, Tensor]
) -> list[Tensor]:
    """The data, of each tensor as long as a plate the rows of its minibatch alone.

    Args:
        data: Tensors among a model's arguments.
        sizes: N by plate, no two alike.
        index: Rows `[B]` by plate.
    """
    rows = {size: index[name] for name, size in sizes.items()}
    return [
        tensor.index_select(0, rows[len(tensor)])
        if tensor.dim() and len(tensor) in rows
        else tensor
        for tensor in data
    ]
