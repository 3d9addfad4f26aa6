"""Run a Pyro model once, with every latent, parameter and minibatch index given from outside.

The handler sits outside the model, so it sees each site after plates, conditioning, scaling and
masking have had their say. Transforms are rebuilt from the site's own distribution at every run:
a support may depend on other latents, and a cached transform would silently be wrong there.
"""

from __future__ import annotations

import contextlib
import functools
import math
import weakref
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pyro.distributions import Delta, MaskedDistribution, Unit
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.nn import PyroModule
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import SubsampleMessenger, _Subsample
from torch import Tensor, nn
from torch.distributions import Independent, constraints, transform_to

from pyro_vi_kit.core.errors import ModelError
from pyro_vi_kit.model.log_density import domain
from pyro_vi_kit.model.log_density.drawn import Choice, Drawn, hardened
from pyro_vi_kit.model.log_density.initial import InitFunction, point_at
from pyro_vi_kit.model.log_density.modules import owner_of_param
from pyro_vi_kit.model.log_density.supports import bijector

Kind = Literal["latent", "observed", "deterministic", "factor", "discrete"]

# What a latent without a given value starts from: the image of the origin of unconstrained space.
# Priors are not sampled for it, since improper ones cannot be.
Fill = Callable[[torch.Size], Tensor]


@dataclass
class Visit:
    """One site as one run met it."""

    name: str
    kind: Kind
    fn: Any
    value: Tensor
    frames: tuple[CondIndepStackFrame, ...]
    scale: float | Tensor
    mask: bool | Tensor | None
    infer: Mapping[str, Any] = field(default_factory=dict)
    unconstrained: Tensor | None = None
    log_det: Tensor | None = None
    choice: Choice | None = None
    guarded: bool = False
    made: Sequence[Any] = ()

    @property
    def counts(self) -> bool:
        """Whether its log density is part of the model's.

        A `pyro.deterministic` has none; a `Delta` of something computed may be given one.
        """
        noted = self.infer.get("_deterministic") or _is_hidden_delta(self.fn)
        return self.kind != "deterministic" or not noted

    @property
    def has_states(self) -> bool:
        """Whether it is a discrete latent, summed out or not."""
        return self.kind == "discrete" or self.choice is not None

    def log_prob(self) -> Tensor:
        """The site's log density as in Pyro's traces, scale and mask applied: [*batch], nats."""
        return scaled(self.unscaled(), self.scale)

    def unscaled(self) -> Tensor:
        """The same without the scale."""
        relaxed = self.choice is not None and self.choice.relaxed
        if relaxed and self.choice is not None and self.unconstrained is not None:
            log_prob = self.choice.log_prob(self.unconstrained)
        else:
            log_prob = self.fn.log_prob(self.value)
        outside = self.outside() if self.guarded else None
        if outside is not None:
            log_prob = torch.where(outside, -torch.inf, log_prob)
        if self.mask is False:
            return torch.full_like(log_prob, self._hidden())
        if isinstance(self.mask, Tensor):
            log_prob = torch.where(self.mask, log_prob, self._hidden())
        return log_prob

    def bounds(self) -> list[domain.Bound]:
        """How far inside their constraints its arguments are, and what was observed."""
        return domain.bounds(self.fn, self.value if self.kind == "observed" else None, self.made)

    def outside(self) -> Tensor | None:
        """Where, of its batch, an argument or what was observed leaves its constraint."""
        margins = [bound.margin for bound in self.bounds()]
        return functools.reduce(torch.minimum, margins) < 0 if margins else None

    def _hidden(self) -> float:
        """What stands where a mask hides: nothing, or for a discrete latent what sums to one."""
        if self.choice is not None:
            batch = self.choice.base.batch_shape
            cells = math.prod(batch[len(batch) - self.choice.inner :])
            return -cells * math.log(len(self.choice.states))
        if self.kind == "discrete" and self.fn.has_enumerate_support:
            return -math.log(self.fn.enumerate_support(expand=False).shape[0])
        return 0.0


@dataclass
class ParamVisit:
    """One learned parameter as one run met it, with the module that holds it if one does."""

    name: str
    constraint: constraints.Constraint
    owner: nn.Module | None
    attribute: str
    value: Tensor | None = None


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
        guarded: Sites whose density is zero where `domain` says that it is not defined.

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
        made = domain.taken()
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
        elif kind == "discrete" and not self.enumerate:
            given = self.constrained.get(visit.name)
            # Rows of new data are other rows: theirs are drawn.
            fits = given is not None and given.shape == visit.fn.shape()
            visit.value = given if fits and given is not None else visit.fn.sample()
        elif kind == "observed" and self.simulate:
            _require_length(visit)
            visit.value = visit.fn.sample()
        elif visit.value is None:
            visit.value = visit.fn()  # computed: what a Delta holds, with its ties to latents
        msg["value"] = visit.value
        msg["done"] = True
        self.visits[visit.name] = visit

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
        transform: Any = bijector(visit.name, visit.fn)
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
        log_det = transform.log_abs_det_jacobian(visit.unconstrained, visit.value)
        # The value's own batch dims: under enumeration the distribution may have more of them.
        surplus = log_det.dim() - (visit.value.dim() - visit.fn.event_dim)
        visit.log_det = log_det.flatten(-surplus).sum(-1) if surplus > 0 else log_det

    def _pyro_param(self, msg: Any) -> None:
        name = msg["name"]
        owner, attribute = owner_of_param()
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
    base = innermost(visit.fn)
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


def scaled(log_prob: Tensor, scale: float | Tensor) -> Tensor:
    """A log density times its scale, where that is not 1."""
    return log_prob if isinstance(scale, int | float) and scale == 1 else log_prob * scale


def sample_sites(trace: Any) -> dict[str, Any]:
    """The sample sites of a Pyro trace by name, without the bookkeeping sites of plates."""
    return {
        name: node
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and not isinstance(node["fn"], _Subsample)
    }


def kind_of(msg: Any) -> Kind:
    """What a sample message stands for."""
    if msg["infer"].get("_deterministic"):
        return "deterministic"
    base = innermost(msg["fn"])
    if isinstance(base, Unit):
        # `pyro.factor`, whose value has no elements; `poutine.uncondition` calls it not observed.
        return "factor"
    if msg["is_observed"]:
        return "deterministic" if _is_hidden_delta(msg["fn"]) else "observed"
    if isinstance(base, Delta):
        return "deterministic"
    if getattr(msg["fn"].support, "is_discrete", False):
        return "discrete"
    return "latent"


def _is_hidden_delta(fn: Any) -> bool:
    """Whether this is the Delta, masked away, that a reparameterised site leaves under its name."""
    hidden = False
    while isinstance(fn, Independent | MaskedDistribution | ExpandedDistribution):
        hidden = hidden or getattr(fn, "_mask", None) is False
        fn = fn.base_dist
    return hidden and isinstance(fn, Delta)


def innermost(fn: Any) -> Any:
    """The distribution inside masks, expansions and event dims."""
    while isinstance(fn, Independent | MaskedDistribution | ExpandedDistribution):
        fn = fn.base_dist
    return fn


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
