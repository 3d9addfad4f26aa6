"""Whether a density is the model's: compared with Pyro's own trace, site by site.

The density runs a model under handlers of its own, in another precision, on copies, vectorised. Here the
user's function runs on the user's arguments, in its own precision and default dtype, under nothing but
`pyro.poutine.trace` and a handler that gives its latents their values.
"""

from __future__ import annotations

import contextlib
import functools
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_vi_kit.core.errors import ModelError, first_line
from pyro_vi_kit.core.runtime import RandomStream, isolated, private_params
from pyro_vi_kit.model.log_density.problems import changing_problem
from pyro_vi_kit.model.log_density.raised import Problem
from pyro_vi_kit.model.log_density.runner import Runner
from pyro_vi_kit.model.log_density.structure import Parameter
from pyro_vi_kit.model.log_density.visits import Visit, sample_sites

# A log density is what some hundred roundings give, each of half an epsilon of its terms.
_ROUNDINGS = 256.0
# Rows of a float64 model that are added up in another order, or by torch's own formula for ours.
_LEAST = 1e-9
# One run with rounded results is one draw of what rounding does; it may be a small one.
_SPREAD = 32.0
_MIXED = re.compile(r"dtype|scalar type|\b(Double|Float|Half)\b")


@dataclass(frozen=True)
class Seen:
    """What a run of the density met at one point.

    Attributes:
        values: Of the latents, discrete ones too, `[*batch, *event]` by site.
        log_probs: Of each site that counts, `[*batch]`, nats.
    """

    values: dict[str, Tensor]
    log_probs: dict[str, Tensor]

    @classmethod
    def of(cls, visits: Mapping[str, Visit]) -> Seen:
        """What is to be compared, detached."""
        latents = [v for v in visits.values() if v.kind in ("latent", "discrete")]
        return cls(
            {visit.name: visit.value.detach() for visit in latents},
            {visit.name: _log_prob(visit).detach() for visit in visits.values() if visit.counts},
        )


def _log_prob(visit: Visit) -> Tensor:
    log_prob = visit.log_prob()
    if visit.has_states and isinstance(visit.mask, Tensor):
        # Where it is hidden Pyro has nothing, and we what sums to one.
        return torch.where(visit.mask, log_prob, torch.zeros_like(log_prob))
    hidden = visit.has_states and visit.mask is False
    return torch.zeros_like(log_prob) if hidden else log_prob


@dataclass(frozen=True)
class Oracle:
    """Pyro's own trace of a model, to compare a density with.

    Attributes:
        runner: What runs the model.
        parameters: Learned parameters as the first runs made them.
        params: The same, unconstrained, in the density's precision.
    """

    runner: Runner
    parameters: Mapping[str, Parameter]
    params: Mapping[str, Tensor]

    def problem(self, point: Seen, rounded: Callable[[torch.dtype], Seen]) -> Problem | None:
        """What differs at one point: in the model's own precision, or else in double or up to rounding.

        Args:
            point: What the density met there.
            rounded: What it meets where each result is rounded to a lower precision.
        """
        found: dict[str, Tensor] = {}
        raised: list[Exception] = []
        for double in (False, True):
            try:
                log_probs = self.log_probs(point, double)
            except Exception as error:  # noqa: BLE001  whatever a model raises there, it is told
                raised.append(error)
                continue
            found = found or log_probs
            low = _precision_of(self.runner, log_probs)
            if _first_that_differs(point, log_probs, low) is None:
                return None
        if not found:
            # Of a model that mixes precisions, which Pyro cannot run, there is no other density.
            mixed = any(_MIXED.search(str(error)) for error in raised)
            return None if mixed else _raised(raised[0])
        low = _precision_of(self.runner, found)
        with contextlib.suppress(Exception):
            again = self.log_probs(point, len(raised) > 0)
            name = _first_that_differs(Seen({}, again), found, low)
            if name is not None:
                return changing_problem(name)
        allowed = _rounding(point, rounded, low) if low != torch.float64 else {}
        name = _first_that_differs(point, found, low, allowed)
        return None if name is None else _difference(self.runner, name, point, found, low)

    def log_probs(self, point: Seen, double: bool) -> dict[str, Tensor]:
        """The log density of each site in Pyro's trace, scaled and masked by Pyro.

        Args:
            point: Values of the latents.
            double: Whether arguments and parameters are those of the density, in its precision.
        """
        runner = self.runner
        dtype = runner.dtype if double else runner.outer
        args, kwargs = runner.arguments() if double else runner.own_arguments()
        device = runner.device if double else runner.own_device
        given = _Given(point.values, device)
        with (
            RandomStream(0),
            isolated(dtype, runner.device if double else None),
            _own_params(self.parameters, dtype, device),
            runner.learned(self.params) if double else contextlib.nullcontext(),
            runner.as_written(),
            torch.enable_grad(),
        ):
            trace = poutine.trace(given(runner.model.fn)).get_trace(*args, **kwargs)
            trace.compute_log_prob()
        return {
            name: node["log_prob"].detach()
            for name, node in sample_sites(trace).items()
            # What was computed has no density.
            if name in point.log_probs or bool((node["log_prob"] != 0).any())
        }


def require_same_as_pyro(
    oracle: Oracle, seen: Sequence[Seen], rounded: Callable[[int, torch.dtype], Seen]
) -> None:
    """Refuse a density that differs from Pyro's trace of the model at some point.

    Args:
        oracle: Pyro's trace.
        seen: What the density met at each point.
        rounded: What it meets at one of them where each result is rounded to a lower precision.

    Raises:
        ModelError: If it differs by more than rounding, or Pyro cannot run the model.
    """
    for k, point in enumerate(seen):
        problem = oracle.problem(point, functools.partial(rounded, k))
        if problem is not None:
            raise ModelError(str(problem))


def _precision_of(runner: Runner, log_probs: Mapping[str, Tensor]) -> torch.dtype:
    """The lowest precision that anything was computed in."""
    met = [runner.dtype, *(value.dtype for value in log_probs.values())]
    if runner.precision is not None:
        met.append(runner.precision.lowest)
    floating = [dtype for dtype in met if dtype.is_floating_point]
    return max(floating, key=lambda dtype: torch.finfo(dtype).eps)


def _first_that_differs(
    point: Seen,
    log_probs: Mapping[str, Tensor],
    low: torch.dtype,
    allowed: Mapping[str, float] | None = None,
) -> str | None:
    """The first site that differs by more than rounding to a precision explains, if one does.

    Args:
        point: What the density met.
        log_probs: What Pyro's trace says.
        low: The precision.
        allowed: By how much more a site may differ, relative to one plus its size.
    """
    tolerance = max(_ROUNDINGS * torch.finfo(low).eps, _LEAST)
    for name in [*point.log_probs, *log_probs]:
        if name not in point.log_probs or name not in log_probs:
            return name
        ours, theirs = _alike(point.log_probs[name], log_probs[name])
        bound = (tolerance + (allowed or {}).get(name, 0.0)) * (1.0 + ours.abs())
        same = (ours == theirs) | (ours.isnan() & theirs.isnan())
        if not bool((same | ((ours - theirs).abs() <= bound)).all()):
            return name
    return None


def _alike(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Two log densities row by row, or their sums where one of them is without rows."""
    ours, theirs = (value.detach().double().cpu() for value in (ours, theirs))
    return (ours, theirs) if ours.shape == theirs.shape else (ours.sum(), theirs.sum())


def _rounding(
    point: Seen, rounded: Callable[[torch.dtype], Seen], low: torch.dtype
) -> dict[str, float]:
    """By how much rounding changes each site, relative to one plus its size; measured.

    A matrix that is all but singular in float32 has no exact density there. How much is lost cannot be
    read off a model, but the density can be run with every result rounded.
    """
    try:
        other = rounded(low)
    except (RuntimeError, ValueError):  # no Cholesky factor
        return dict.fromkeys(point.log_probs, float("inf"))
    lost = {}
    for name, log_prob in point.log_probs.items():
        ours, theirs = _alike(log_prob, other.log_probs[name])
        change = ((ours - theirs).abs() / (1.0 + ours.abs())).nan_to_num(nan=float("inf"))
        lost[name] = _SPREAD * float(change.max()) if change.numel() else 0.0
    return lost


# -- Pyro's own trace -----------------------------------------------------------------------------


class _Given(Messenger):
    """Gives latents these values, in the precision that the site has by itself."""

    def __init__(self, values: Mapping[str, Tensor], device: torch.device | None) -> None:
        super().__init__()
        self.values = values
        self.device = device

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], _Subsample):
            # Of a plate, which may be entered twice, or be called as a site is; a trace takes neither.
            msg["stop"] = True
        value = self.values.get(msg["name"])
        if value is None or msg["is_observed"]:
            return
        value = value.to(self.device, _dtype_of(msg["fn"], value.dtype))
        # As in a fit, where latents depend on what is trained; no leaf, so that it can be written into.
        msg["value"] = (
            value.clone().requires_grad_().clone() if value.is_floating_point() else value
        )
        msg["done"] = True


def _dtype_of(fn: Any, otherwise: torch.dtype) -> torch.dtype:
    """The dtype of a distribution's draws."""
    try:
        return fn.sample().dtype
    except Exception:  # noqa: BLE001  an improper prior cannot be sampled, others fail at odd parameters
        return torch.get_default_dtype() if otherwise.is_floating_point else otherwise


@contextlib.contextmanager
def _own_params(
    parameters: Mapping[str, Parameter], dtype: torch.dtype, device: torch.device | None
) -> Iterator[None]:
    """A copy of the user's parameter store, and what a model would initialise at random."""
    state: dict[str, Any] = dict(pyro.get_param_store().get_state())
    params, constraints = dict(state["params"]), dict(state["constraints"])
    for name, parameter in parameters.items():
        if name not in params and parameter.owner is None:
            value = parameter.value.to(device)
            params[name] = value.to(dtype) if value.is_floating_point() else value
            constraints[name] = parameter.constraint
    with private_params({"params": params, "constraints": constraints}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*was not registered in the param store")
        yield


class Rounded(TorchFunctionMode):
    """Rounds each new result to a lower precision, as if it had been computed there."""

    def __init__(self, low: torch.dtype) -> None:
        super().__init__()
        self.low = low

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, Tensor) or any(result is value for value in args):
            return result
        with torch._C.DisableTorchFunction():
            # Views keep their memory; it holds what was rounded when it was written.
            if not result.is_floating_point() or result._is_view():
                return result
            return result.to(self.low).to(result.dtype)


# -- words ----------------------------------------------------------------------------------------


def _raised(error: Exception) -> Problem:
    return Problem(
        f"Pyro's own trace of the model raises {type(error).__name__} ({first_line(error)})",
        "the model has to run by itself, poutine.trace(model).get_trace(...), at all values of its "
        "latents",
    )


def _difference(
    runner: Runner, name: str, point: Seen, found: Mapping[str, Tensor], low: torch.dtype
) -> Problem:
    numbers = [
        f"{float(values[name].sum()):.6g}" if name in values else "no such site"
        for values in (point.log_probs, found)
    ]
    remedy = (
        "write it with torch functions of its arguments alone, without state that outlives a run"
    )
    if low != runner.dtype:
        remedy = (
            f"it was run in {runner.dtype} and computes something else there: give dtype={low}, or "
            "compute what NumPy and Python hold before the model, and pass it as an argument"
        )
    return Problem(
        f"site {name!r}: its log density is {numbers[0]} as it would be fitted, and {numbers[1]} in "
        "Pyro's own trace of the model at the same latents",
        remedy,
    )
