"""Run a model with its data, learned parameters and minibatch indices given from outside."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_vi_kit.core.device import device_of
from pyro_vi_kit.core.errors import ModelError, ViError
from pyro_vi_kit.core.runtime import (
    RandomStream,
    default_dtype,
    if_forked,
    isolated,
    private_params,
)
from pyro_vi_kit.model.log_density import supports
from pyro_vi_kit.model.log_density.compat import plain
from pyro_vi_kit.model.log_density.drawn import Drawn
from pyro_vi_kit.model.log_density.enumeration import Enumeration
from pyro_vi_kit.model.log_density.handlers import (
    ArgumentRows,
    Replay,
    misfits,
    rows_among,
    subsample_indices,
)
from pyro_vi_kit.model.log_density.initial import SPREADS
from pyro_vi_kit.model.log_density.precision import Precision
from pyro_vi_kit.model.log_density.raised import sparse, told
from pyro_vi_kit.model.model import Model


def placed(model: Model, device: torch.device) -> Model:
    """The model with all tensors among its arguments on this device; itself where they are."""
    leaves, spec = tree_flatten((model.args, dict(model.kwargs)))
    if all(leaf.device == device for leaf in leaves if isinstance(leaf, Tensor)):
        return model
    moved = [leaf.to(device) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    args, kwargs = tree_unflatten(moved, spec)
    return model.with_args(*args, **kwargs)


@contextlib.contextmanager
def swapped_parameters(swaps: Mapping[tuple[nn.Module, str], Tensor]) -> Iterator[None]:
    """Put these tensors in the place of modules' parameters, and the user's own back on exit."""
    outer = {(module, name): module._parameters[name] for module, name in swaps}

    def give_back() -> None:
        for (module, name), tensor in outer.items():
            module._parameters[name] = tensor

    with if_forked(give_back):
        for (module, name), tensor in swaps.items():
            module._parameters[name] = tensor  # type: ignore[assignment]
        try:
            yield
        finally:
            give_back()


class Runner:
    """Runs one model in one precision and on one device, under a `Replay`.

    Args:
        model: The model and its data.
        dtype: Precision that floating arguments are cast to.
        device: Where all tensors are put; where the model's arguments are when None.
        drawn: Discrete latents that are not summed out.

    Raises:
        ModelError: If an argument is sparse.

    Attributes:
        data: The tensors among the model's arguments, cast.
        owners: The name of each learned parameter that a module holds, by module and attribute.
        nesting: Batch dims that plates and stray dims take; set before sites are enumerated.
        guarded: Sites whose density is zero where it is not defined; see `Replay`.
        outer: The user's default dtype.
        precision: Converts what the model closes over, and what it names a dtype for; None once that is
            known to need no conversion.
        centre: The unconstrained point around which the model is tried; the origin where empty.
        initial: The same point in constrained values.
        spread: How far from it, in unconstrained space.
        at_hand: Plates of which the arguments hold the subsample that they declare, as the
            ``pyro.plate("data", size, len(x))`` of a model that is called on a minibatch.
        sliced: N of plates whose minibatches are rows of the arguments, since no index selects them.
    """

    def __init__(
        self,
        model: Model,
        dtype: torch.dtype,
        device: torch.device | None = None,
        drawn: Drawn | None = None,
    ) -> None:
        self.model = model
        self.drawn = drawn
        self.dtype = dtype
        self._leaves, self._spec = tree_flatten((model.args, dict(model.kwargs)))
        if any(isinstance(t, Tensor) and t.layout != torch.strided for t in self._leaves):
            raise ModelError(sparse(model))
        self.device = device_of(self._leaves) if device is None else device
        self.data = [self.cast(leaf) for leaf in self._leaves if isinstance(leaf, Tensor)]
        self.owners: dict[tuple[nn.Module, str], str] = {}
        self.nesting = 0
        self.guarded: frozenset[str] = frozenset()
        self.outer = default_dtype()
        self.precision: Precision | None = Precision(dtype, self.device, self.outer)
        self.centre: dict[str, Tensor] = {}
        self.initial: dict[str, Tensor] = {}
        self.spread = SPREADS[0]
        self.at_hand: frozenset[str] = frozenset()
        self.sliced: dict[str, int] = {}
        self._streamed_rows = None if model.stream is None else model.stream.rows

    def run_on_copies(self) -> None:
        """Give each run copies of what the model writes into, so that all runs are like the first."""
        if self.precision is not None:
            self.precision.copies = self.precision.met = True

    def holding(self, data: Sequence[Tensor]) -> Runner:
        """The same runner with these tensors as its own data."""
        other = copy.copy(self)
        other.data = list(data)
        return other

    def cast(self, leaf: Any) -> Any:
        """A tensor on this device, a floating one detached and in this precision; else as it is."""
        if not isinstance(leaf, Tensor):
            return leaf
        floating = leaf.is_floating_point()
        return leaf.detach().to(self.device, self.dtype) if floating else leaf.to(self.device)

    def arguments(
        self, data: Sequence[Tensor] | None = None, model: Model | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The positional and keyword arguments: with these tensors, or those of another model."""
        if model is not None:
            leaves, spec = tree_flatten((model.args, dict(model.kwargs)))
            return tree_unflatten([self.cast(leaf) for leaf in leaves], spec)
        tensors = iter(self.data if data is None else data)
        leaves = [next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        return tree_unflatten(leaves, self._spec)

    def own_arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The user's own arguments, not cast."""
        return tree_unflatten(self._leaves, self._spec)

    @property
    def own_device(self) -> torch.device:
        """Where the user's own arguments are."""
        return device_of(self._leaves)

    @contextlib.contextmanager
    def as_written(self) -> Iterator[None]:
        """The plates' rows as in `run`, and copies of what is written into; nothing else of ours."""
        copies = self.precision is not None and self.precision.copies
        own = Precision(None, self.own_device, copies=True) if copies else contextlib.nullcontext()
        with subsample_indices({}, None, self._streamed_rows, self.at_hand), own:
            yield

    @contextlib.contextmanager
    def isolated(self, *, validate: bool = False) -> Iterator[None]:
        """Alone with Pyro, in this precision and on this device."""
        nothing = contextlib.nullcontext()
        with (
            isolated(self.dtype, self.device, validate=validate),
            self.precision or nothing,
            nothing if validate else plain(),
        ):
            yield

    def run(
        self,
        replay: Replay,
        params: Mapping[str, Tensor],
        data: Sequence[Tensor] | None = None,
        index: Mapping[str, Tensor] | None = None,
        model: Model | None = None,
    ) -> None:
        """Run the model under ``replay``, which keeps what it saw. Call it inside `isolated`."""
        if self.precision is not None:
            self.precision.forget()
        sliced = {name: size for name, size in self.sliced.items() if name in (index or {})}
        if index and sliced:
            data = rows_among(self.data if data is None else data, sliced, index)
            index = {name: rows for name, rows in index.items() if name not in sliced}
        args, kwargs = self.arguments(data, model)
        replay.params, replay.drawn, replay.guarded = params, self.drawn, self.guarded
        # Inside of the replay, which sees a discrete site with all its values.
        discrete = (
            Enumeration(self.nesting, self.drawn) if replay.enumerate else contextlib.nullcontext()
        )
        given = ArgumentRows(sliced)
        supports.taken()  # those of an earlier run are none of this one's
        with self._handlers(params, index, replay.declared), replay, discrete, given:
            self.model.fn(*args, **kwargs)
        supports.taken()

    def learned(self, params: Mapping[str, Tensor]) -> contextlib.AbstractContextManager[None]:
        """A context in which the user's modules hold these parameters instead of their own."""
        return swapped_parameters({key: params[name] for key, name in self.owners.items()})

    @contextlib.contextmanager
    def _handlers(
        self,
        params: Mapping[str, Tensor],
        index: Mapping[str, Tensor] | None,
        declared: dict[str, int],
    ) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            rows = self._streamed_rows
            stack.enter_context(subsample_indices(index or {}, declared, rows, self.at_hand))
            if params:
                # A PyroModule writes its parameters into the store by itself.
                stack.enter_context(private_params())
                stack.enter_context(self.learned(params))
                # Parameters without a gradient are held fixed here on purpose.
                stack.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("ignore", message=".*was not registered in the param store")
            yield

    # -- first runs, before anything is known about the model ---------------------------------

    @contextlib.contextmanager
    def first_runs(self, seed: int = 0) -> Iterator[None]:
        """Validation on, a copy of the user's parameter store, random numbers of their own."""
        state: dict = dict(pyro.get_param_store().get_state())
        with (
            RandomStream(seed),
            self.isolated(validate=True),
            private_params(state),
        ):
            yield

    def try_run(self, replay: Replay) -> None:
        """Run the model with parameters as it makes them; inside `first_runs`.

        A plate that declares a subsample is run on all of its rows, unless the model fails there and
        runs on as many as it declares: its arguments are a minibatch then.

        Raises:
            ModelError: If the model raises.
        """
        try:
            self._try(replay)
        except ModelError:
            if not self._is_minibatch(replay):
                raise
            self._try(replay)
        else:
            if misfits(replay.visits, replay.declared) and self._is_minibatch(replay):
                self._try(replay)

    def _is_minibatch(self, replay: Replay) -> bool:
        """Whether plates have the subsample that they declare in the arguments; sets `at_hand`."""
        declared, before = dict(replay.declared), self.at_hand
        singly = [frozenset([name]) for name in declared if name not in before]
        for names in [*singly, frozenset(declared)] if singly else []:
            self.at_hand = before | names
            trial = Replay()
            with contextlib.suppress(ModelError):
                self._try(trial)
                if not misfits(trial.visits, trial.declared):
                    replay.visits.clear()
                    replay.param_visits.clear()
                    return True
        self.at_hand = before
        return False

    def _try(self, replay: Replay) -> None:
        try:
            self.run(replay, {})
        except ViError:
            raise
        except Exception as error:
            raise ModelError(told(error, self.model, replay.visits)) from error
