"""A fit under way in one file, from which it goes on with exactly the same numbers.

The file holds tensors, numbers and text, is read with ``weights_only``, and so can never run code. It
is written in one piece and sealed (`files`): whenever the process dies, the file is either the old or
the new one, and one that is damaged is refused.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vi_kit.core import files
from pyro_vi_kit.core.errors import FileError, OptionError, ViError, first_line

_FORMAT = 2
_KIND = "pyro_vi_kit checkpoint"
# Seconds between two writes; what a killed process loses at the most.
_EVERY = 30.0

State = dict[str, Any]


class Saved(NamedTuple):
    """What a file holds.

    Attributes:
        identity: The request, in plain words and numbers.
        state: Where the fit was.
        seconds: Wall time that it had taken.
    """

    identity: dict[str, Any]
    state: State
    seconds: float


class Checkpoint:
    """Where a fit keeps its state.

    Args:
        path: The file.
        identity: The request, in plain words and numbers.
        saved: What the file holds already, of the same request.

    Attributes:
        state: Where to go on from; None for a fit that begins.
        facts: What else the file is to keep, plain values; what it has kept where it goes on.
        seconds: Wall time that the fit had taken when it was stopped.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], saved: Saved | None) -> None:
        self.path = path
        # A relative path is of the folder that the process is in now.
        self._target = files.check_writable(path)
        self.identity = dict(identity)
        self.state: State | None = None if saved is None else saved.state
        self.facts: dict[str, Any] = {} if saved is None else saved.state["facts"]
        self.seconds = 0.0 if saved is None else saved.seconds
        self._began = self._written = time.monotonic()
        self._marked: State | None = None
        self._losses: list[float] = []
        self._length = 0

    def mark(self, state: Callable[[], State], losses: list[float], now: bool = False) -> None:
        """Keep a state in memory, and write it when the last write is long enough ago.

        Args:
            state: Gives the state; its tensors must not change afterwards.
            losses: Of all steps; may grow at its end afterwards.
            now: Write it in any case.
        """
        self._marked, self._losses, self._length = state(), losses, len(losses)
        if now or time.monotonic() - self._written >= _EVERY:
            self.write()

    def write(self) -> None:
        """Write what was marked last, if anything was.

        Raises:
            FileError: If the file cannot be written.
        """
        if self._marked is None:
            return
        losses = torch.tensor(self._losses[: self._length], dtype=torch.float64)
        content = {
            "kind": _KIND,
            "format": _FORMAT,
            "identity": self.identity,
            "state": cloned(self._marked, "cpu") | {"losses": losses, "facts": self.facts},
            "seconds": self.seconds + time.monotonic() - self._began,
        }
        memory = io.BytesIO()
        torch.save(content, memory)
        files.write(self._target, files.sealed(memory.getvalue()))
        self._written = time.monotonic()

    @contextlib.contextmanager
    def restoring(self) -> Iterator[None]:
        """Around what goes on from `state`.

        Raises:
            FileError: If the state is none that a fit can go on from.
        """
        try:
            yield
        except ViError:
            raise
        except Exception as error:  # whatever a part says that is missing or of another kind
            raise _damaged(self.path, error) from error


def read(path: str | Path) -> Saved | None:
    """What a checkpoint holds; None where there is no file yet.

    Raises:
        FileError: If the file is none, is damaged, or its folder cannot be written to.
        OptionError: If ``path`` is no path.
    """
    if not isinstance(path, str | Path):
        raise OptionError(f"checkpoint= takes the path of a file, got {type(path).__name__}")
    path = files.check_writable(path)
    if not path.exists():
        return None
    try:
        content, whole = files.unsealed(path.read_bytes(), path)
        if not whole:
            raise ValueError("it has no checksum at its end")
        content = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        kind, form = content["kind"], content["format"]
        saved = Saved(*(content[name] for name in Saved._fields))
        parts = (saved.identity, saved.state, saved.state["facts"], saved.state["losses"])
        if not all(map(isinstance, parts, (dict, dict, dict, Tensor))):
            raise TypeError("a part of it is of another kind")
        saved = saved._replace(seconds=float(saved.seconds))
    except FileError:
        raise
    except Exception as error:
        raise _damaged(path, error) from error
    if kind != _KIND:
        raise FileError(f"{path} is no checkpoint of pyro_vi_kit: name another file")
    if form != _FORMAT:
        raise FileError(
            f"{path} has format {form}, this version reads {_FORMAT}: go on with the version that wrote "
            "it, or delete it to begin anew"
        )
    return saved


def _damaged(path: Path, error: Exception) -> FileError:
    return FileError(
        f"{path} is no checkpoint, or a damaged one ({type(error).__name__}: {first_line(error)}): "
        "delete it to begin anew, or name another file"
    )


def cloned(value: Any, device: str | None = None) -> Any:
    """A deep copy of nested dicts, lists and tuples with their tensors, each in a storage of its own.

    Args:
        value: What to copy.
        device: Where the tensors of the copy are; where the original's are when None.
    """
    if isinstance(value, Tensor):
        value = value.detach()
        return value.clone() if device is None else value.to(device, copy=True)
    if isinstance(value, Mapping):
        return {key: cloned(part, device) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(cloned(part, device) for part in value)
    return value
