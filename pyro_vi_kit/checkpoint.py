"""A fit under way in one file, from which it goes on with exactly the same numbers.

The file holds tensors, numbers and text, is read with ``weights_only``, and so can never run code. It
is written beside its place and moved there in one step: whenever the process dies, the file is either
the old or the new one.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vi_kit.errors import FileError, OptionError, first_line

_FORMAT = 1
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
        identity: The request, in plain words and numbers; only the same one goes on.
        saved: What the file holds already.

    Attributes:
        state: Where to go on from; None for a fit that begins.
        facts: What else the file is to keep, plain values; what it has kept where it goes on.
        seconds: Wall time that the fit had taken when it was stopped.

    Raises:
        OptionError: If the file is of another request; names what differs.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], saved: Saved | None) -> None:
        self.path = path
        self.identity = dict(identity)
        if saved is not None:
            _require_same(path, saved.identity, self.identity)
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
        _replace(self.path, content)
        self._written = time.monotonic()


def read(path: str | Path) -> Saved | None:
    """What a checkpoint holds; None where there is no file yet.

    Raises:
        FileError: If the file is none, is damaged, or its folder cannot be written to.
        OptionError: If ``path`` is no path.
    """
    if not isinstance(path, str | Path):
        raise OptionError(f"checkpoint= takes the path of a file, got {type(path).__name__}")
    path = Path(path)
    if not os.access(path.absolute().parent, os.W_OK) or path.is_dir():
        raise FileError(f"cannot write checkpoint {path}: it needs a folder that can be written to")
    if not path.exists():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise FileError(
            f"{path} is no checkpoint, or a damaged one ({type(error).__name__}: "
            f"{first_line(error)}): delete it to begin anew, or name another file"
        ) from error
    if not isinstance(content, dict) or content.get("kind") != _KIND:
        raise FileError(f"{path} is no checkpoint of pyro_vi_kit: name another file")
    if content["format"] != _FORMAT:
        raise FileError(
            f"{path} has format {content['format']}, this version reads {_FORMAT}: go on with the "
            "version that wrote it, or delete it to begin anew"
        )
    return Saved(content["identity"], content["state"], content["seconds"])


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


def _replace(path: Path, content: State) -> None:
    # Always the same name: what a killed process leaves behind is overwritten by the next one.
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise FileError(f"cannot write checkpoint {path}: {error}") from error
        raise


def _require_same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if keys:
        told = "; ".join(f"{key} {before.get(key)!r}, now {now.get(key)!r}" for key in keys)
        raise OptionError(
            f"checkpoint= {path} is of another fit ({told}): ask for the same, name another file, or "
            "delete it to begin anew. To change a fit that has ended, use resume="
        )
