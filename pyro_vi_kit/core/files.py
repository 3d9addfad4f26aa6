"""Files written in one piece, and sealed by a checksum: what is read is what was written, or an error.

A file is made in memory and written beside its place under a name of its own, which nobody can have
planted there; then it is moved there in one step. Whenever the process dies, the file is either the old
or the new one. A part that a killed process left behind is taken away by the next one that writes there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pyro_vi_kit.core.errors import FileError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

_PARTIAL = ".partial"
# What a file's name may have before it, so that the whole stays within 255 bytes.
_LONGEST = 150
_SEAL = b"\npyro_vi_kit sha256 "


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Say whether a file can be written, before any work is done for it.

    Args:
        path: The file to be written.

    Returns:
        Its absolute path, links resolved.

    Raises:
        FileError: If its folder is missing or read-only, or the path is a folder, a device or a
            read-only file.
    """
    if not isinstance(path, str | os.PathLike):
        raise FileError(f"a file is named by its path, got {type(path).__name__}")
    try:
        target = Path(os.path.realpath(Path(path).expanduser()))
        folder = target.parent
        if not folder.is_dir():
            raise FileError(f"cannot write {target}: no folder {folder}; create it with mkdir -p")
        if target.exists() and not target.is_file():
            raise FileError(
                f"cannot write {target}: it is not a plain file; name a file in a folder"
            )
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a null byte, no home
        if isinstance(error, FileError):
            raise
        raise FileError(f"cannot write {path}: {error}; choose another path") from error
    for place in (folder, target) if target.exists() else (folder,):
        if not os.access(place, os.W_OK):
            raise FileError(
                f"cannot write {target}: no right to write to {place}; choose another path"
            )
    return target


def folder_for_results(path: str | os.PathLike[str]) -> Path:
    """Make a folder for results, before any work is done for it.

    Args:
        path: The folder; its parents are made too.

    Returns:
        Its absolute path.

    Raises:
        FileError: If it cannot be made or written to.
    """
    folder = Path(path).expanduser().resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(
            f"cannot make the folder {folder}: {error.strerror}; choose another path"
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise FileError(f"no right to write to {folder}; choose another path")
    return folder


def write(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write a file, all of it or nothing. Of two that write at once the later one's stays, whole.

    Args:
        path: The file; one that exists is replaced once the new one is on the disk. A link stays one.
        content: What it is to hold.

    Returns:
        Its absolute path, links resolved.

    Raises:
        FileError: If it cannot be written; what was there is there still.
    """
    target = check_writable(path)
    try:
        _sweep(target)
        with _partial(target) as (file, partial):
            file.write(content)
            file.flush()
            if target.exists():
                os.chmod(partial, target.stat().st_mode & 0o7777)
            os.fsync(file.fileno())
            os.replace(partial, target)
        _settle(target.parent)
    except OSError as error:
        raise FileError(
            f"cannot write {target}: {error}; check the space and the rights on {target.parent}"
        ) from error
    return target


def sealed(content: bytes) -> bytes:
    """The content with a checksum at its end, which a netCDF reader does not see."""
    return content + _SEAL + hashlib.sha256(content).hexdigest().encode() + b"\n"


def unsealed(content: bytes, path: str | os.PathLike[str]) -> tuple[bytes, bool]:
    """What `sealed` was given, and whether there was a seal at all.

    Raises:
        FileError: If the content is not what was sealed.
    """
    start = len(content) - len(sealed(b""))
    if start < 0 or not content[start:].startswith(_SEAL):
        return content, False
    inner = content[:start]
    if sealed(inner)[start:] != content[start:]:
        raise FileError(
            f"{path} is damaged: its checksum is not that of what it holds. Restore it from a copy, or "
            "delete it and make it anew"
        )
    return inner, True


@contextlib.contextmanager
def _partial(target: Path) -> Iterator[tuple[IO[bytes], Path]]:
    """A new file beside its place, locked while it is written; gone at the end, if it was not moved."""
    while True:
        partial = target.with_name(f"{_stem(target)}{secrets.token_hex(8)}{_PARTIAL}")
        file = partial.open("xb")
        _lock(file)
        # Before it was locked, another process may have taken it for one left behind.
        if partial.exists():
            break
        file.close()
    try:
        yield file, partial
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()
        file.close()


def _sweep(target: Path) -> None:
    """Take away what killed processes left behind: parts that nobody has locked."""
    if fcntl is None:
        return
    stem = _stem(target)
    for entry in target.parent.iterdir():
        if not (entry.name.startswith(stem) and entry.name.endswith(_PARTIAL)):
            continue
        if len(entry.name) != len(stem) + 16 + len(_PARTIAL):
            continue
        # Whoever writes it, or whoever else takes it away, may be quicker; a link is nobody's.
        with contextlib.suppress(OSError):
            descriptor = os.open(entry, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                entry.unlink()
            finally:
                os.close(descriptor)


def _lock(file: IO[bytes]) -> None:
    if fcntl is not None:
        with contextlib.suppress(OSError):  # some file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX)


def _stem(target: Path) -> str:
    name = target.name.encode()[:_LONGEST].decode(errors="ignore")
    return f".{name}."


def _settle(folder: Path) -> None:
    """Have the move itself on the disk, where the file system can say so."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
