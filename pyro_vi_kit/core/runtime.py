"""The process-wide state of Pyro and torch, borrowed under one lock and given back as it was.

Pyro's handler stack is one module-level list, and the default dtype, the validation switch, the
parameter store and torch's random state are as global. Whatever runs a Pyro model does it inside
`isolated`; whatever draws random numbers does it inside a `RandomStream`. Both hold `LOCK`, so two
threads may fit at once without seeing each other. A process that is forked meanwhile has none of the
other threads: there, what they had borrowed is given back, and the lock is free.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, ClassVar

import pyro
import torch
from pyro import distributions, infer, poutine
from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK

from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.core.options import told

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
    if LOCK._is_owned():  # type: ignore[attr-defined]
        return  # by the thread that forked, which goes on in its block
    while _BORROWED:
        _BORROWED.pop()()
    LOCK._at_fork_reinit()  # type: ignore[attr-defined]
    users, _OneThread.users = _OneThread.users, min(1, _OneThread.nesting.depth)
    if users and not _OneThread.users:
        torch.set_num_threads(_OneThread.outer)


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


def default_dtype() -> torch.dtype:
    """The user's default dtype, and not the one that a fit in another thread has borrowed it for."""
    with LOCK:
        return torch.get_default_dtype()


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


def _generators() -> list[torch.Generator]:
    """The global generators of torch: the CPU's, and those of the CUDA devices once these are in use."""
    cuda = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    return [torch.default_generator, *cuda]


def random_state() -> list[bytes]:
    """What torch's global generators stand at: equal to an earlier one where nothing was drawn."""
    # Past the modes that a model runs under: they would take these tensors for the model's.
    with torch._C.DisableTorchFunction():
        return [generator.get_state().numpy().tobytes() for generator in _generators()]


class RandomStream:
    """Random numbers of its own: inside ``with stream:`` torch's global generators are this stream.

    The user's random state comes back on exit, and the next ``with`` goes on where this one stopped.
    That holds for the CPU's generator and for those of the CUDA devices.

    Args:
        seed: The same seed gives the same numbers on the same machine and device.
        *purpose: What is drawn. Other purposes have other numbers, whatever the seeds: see `seed_of`.
    """

    def __init__(self, seed: int, *purpose: str | int) -> None:
        self._seed = seed_of(seed, *purpose)
        self._states: list[torch.Tensor] = []
        self._outer: list[list[torch.Tensor]] = []

    def state(self) -> list[torch.Tensor]:
        """Where each generator stands, as bytes; none where nothing was drawn yet."""
        return [state.clone() for state in self._states]

    def restore(self, state: Sequence[torch.Tensor]) -> None:
        """Go on from `state`."""
        self._states = [generator.clone() for generator in state]

    def __enter__(self) -> RandomStream:
        LOCK.acquire()
        generators = _generators()
        outer = [generator.get_state() for generator in generators]
        self._outer.append(outer)
        _BORROWED.append(lambda: _set_states(generators, outer))
        for position, generator in enumerate(generators):
            if position < len(self._states):
                generator.set_state(self._states[position])
            else:
                generator.manual_seed(self._seed)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        generators = _generators()
        self._states = [generator.get_state() for generator in generators]
        _set_states(generators, self._outer.pop())
        _BORROWED.pop()
        LOCK.release()


def _set_states(generators: Sequence[torch.Generator], states: Sequence[torch.Tensor]) -> None:
    for generator, state in zip(generators, states, strict=False):
        generator.set_state(state)


# Each has a validation switch of its own.
_CHECKING: tuple[Any, ...] = (distributions, infer, poutine)


class _Users:
    """What the user's own code is run with, outside of all blocks of `isolated`; under `LOCK`."""

    blocks: ClassVar[int] = 0
    validation: ClassVar[bool] = True


def validated_by_user() -> bool:
    """Whether the user has not switched the checks of all distributions off; under `LOCK`."""
    return distributions.is_validation_enabled() if not _Users.blocks else _Users.validation


@contextlib.contextmanager
def validation(enabled: bool) -> Iterator[None]:
    """Pyro's and torch's checks on or off, under the lock: two threads would leave each other's."""
    with LOCK, pyro.validation_enabled(enabled):
        yield


@contextlib.contextmanager
def isolated(
    dtype: torch.dtype, device: torch.device | None = None, *, validate: bool = False
) -> Iterator[None]:
    """Run Pyro code alone: under the lock, with these defaults and this validation switch.

    Args:
        dtype: Becomes the default dtype, so that literals in the model take it too.
        device: Becomes the default device, for the same; None leaves it as it is.
        validate: Whether Pyro and torch check arguments and supports. Their messages are good, so the
            first run has them; the hot loop does not.
    """
    with LOCK:
        outer, torchs_own = torch.get_default_dtype(), torch.broadcast_shapes
        checks = [module.is_validation_enabled() for module in _CHECKING]
        handlers, dims = len(_PYRO_STACK), len(_DIM_ALLOCATOR._stack)

        def give_back() -> None:
            torch.broadcast_shapes = torchs_own
            torch.set_default_dtype(outer)
            for module, check in zip(_CHECKING, checks, strict=True):
                module.enable_validation(check)
            del _PYRO_STACK[handlers:], _DIM_ALLOCATOR._stack[dims:]
            _Users.blocks = 0

        with if_forked(give_back):
            _Users.validation = validated_by_user()
            _Users.blocks += 1
            torch.set_default_dtype(dtype)
            torch.broadcast_shapes = broadcast_shapes
            try:
                with pyro.validation_enabled(validate), default_device(device):
                    yield
            finally:
                _Users.blocks -= 1
                torch.broadcast_shapes = torchs_own
                torch.set_default_dtype(outer)


def default_device(device: torch.device | None) -> contextlib.AbstractContextManager[Any]:
    """A context in which tensors that are made without a device land on this one."""
    # A context of torch's costs each call of a torch function: none where tensors land there anyway.
    if device is None or torch.empty(0).device == device:
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


@contextlib.contextmanager
def private_params(state: Any = None) -> Iterator[Any]:
    """A parameter store of one's own; yields its state, which holds what was written on exit.

    Args:
        state: The state to start from, as `ParamStoreDict.get_state` gives it; empty when None.
    """
    store = pyro.get_param_store()
    with LOCK:
        outer = store.get_state()

        def give_back() -> None:
            store.clear()
            store.set_state(outer)

        with if_forked(give_back), store.scope(state) as inner:
            yield inner


class _Nesting(threading.local):
    """How many `one_thread` blocks this thread is in."""

    depth = 0


class _OneThread:
    """How many threads are in such a block, and how many threads torch had before the first."""

    nesting = _Nesting()
    users = 0
    outer = 1


@contextlib.contextmanager
def one_thread(wanted: bool = True) -> Iterator[None]:
    """Run torch on one thread: on tensors of a few thousand numbers more threads only wait.

    Torch keeps the number for each thread that calls it, and for threads yet to come, so each of them
    sets its own to 1 and back to what the first of them found.
    """
    if not wanted:
        yield
        return
    _enter_one_thread()
    try:
        yield
    finally:
        _leave_one_thread()


def _enter_one_thread() -> None:
    _OneThread.nesting.depth += 1
    if _OneThread.nesting.depth > 1:
        return
    with LOCK:
        # Asking first: a thread's first question sets its number, to what the process last set.
        before = torch.get_num_threads()
        if _OneThread.users == 0:
            _OneThread.outer = before
        _OneThread.users += 1
        torch.set_num_threads(1)


def _leave_one_thread() -> None:
    _OneThread.nesting.depth -= 1
    if _OneThread.nesting.depth > 0:
        return
    with LOCK:
        _OneThread.users -= 1
        torch.set_num_threads(_OneThread.outer)
