"""What Pyro and torch keep for the whole process, as a fit has it: dtype, random numbers, parameters.

The default dtype, torch's random state, the validation switch, Pyro's handler stack and its parameter
store are the process's. Whatever runs a Pyro model does it inside `isolated`; whatever draws random
numbers does it inside a `RandomStream`. What these set up is the thread's own (`per_thread`): other
threads see nothing of it, and two may fit at once. Models are run under `LOCK`, one at a time, since two
fits may share a user's module. In a process that is forked meanwhile the lock is free, and nothing of
other threads is left.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from pyro.distributions import util as distributions_util
from pyro.params.param_store import ParamStoreDict
from pyro.poutine.runtime import _DimAllocator, _EnumAllocator

from pyro_vi_kit.core import per_thread
from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.core.options import told
from pyro_vi_kit.core.per_thread import (
    HERE,
    Depth,
    Function,
    Swaps,
    default_dtype,
    having,
)

__all__ = ["default_dtype"]

LOCK = threading.RLock()

# How to give back what the thread that holds the lock has borrowed; the last goes first.
_BORROWED: list[Callable[[], None]] = []


@contextlib.contextmanager
def if_forked(give_back: Callable[[], None]) -> Iterator[None]:
    """Have this called in a process that another thread forks while this block is under way.

    Call it with `LOCK` held.
    """
    _BORROWED.append(give_back)
    try:
        yield
    finally:
        _BORROWED.pop()


def _after_fork() -> None:
    """In a forked process: have everything as if no other thread had ever been inside a block."""
    if not LOCK._is_owned():  # type: ignore[attr-defined]
        while _BORROWED:
            _BORROWED.pop()()
        LOCK._at_fork_reinit()  # type: ignore[attr-defined]
    Swaps.forget_other_threads()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def fresh_seed() -> int:
    """A seed from the operating system, for calls that were given none."""
    return secrets.randbits(31)


def seed_of(seed: int, *purpose: str | int) -> int:
    """The seed of one purpose, independent of the seeds of all others and of all other users' seeds.

    Sums would not do: ``seed + 1`` of one purpose is ``seed`` of another, and whatever is drawn anew to
    check a fit could repeat what it was trained on. Torch's generator on the CPU reads the lower 32
    bits alone, so that seeds 2^32 apart have to be told apart here too.

    Args:
        seed: A user's, or one made here.
        *purpose: What is drawn, and numbers that tell one such drawing from another.

    Returns:
        A number below 2^63.
    """
    words = repr((int(seed), *purpose)).encode()
    return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest()) >> 1


def generator_of(seed: int, *purpose: str | int) -> torch.Generator:
    """A generator on the CPU for one purpose: see `seed_of`."""
    return torch.Generator().manual_seed(seed_of(seed, *purpose))


def a_dtype(option: str, value: Any) -> torch.dtype:
    """A rule of `options.checks`: a precision that models are run in."""
    if not isinstance(value, torch.dtype) or value not in (torch.float32, torch.float64):
        raise OptionError(f"{option}= must be torch.float32 or torch.float64, got {told(value)}")
    return value


def require_memory(numbers: int, remedy: str) -> None:
    """Refuse to hold so many numbers, and three copies of them on the way, beyond what the machine has.

    Raises:
        OptionError: With the remedy.
    """
    needed, there = 4 * 8 * numbers, _memory()
    if needed > there:
        raise OptionError(
            f"{numbers:,} numbers take {needed / 1e9:,.0f} GB of memory with their copies, and this "
            f"machine has {there / 1e9:,.0f} GB: {remedy}"
        )


def _memory() -> float:
    """Bytes of memory that the machine has; infinite where it does not say."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return float("inf")


def random_state() -> list[bytes]:
    """What this thread's random numbers stand at: equal to an earlier one where nothing was drawn.

    In a `RandomStream` these are the stream's, else torch's global generators.
    """
    if HERE.streams:
        states = HERE.streams[-1].state()
    else:
        cuda = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
        states = [generator.get_state() for generator in (torch.default_generator, *cuda)]
    # Past the modes that a model runs under: they would take these tensors for the model's.
    with torch._C.DisableTorchFunction():
        return [state.numpy().tobytes() for state in states]


class RandomStream:
    """Random numbers of its own: inside ``with stream:`` all that this thread draws is of this stream.

    The next ``with`` goes on where this one stopped. That holds for numbers on the CPU and on CUDA
    devices.

    Args:
        seed: The same seed gives the same numbers on the same machine and device.
        *purpose: What is drawn. Other purposes have other numbers, whatever the seeds: see `seed_of`.
    """

    def __init__(self, seed: int, *purpose: str | int) -> None:
        self._seed = seed_of(seed, *purpose)
        self._generators: dict[torch.device, torch.Generator] = {}
        self._restored: list[torch.Tensor] = []
        self._mode: list[contextlib.AbstractContextManager[Any]] = []
        self._outer: list[tuple[Any, ...]] = []

    def state(self) -> list[torch.Tensor]:
        """Where each generator stands, as bytes; none where nothing was drawn yet."""
        states = [generator.get_state() for generator in self._generators.values()]
        return states + [state.clone() for state in self._restored[len(states) :]]

    def restore(self, state: Sequence[torch.Tensor]) -> None:
        """Go on from `state`."""
        self._generators, self._restored = {}, [one.clone() for one in state]

    def on(self, device: torch.device) -> torch.Generator:
        """The generator of a device."""
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if device not in self._generators:
            self._make(torch.device("cpu"))
            # All of them, so that the order of `state` says which is which.
            of_cuda = torch.cuda.device_count() if device.type == "cuda" else 0
            for one in [*(torch.device("cuda", index) for index in range(of_cuda)), device]:
                self._make(one)
        return self._generators[device]

    def _make(self, device: torch.device) -> None:
        if device in self._generators:
            return
        made, position = new_generator(device), len(self._generators)
        if position < len(self._restored):
            made.set_state(self._restored[position])
        else:
            made.manual_seed(self._seed)
        self._generators[device] = made

    def __enter__(self) -> RandomStream:
        self.on(torch.device("cpu"))
        self._outer.append(HERE.streams)
        HERE.streams = (*HERE.streams, self)
        self._mode.append(per_thread.under_defaults())
        self._mode[-1].__enter__()
        _SEEDING.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _SEEDING.__exit__(kind, error, trace)
        self._mode.pop().__exit__(kind, error, trace)
        HERE.streams = self._outer.pop()


def new_generator(device: torch.device) -> torch.Generator:
    """A generator on a device."""
    return torch.Generator(device)


def _own() -> torch.Generator:
    return HERE.streams[-1].on(torch.device("cpu"))


# What a model, or a data set's augmentation, may do about random numbers in a stream.
_SEEDING = Swaps(
    Function(torch, "manual_seed", lambda original: lambda seed: _own().manual_seed(int(seed))),
    Function(torch, "get_rng_state", lambda original: lambda: _own().get_state()),
    Function(torch, "set_rng_state", lambda original: lambda state: _own().set_state(state)),
)


def validated_by_user() -> bool:
    """Whether the user has not switched the checks of all distributions off."""
    return distributions_util._VALIDATION_ENABLED


@contextlib.contextmanager
def validation(enabled: bool) -> Iterator[None]:
    """Pyro's and torch's checks on or off, in this thread."""
    with per_thread.VALIDATION, having(validation=enabled):
        yield


@contextlib.contextmanager
def isolated(
    dtype: torch.dtype,
    device: torch.device | None = None,
    *,
    validate: bool = False,
    mode: contextlib.AbstractContextManager[Any] | None = None,
) -> Iterator[None]:
    """Run Pyro code alone: under the lock, with these defaults and this validation switch.

    Handlers that were entered around it do not reach inside: Pyro's stack does not say of which thread
    they are.

    Args:
        dtype: Becomes the default dtype, so that literals in the model take it too.
        device: Becomes the default device, for the same; None leaves it as it is.
        validate: Whether Pyro and torch check arguments and supports. Their messages are good, so the
            first run has them; the hot loop does not.
        mode: What there is in the place of `Defaults`, which costs each torch function a microsecond:
            what does more, or nothing for what is known to need none.
    """
    outermost = HERE.handlers is None
    handlers: dict[str, Any] = {}
    if outermost:
        handlers = {"handlers": [], "dims": _DimAllocator(), "enumerated": _EnumAllocator()}
    with (
        LOCK,
        _DEFAULTS,
        per_thread.HANDLERS,
        per_thread.VALIDATION,
        having(dtype=dtype, device=device or HERE.device, validation=validate, **handlers),
        mode or per_thread.under_defaults(),
        default_device(device),
    ):
        yield


def default_device(device: torch.device | None) -> contextlib.AbstractContextManager[Any]:
    """A context in which tensors that are made without a device land on this one."""
    # A context of torch's costs each call of a torch function: none where tensors land there anyway.
    if device is None or torch.empty(0, dtype=torch.int64).device == device:
        return contextlib.nullcontext()
    return device  # a torch.device is such a context


def broadcast_shapes(*shapes: int | Sequence[int]) -> torch.Size:
    """`torch.broadcast_shapes` for plain sizes; torch's own imports SymPy, a second of start-up."""
    sizes = [(shape,) if isinstance(shape, int) else tuple(shape) for shape in shapes]
    common = [1] * max(map(len, sizes), default=0)
    for shape in sizes:
        for position, size in enumerate(reversed(shape), start=1):
            if size != 1 and common[-position] not in (1, size):
                raise RuntimeError(
                    "Shape mismatch: objects cannot be broadcast to a single shape: "
                    + ", ".join(map(str, sizes))
                )
            if size != 1:
                common[-position] = size
    return torch.Size(common)


def _set_default_dtype(dtype: Any) -> None:
    HERE.dtype = dtype


_DEFAULTS = Swaps(
    Function(torch, "broadcast_shapes", lambda original: broadcast_shapes),
    Function(torch, "get_default_dtype", lambda original: default_dtype),
    Function(torch, "set_default_dtype", lambda original: _set_default_dtype),
)


@contextlib.contextmanager
def private_params(state: Any = None) -> Iterator[Any]:
    """A parameter store of one's own; yields its state, which holds what was written on exit.

    Args:
        state: The state to start from, as `ParamStoreDict.get_state` gives it; empty when None.
    """
    own = ParamStoreDict()
    own.set_state(inner := {"params": {}, "constraints": {}} if state is None else state)
    with per_thread.PARAMS, having(params=own):
        yield inner
        inner.update(own.get_state())


_NESTING = Depth()


@contextlib.contextmanager
def one_thread(wanted: bool = True) -> Iterator[None]:
    """Run torch on one thread: on tensors of a few thousand numbers more threads only wait."""
    if not wanted or _NESTING.depth:
        yield
        return
    before = torch.get_num_threads()
    _NESTING.depth += 1
    _set_own_threads(1)
    try:
        with Swaps.standing():
            yield
    finally:
        _NESTING.depth -= 1
        _set_own_threads(before)


def _set_own_threads(number: int) -> None:
    """Have this thread compute on so many.

    Torch keeps the number for each thread that calls it, and the last one that was set for those yet to
    come. So not torch is told but what it tells: OpenMP, and MKL where it is there. Where these cannot
    be called, threads that are started while a fit sets or takes back its number may have it too.
    """
    # Asking first: a thread's first question sets its number, to what the process last set.
    if number == torch.get_num_threads():
        return
    libraries = _libraries()
    if libraries is None:
        for_others = _in_new_thread(torch.get_num_threads)
        torch.set_num_threads(number)
        _in_new_thread(lambda: torch.set_num_threads(for_others))
        return
    for function in ("omp_set_num_threads", "MKL_Set_Num_Threads_Local"):
        if hasattr(libraries, function):
            getattr(libraries, function)(number)


@functools.cache
def _libraries() -> ctypes.CDLL | None:
    """The library of torch's that brings OpenMP with it; None where that cannot be found."""
    folder = Path(torch.__file__).with_name("lib")
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        with contextlib.suppress(OSError, AttributeError):
            found = ctypes.CDLL(str(folder / name))
            found.omp_set_num_threads  # noqa: B018  raises where there is none
            return found
    return None


def _in_new_thread(work: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]
