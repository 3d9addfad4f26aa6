"""Where compiled libraries are kept, and which of them are loaded.

Who can write into the folder can have code run, so it has to be the user's own and closed to others;
else, and where it cannot be written to, a folder of this process alone takes its place, and that is said
once. A library's name has the checksum of its content: what was cut off, or changed, is never loaded,
and two processes that make the same one do not write one file.

`PYRO_VI_KIT_COMPILE=off` in the environment turns compilation off; `PYRO_VI_KIT_CACHE` says where
libraries are kept (``~/.cache/pyro_vi_kit`` by default).
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import os
import stat
import tempfile
import threading
import time
import warnings
from pathlib import Path

_MAX_KEPT = 256
# Partial files of processes that were killed go after as many seconds.
_ABANDONED = 3600.0
_LIBRARY, _BESIDE, _PARTIAL = ".so", ".json", ".partial"

_lock = threading.Lock()
_said: set[str] = set()


class CacheWarning(UserWarning):
    """Compiled libraries are not kept for the next process, and why."""


def turned_off() -> bool:
    """Whether the user wants nothing compiled."""
    return os.environ.get("PYRO_VI_KIT_COMPILE", "").lower() in ("off", "0", "no", "false")


def wanted() -> Path:
    """Where libraries are to be kept."""
    chosen = os.environ.get("PYRO_VI_KIT_CACHE")
    if chosen:
        return Path(chosen).absolute()
    kept = os.environ.get("XDG_CACHE_HOME")
    return (Path(kept) if kept else Path.home() / ".cache").absolute() / "pyro_vi_kit"


def folder() -> Path:
    """Where libraries are kept: as wanted, or in a folder of this process alone, which is then said.

    Raises:
        OSError: If there is no folder at all that can be written to.
    """
    try:
        path = wanted()
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        problem = _problem(path)
    except (OSError, RuntimeError) as error:  # a user without a home is a RuntimeError
        path, problem = Path(), str(error)
    return _instead(f"{path}: {problem}") if problem else path


def find(key: str) -> Path | None:
    """The library of that key whose content is what its name says; others are deleted."""
    for kept in _folders():
        for path in kept.glob(f"{key}-*{_LIBRARY}"):
            if _intact(path):
                with contextlib.suppress(OSError):
                    os.utime(path)  # the libraries that go first are those not used for longest
                return path
            discard(path)
    return None


def keep(key: str, made: Path) -> Path:
    """Put a library in its place, with the file of its name that lies beside it if there is one.

    Args:
        key: What it is the library of.
        made: Where it lies now.

    Returns:
        Where it lies now.

    Raises:
        OSError: If it can be kept nowhere.
    """
    parts = [path for path in (made.with_suffix(_BESIDE), made) if path.exists()]
    contents = {path.suffix: path.read_bytes() for path in parts}
    name = f"{key}-{_checksum(contents)}"
    try:
        return _placed(folder(), name, contents)
    except OSError as error:
        return _placed(_instead(f"{wanted()}: {error}"), name, contents)


def discard(path: Path) -> None:
    """Take a library that is of no use off the disk."""
    for part in (path, path.with_suffix(_BESIDE)):
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


@functools.cache
def processor() -> str:
    """What the processor can do, where the system says it."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return ""


def _folders() -> list[Path]:
    """Where a library may lie."""
    made = [Path(_private.name)] if _private is not None else []
    with contextlib.suppress(OSError):
        first = folder()
        return [first, *(path for path in made if path != first)]
    return made


def _placed(kept_in: Path, name: str, contents: dict[str, bytes]) -> Path:
    """Write files at once, the library last, so that no other process reads half of it."""
    for suffix, content in contents.items():
        handle, partial = tempfile.mkstemp(prefix=f".{name}", suffix=_PARTIAL, dir=kept_in)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(partial).replace(kept_in / f"{name}{suffix}")
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise
    _forget_oldest(kept_in)
    return kept_in / f"{name}{_LIBRARY}"


def _intact(path: Path) -> bool:
    """Whether a library is a plain file of the user's with the content that its name says."""
    contents = {}
    for part in (path.with_suffix(_BESIDE), path):
        try:
            handle = os.open(part, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        except FileNotFoundError:
            continue
        except OSError:  # a link, for one
            return False
        with os.fdopen(handle, "rb") as file:
            facts = os.fstat(handle)
            if not stat.S_ISREG(facts.st_mode) or not _ours(facts) or _open_to_others(facts):
                return False
            contents[part.suffix] = file.read()
    return _LIBRARY in contents and path.stem.rpartition("-")[2] == _checksum(contents)


def _checksum(contents: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for suffix in sorted(contents):
        digest.update(f"{suffix} {len(contents[suffix])}\n".encode())
        digest.update(contents[suffix])
    return digest.hexdigest()


def _problem(path: Path) -> str:
    """Why code must not be loaded from a folder, or none can be kept there; empty if it can."""
    facts = path.stat()
    if not _ours(facts):
        return "it belongs to another user"
    if _open_to_others(facts):
        return "others may write to it: chmod 700 it, once what lies in it is deleted"
    # Who can rename a folder on the way can put another in its place.
    for way in (path, path.resolve()):
        for above in way.parents:
            facts = above.lstat()
            of_system = facts.st_uid == 0
            sticky = bool(facts.st_mode & stat.S_ISVTX)
            if not (_ours(facts) or of_system) or (_open_to_others(facts) and not sticky):
                return f"others may write to {above}"
    if path.is_symlink() and not _ours(path.lstat()):
        return "it is a link of another user's"
    return "" if os.access(path, os.W_OK | os.X_OK) else "it cannot be written to"


def _ours(facts: os.stat_result) -> bool:
    return not hasattr(os, "geteuid") or facts.st_uid == os.geteuid()


def _open_to_others(facts: os.stat_result) -> bool:
    """Whether others may write there. A group that nobody else is in is no others."""
    if not hasattr(os, "geteuid") or stat.S_ISLNK(facts.st_mode):
        return False
    if facts.st_mode & stat.S_IWOTH:
        return True
    return bool(facts.st_mode & stat.S_IWGRP) and not _own_group(facts.st_gid)


def _own_group(number: int) -> bool:
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(number)
    except KeyError:
        return False
    return user.pw_gid == number and group.gr_name == user.pw_name and not group.gr_mem


_private: tempfile.TemporaryDirectory[str] | None = None


def _after_fork() -> None:
    """A child has no part in the folder of its parent, which goes with that."""
    global _private, _lock
    if _private is not None:
        atexit.unregister(_private.cleanup)
        _private._finalizer.detach()  # pyright: ignore[reportAttributeAccessIssue]
    _private, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _instead(problem: str) -> Path:
    """A folder that goes with this process."""
    global _private  # noqa: PLW0603  one for all
    with _lock:
        if _private is None or not Path(_private.name).exists():
            _private = tempfile.TemporaryDirectory(prefix="pyro_vi_kit_")
            atexit.register(_private.cleanup)
        said, _ = problem in _said, _said.add(problem)
    if not said:
        warnings.warn(
            f"compiled libraries are kept for this process alone, since {problem}. Set "
            "PYRO_VI_KIT_CACHE to a folder of yours",
            CacheWarning,
            stacklevel=2,
        )
    return Path(_private.name)


def _forget_oldest(kept_in: Path) -> None:
    """Keep the libraries that were used last."""
    with contextlib.suppress(OSError):
        kept = sorted(kept_in.glob(f"*{_LIBRARY}"), key=_age)
        for path in kept[_MAX_KEPT:]:
            discard(path)
        for path in kept_in.glob(f".*{_PARTIAL}"):
            if _age(path) > _ABANDONED:
                path.unlink(missing_ok=True)


def _age(path: Path) -> float:
    return time.time() - path.stat().st_mtime
