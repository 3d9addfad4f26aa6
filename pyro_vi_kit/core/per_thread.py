"""What torch and Pyro keep once for the whole process, kept for one thread while it is inside a fit.

The default dtype, the random state, the validation switches, the handler stack and the parameter store
are the process's in torch and Pyro. Other threads must not see what a fit makes of them. Three means do:

- what torch functions take from defaults (a dtype, random numbers) they are given by `Defaults`, a
  `TorchFunctionMode`, of which each thread has its own stack;
- functions of torch and Pyro that read process-wide state are replaced, for the time of a fit, by ones
  that ask which thread they are in and do for others what they always did (`swapped`);
- Pyro's own objects are for that time of a class whose attributes are the thread's own (`diverted`).

`runtime` says when; nothing here is changed at import.
"""

from __future__ import annotations

import contextlib
import functools
import re
import threading
import warnings
from collections import UserList
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from pyro.distributions import util as distributions_util
from pyro.infer import util as infer_util
from pyro.params.param_store import ParamStoreDict
from pyro.poutine import collapse_messenger, messenger, runtime
from pyro.poutine import util as poutine_util
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.distributions import Distribution
from torch.nn import functional
from torch.overrides import TorchFunctionMode

process_default_dtype = torch.get_default_dtype
"""The default dtype that all threads share, whatever this one has of its own."""


class Stream(Protocol):
    """Random numbers of a thread's own."""

    def on(self, device: torch.device) -> torch.Generator:
        """The generator of a device."""
        ...

    def state(self) -> list[Tensor]:
        """Where each generator stands."""
        ...


class Here(threading.local):
    """What this thread has of its own; None where it has what the process has.

    Attributes:
        dtype: The default dtype.
        device: Where tensors land that are made without a device, as far as random numbers matter.
        streams: Where random numbers come from, the last one first.
        validation: Whether Pyro and torch check arguments.
        params: Pyro's parameter store.
        handlers: Pyro's handler stack, with the dims of plates and of enumerated sites.
        modes: How many `Defaults` this thread is under.
        gave_dtype: Whether a torch function has taken its dtype from here, or may have.
        standing: How many `Swaps.standing` this thread is in.
    """

    dtype: torch.dtype | None = None
    device: torch.device | None = None
    streams: tuple[Stream, ...] = ()
    validation: bool | None = None
    params: ParamStoreDict | None = None
    handlers: list[Any] | None = None
    dims: Any = None
    enumerated: Any = None
    modes: int = 0
    gave_dtype: bool = False
    standing: int = 0


HERE = Here()


def default_dtype() -> torch.dtype:
    """The default dtype of this thread."""
    return HERE.dtype or process_default_dtype()


@contextlib.contextmanager
def having(**values: Any) -> Iterator[None]:
    """Have these in this thread: attributes of `Here`."""
    before = {name: getattr(HERE, name) for name in values}
    HERE.__dict__.update(values)
    try:
        yield
    finally:
        HERE.__dict__.update(before)


# -- what torch functions take from defaults --------------------------------------------------

# Floating, whatever they are asked for.
_FLOATING = (
    torch.zeros, torch.ones, torch.empty, torch.eye, torch.linspace, torch.logspace,
    torch.scalar_tensor, torch.hann_window, torch.hamming_window, torch.blackman_window,
    torch.bartlett_window, torch.kaiser_window, torch.fft.fftfreq, torch.fft.rfftfreq,
    torch.rand, torch.randn,
)  # fmt: skip
# Floating where they are made of Python's floats.
_INFERRED = (
    torch.tensor, torch.as_tensor, torch.asarray, torch.full, torch.arange, torch.range,
    Tensor.new_tensor,
)  # fmt: skip
_RANDOM = (
    torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal, torch.bernoulli,
    torch.multinomial, torch.poisson, torch.binomial, torch._standard_gamma, torch._sample_dirichlet,
    torch.rand_like, torch.randn_like, torch.randint_like, Tensor.bernoulli, Tensor.multinomial,
    Tensor.normal_, Tensor.uniform_, Tensor.exponential_, Tensor.cauchy_, Tensor.geometric_,
    Tensor.log_normal_, Tensor.random_, Tensor.bernoulli_,
)  # fmt: skip
_LIKE = {torch.rand_like: torch.rand, torch.randn_like: torch.randn}
# These draw from the process's generator and from no other.
_UNSEEDED = (
    torch.dropout, torch.dropout_, torch.alpha_dropout, torch.feature_dropout, torch.rrelu,
    torch.feature_alpha_dropout, torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu,
    torch.svd_lowrank, torch.pca_lowrank, functional.dropout, functional.dropout1d,
    functional.dropout2d, functional.dropout3d, functional.alpha_dropout,
    functional.feature_alpha_dropout, functional.gumbel_softmax, functional.rrelu,
    functional.scaled_dot_product_attention, functional.multi_head_attention_forward,
    functional.fractional_max_pool2d_with_indices, functional.fractional_max_pool3d_with_indices,
)  # fmt: skip
_RULES = frozenset((*_FLOATING, *_INFERRED, *_RANDOM, *_UNSEEDED))
_CASTS = frozenset((Tensor.to, Tensor.type, Tensor.half, Tensor.bfloat16, Tensor.float))


class Defaults(TorchFunctionMode):
    """Gives torch functions this thread's default dtype and random numbers."""

    def __enter__(self) -> Any:
        HERE.modes += 1
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        HERE.modes -= 1

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return called(func, args, kwargs or {})


def under_defaults() -> contextlib.AbstractContextManager[Any]:
    """`Defaults`, where this thread is not under one."""
    return contextlib.nullcontext() if HERE.modes else Defaults()


def called(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A torch function's result with this thread's defaults."""
    if func in _RULES or "generator" in kwargs:
        return _by_rule(func, args, kwargs)
    result = func(*args, **kwargs)
    dtype = HERE.dtype
    if dtype is None or not isinstance(result, Tensor) or result.dtype is dtype:
        return result
    shared = process_default_dtype()
    if dtype is shared or result.dtype not in _both(shared) or func in _CASTS:
        return result
    return _promoted(func, args, kwargs, result, dtype)


def _by_rule(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What makes tensors out of nothing, or random numbers."""
    if HERE.streams and func in _UNSEEDED:
        return _lent(func, args, kwargs)
    given = dict(kwargs)
    free = given.get("dtype") is None and given.get("out") is None
    dtype = HERE.dtype if free else None
    makes = func in _FLOATING or (func is torch.normal and next(_tensors(args), None) is None)
    if dtype is not None and makes:
        given["dtype"] = dtype
        HERE.gave_dtype = True
    if HERE.streams and (func in _RANDOM or "generator" in given):
        if given.get("generator") in (None, torch.default_generator):
            args = args[:-1] if args and args[-1] is None else args
            given["generator"] = HERE.streams[-1].on(_device_of(args, given))
        if func in _LIKE and peek_interpreter_stack() is not None:
            # vmap has no rule for one with a generator.
            like = {"dtype": args[0].dtype, "device": args[0].device} | _named(given)
            return _LIKE[func](*args[1:], args[0].shape, **like)
    result = func(*args, **given)
    return result if dtype is None else _inferred(func, args, given, result, dtype)


def _named(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if value is not None}


def _device_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.device:
    """Where a function's result will be."""
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"])
    return next((t.device for t in _tensors(args)), HERE.device or torch.device("cpu"))


def drawn(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any], device: torch.device) -> Tensor:
    """Random numbers of this thread by an ATen operation, whose arguments lack the generator."""
    if takes_generator(op):
        own = HERE.streams[-1].on(device) if HERE.streams else None
        return op(*args, **kwargs, generator=own)
    return _lent(op, args, kwargs) if HERE.streams else op(*args, **kwargs)


def takes_generator(op: Any) -> bool:
    """Whether an ATen operation may be given a generator."""
    return any(argument.name == "generator" for argument in op._schema.arguments)


def generator_here(device: torch.device) -> torch.Generator:
    """Where this thread's random numbers on a device come from."""
    if HERE.streams:
        return HERE.streams[-1].on(device)
    if device.type != "cuda":
        return torch.default_generator
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index]


def _lent(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call what knows the process's generator alone, with that at this thread's state meanwhile."""
    shared, own = torch.default_generator, HERE.streams[-1].on(torch.device("cpu"))
    outer = shared.get_state()
    shared.set_state(own.get_state())
    try:
        return func(*args, **kwargs)
    finally:
        own.set_state(shared.get_state())
        shared.set_state(outer)


def _inferred(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any, dtype: torch.dtype
) -> Any:
    """A tensor made of Python's numbers, in this thread's default dtype where torch took its own."""
    shared = process_default_dtype()
    if func not in _INFERRED or result.dtype not in _both(shared):
        return result
    values = args[1:] if func is Tensor.new_tensor else (*args, kwargs.get("data"))
    if any(isinstance(value, Tensor | np.ndarray | np.generic) for value in values):
        return result
    # One without numbers, as Pyro's plates ask for a device with, has no precision.
    HERE.gave_dtype = HERE.gave_dtype or bool(result.numel())
    if dtype is shared:
        return result
    wanted = dtype.to_complex() if result.dtype.is_complex else dtype
    return func(*args, **{**kwargs, "dtype": wanted})


def _promoted(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor, dtype: torch.dtype
) -> Tensor:
    """What integers and Python's floats make together: ``n / 2``, ``n.sqrt()``, ``where(c, 1.0, 0.0)``.

    torch takes the process's default dtype for it. It is computed again with the integers cast.
    """
    everything = (*args, *kwargs.values())
    exact = (torch.dtype, np.ndarray)
    if any(isinstance(value, exact) for value in everything) or any(
        tensor.is_floating_point() or tensor.is_complex() for tensor in _tensors(everything)
    ):
        return result
    HERE.gave_dtype = True
    condition = func in (torch.where, Tensor.where)

    def cast(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value if condition and value.dtype is torch.bool else value.to(dtype)
        if condition and isinstance(value, float):
            return torch.tensor(value, dtype=dtype, device=result.device)
        if isinstance(value, tuple | list):
            return type(value)(map(cast, value))
        return value

    return func(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})


def _both(dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """Of real numbers and of complex ones."""
    return dtype, dtype.to_complex()


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


# -- warnings ---------------------------------------------------------------------------------


class _InThisThread:
    """The message of a warnings filter: matches in the thread that made it alone."""

    def __init__(self, message: str) -> None:
        self._pattern, self._thread = re.compile(message, re.IGNORECASE), threading.get_ident()

    def match(self, text: str) -> bool:
        return threading.get_ident() == self._thread and self._pattern.match(text) is not None


@contextlib.contextmanager
def warnings_here(
    action: str, message: str = "", category: type[Warning] = Warning
) -> Iterator[None]:
    """`warnings.filterwarnings` for a block, in this thread alone; filters are the process's.

    Args:
        action: ``ignore`` or ``error``.
        message: What the warning begins with, a regular expression.
        category: Its kind.
    """
    # A filter's message may be anything that has the method `match`.
    entry: Any = (action, _InThisThread(message), category, None, 0)
    warnings.filters.insert(0, entry)  # type: ignore[attr-defined]
    _filters_mutated()
    try:
        yield
    finally:
        # Somebody else's `catch_warnings` may have had another list meanwhile.
        with contextlib.suppress(ValueError):
            warnings.filters.remove(entry)  # type: ignore[attr-defined]
        _filters_mutated()


def _filters_mutated() -> None:
    """Have it looked at again what has been warned of once: adding a filter does."""
    with warnings.catch_warnings():
        pass


# -- what reads process-wide state ------------------------------------------------------------


class Depth(threading.local):
    """How many contexts of a kind this thread is in."""

    depth = 0


class Swap(Protocol):
    """Something that is put in another's place."""

    def put(self, inside: Depth) -> None:
        """Put it there; what finds ``inside.depth`` at zero has what was there before."""
        ...

    def take_back(self) -> None:
        """Have it as it was."""
        ...


class Swaps:
    """What a thread finds in other things' places while it is in this context.

    It is there while any thread is inside, and is for all others what it stands for.
    """

    _all: ClassVar[list[Swaps]] = []

    def __init__(self, *swaps: Swap) -> None:
        self._all.append(self)
        self._swaps = swaps
        self._lock = threading.Lock()
        self._inside = Depth()
        self._users = 0

    def __enter__(self) -> None:
        self._inside.depth += 1
        if self._inside.depth == 1:
            self._stay()

    def __exit__(self, *error: Any) -> None:
        self._inside.depth -= 1
        if not self._inside.depth:
            self._leave()

    @classmethod
    @contextlib.contextmanager
    def standing(cls) -> Iterator[None]:
        """All of them stay in place, which saves who enters often the work; nobody is inside for it."""
        HERE.standing += 1
        for one in cls._all:
            one._stay()
        try:
            yield
        finally:
            for one in cls._all:
                one._leave()
            HERE.standing -= 1

    def _stay(self) -> None:
        with self._lock:
            self._users += 1
            if self._users == 1:
                for swap in self._swaps:
                    swap.put(self._inside)

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._take_back()

    def _take_back(self) -> None:
        for swap in reversed(self._swaps):
            swap.take_back()

    @classmethod
    def forget_other_threads(cls) -> None:
        """In a forked process: no other thread is inside of any."""
        for one in cls._all:
            one._lock = threading.Lock()
            users, one._users = one._users, min(1, one._inside.depth) + HERE.standing
            if users and not one._users:
                one._take_back()


class Function:
    """Another function in the place of one of a module or class.

    Args:
        owner: The module or class.
        name: What it is called there.
        ours: Makes the other function from the one that is there.
    """

    def __init__(self, owner: Any, name: str, ours: Callable[[Any], Callable[..., Any]]) -> None:
        self._owner, self._name, self._ours = owner, name, ours
        self._old: Any = None
        self._new: Any = None

    def put(self, inside: Depth) -> None:
        """See `Swap`."""
        old = vars(self._owner)[self._name]
        if old is not self._old:
            self._old = old
            new = _either(inside, self._ours, getattr(self._owner, self._name))
            self._new = staticmethod(new) if isinstance(old, staticmethod) else new
        setattr(self._owner, self._name, self._new)

    def take_back(self) -> None:
        """See `Swap`; what somebody else has put there meanwhile stays."""
        if vars(self._owner).get(self._name) is self._new:
            setattr(self._owner, self._name, self._old)


def _either(
    inside: Depth, ours: Callable[[Any], Callable[..., Any]], original: Any
) -> Callable[..., Any]:
    """One of two functions, by thread."""
    other = ours(original)

    @functools.wraps(original)
    def either(*args: Any, **kwargs: Any) -> Any:
        return (other if inside.depth else original)(*args, **kwargs)

    return either


class Value:
    """Another value of an attribute, which knows by itself which thread asks."""

    def __init__(self, owner: Any, name: str, new: Any) -> None:
        self._owner, self._name, self._new = owner, name, new
        self._old: Any = None

    def put(self, inside: Depth) -> None:
        """See `Swap`."""
        found = getattr(self._owner, self._name)
        self._old = vars(self._owner).get(self._name, found)
        setattr(self._owner, self._name, self._new)

    def take_back(self) -> None:
        """See `Swap`."""
        setattr(self._owner, self._name, self._old)


class _ValidateArgs:
    """``Distribution._validate_args``, of this thread or of the process; also its own `Swap`."""

    shared: bool

    def __get__(self, instance: Any, owner: Any = None) -> bool:
        return self.shared if HERE.validation is None else HERE.validation

    def put(self, inside: Depth) -> None:
        self.shared = Distribution._validate_args
        Distribution._validate_args = self  # type: ignore[assignment]

    def take_back(self) -> None:
        if vars(Distribution)["_validate_args"] is self:
            Distribution._validate_args = self.shared

    def set(self, value: bool) -> None:
        """What ``Distribution.set_default_validate_args`` does."""
        if value not in (True, False):
            raise ValueError
        if HERE.validation is not None:
            HERE.validation = value
        elif isinstance(vars(Distribution)["_validate_args"], _ValidateArgs):
            self.shared = value
        else:
            Distribution._validate_args = value


# The code of these two functions stands in for that of Pyro's own ones, which many of its modules have
# imported by name: it runs with the globals of Pyro's module.
_VALIDATION_ENABLED = True


def _is_validation_enabled() -> bool:
    from pyro_vi_kit.core.per_thread import HERE

    return _VALIDATION_ENABLED if HERE.validation is None else HERE.validation


def _enable_validation(is_validate: bool) -> None:
    from pyro_vi_kit.core.per_thread import HERE, VALIDATE_ARGS

    global _VALIDATION_ENABLED  # noqa: PLW0603  of Pyro's module
    if HERE.validation is not None:
        HERE.validation = is_validate
        return
    _VALIDATION_ENABLED = is_validate
    if "torch_dist" in globals():  # in pyro.distributions.util
        VALIDATE_ARGS.set(is_validate)


class _Handlers(UserList):
    """Pyro's handler stack, this thread's or that of the process."""

    def __init__(self) -> None:
        self._shared = runtime._PYRO_STACK

    @property
    def data(self) -> list[Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The stack."""
        return self._shared if HERE.handlers is None else HERE.handlers

    def __getitem__(self, where: Any) -> Any:
        return self.data[where]

    def __reversed__(self) -> Iterator[Any]:
        return reversed(self.data)


def _diverted(shared: Any, own: str, *names: str) -> Value:
    """One of Pyro's objects with attributes that are those of ``HERE``'s object in this thread."""

    def attribute(name: str) -> property:
        def values(self: Any) -> dict[str, Any]:
            there = getattr(HERE, own)
            return vars(self if there is None else there)

        def get(self: Any) -> Any:
            try:
                return values(self)[name]
            except KeyError:
                raise AttributeError(name) from None

        def put(self: Any, value: Any) -> None:
            values(self)[name] = value

        return property(get, put)

    kind = type(shared)
    return Value(
        shared, "__class__", type(kind.__name__, (kind,), {name: attribute(name) for name in names})
    )


VALIDATE_ARGS = _ValidateArgs()
_SWITCHES = (distributions_util, infer_util, poutine_util)

VALIDATION = Swaps(
    VALIDATE_ARGS,
    Value(Distribution, "set_default_validate_args", staticmethod(VALIDATE_ARGS.set)),
    *(
        Value(getattr(module, old.__name__.lstrip("_")), "__code__", old.__code__)
        for module in _SWITCHES
        for old in (_is_validation_enabled, _enable_validation)
    ),
)
"""The validation switches."""

PARAMS = Swaps(
    _diverted(runtime._PYRO_PARAM_STORE, "params", "_params", "_param_to_name", "_constraints")
)
"""The parameter store."""

HANDLERS = Swaps(
    *(
        Value(module, "_PYRO_STACK", handlers)
        for handlers in [_Handlers()]
        for module in (runtime, messenger, collapse_messenger)
    ),
    _diverted(runtime._DIM_ALLOCATOR, "dims", "_stack"),
    _diverted(
        runtime._ENUM_ALLOCATOR,
        "enumerated",
        "next_available_dim",
        "next_available_id",
        "dim_to_id",
    ),
)
"""Pyro's handler stack, and the dims that its plates and enumerated sites have."""
