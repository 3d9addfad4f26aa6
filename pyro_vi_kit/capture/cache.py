"""Where compiled libraries are kept, and which of them go.

`PYRO_VI_KIT_COMPILE=off` in the environment turns compilation off; `PYRO_VI_KIT_CACHE` says where
libraries are kept (``~/.cache/pyro_vi_kit`` by default).
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from pathlib import Path

_MAX_KEPT = 256


def turned_off() -> bool:
    """Whether the user wants nothing compiled."""
    return os.environ.get("PYRO_VI_KIT_COMPILE", "").lower() in ("off", "0", "no", "false")


def folder() -> Path:
    """Where libraries are kept."""
    chosen = os.environ.get("PYRO_VI_KIT_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyro_vi_kit"


@functools.cache
def processor() -> str:
    """What the processor can do, where the system says it."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return ""


def place(made: Path, wanted: Path) -> None:
    """Copy a file to its place at once, so that no other process reads half of it."""
    partial = wanted.with_suffix(f".{os.getpid()}.partial")
    shutil.copyfile(made, partial)
    partial.replace(wanted)


def discard(path: Path) -> None:
    """Take a library that is of no use off the disk."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def forget_oldest(kept_in: Path) -> None:
    """Keep the libraries that were used last."""
    with contextlib.suppress(OSError):
        kept = sorted(kept_in.glob("*.so"), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in kept[_MAX_KEPT:]:
            path.unlink(missing_ok=True)
            path.with_suffix(".json").unlink(missing_ok=True)
