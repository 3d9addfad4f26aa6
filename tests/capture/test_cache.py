"""The folder of compiled libraries: nobody else's code is loaded from it, and nothing broken."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyro_vi_kit.capture import cache as caches
from pyro_vi_kit.capture.cache import CacheWarning
from pyro_vi_kit.capture.in_c import RefusedError, library

SOURCE = "#include <stdint.h>\nint64_t replay(const void*const*t,void*const*r){return 4;}\n"
ROOT = hasattr(os, "geteuid") and os.geteuid() == 0

pytestmark = pytest.mark.skipif(library.compiler() is None, reason="there is no C compiler")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing was said yet, and no private folder made."""
    monkeypatch.setattr(caches, "_private", None)
    monkeypatch.setattr(caches, "_said", set())
    monkeypatch.setattr(library, "_hang", {})
    yield
    if caches._private is not None:
        caches._private.cleanup()


def made() -> Path:
    """The library, made or found."""
    return library.library(SOURCE, str(library.compiler()), "-O0")


def answer(path: Path) -> str:
    """What it says, asked in a process that it may take with it."""
    code = f"import ctypes; print(ctypes.CDLL({str(path)!r}).replay(None, None))"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip()


def inside(path: Path, folder: Path) -> bool:
    return path.parent == folder


def test_what_is_kept_is_found_and_whole(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made()
    assert inside(path, cache)
    assert answer(path) == "4"
    assert path.stat().st_mode & 0o077 == 0
    monkeypatch.setattr(library, "_compile", None)  # nothing is compiled
    assert made() == path
    assert not list(cache.glob(".*"))


@pytest.mark.parametrize("harm", ["half", "empty", "changed", "link", "open", "beside"])
def test_a_library_that_is_not_what_was_kept_is_made_anew(cache: Path, harm: str) -> None:
    path = made()
    content = path.read_bytes()
    if harm == "half":
        path.write_bytes(content[: len(content) // 2])
    elif harm == "empty":
        path.write_bytes(b"")
    elif harm == "changed":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif harm == "link":
        shutil.copyfile(path, cache / "elsewhere")
        path.unlink()
        path.symlink_to(cache / "elsewhere")
    elif harm == "open":
        path.chmod(0o666)
    else:
        path.with_suffix(".json").write_text("{}")
    again = made()
    assert not again.is_symlink()
    assert again.read_bytes()[:4] == b"\x7fELF" or sys.platform != "linux"
    assert answer(again) == "4"
    assert again.stat().st_mode & 0o022 == 0
    assert not again.with_suffix(".json").exists()


def planted(cache: Path) -> Path:
    """A library of another's at the name that follows from the source."""
    compiler = str(library.compiler())
    other = cache.parent / "planted.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", str(other)],
        input=SOURCE.replace("return 4", "return 5"),
        text=True,
        check=True,
    )
    content = {".so": other.read_bytes()}
    key = library._key(SOURCE, compiler, "-O0")
    path = cache / f"{key}-{caches._checksum(content)}.so"
    path.write_bytes(content[".so"])
    return path


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no owners on this system")
@pytest.mark.parametrize("whose", ["writable", "foreign", "above", "linked"])
def test_a_folder_that_others_can_write_to_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    if whose == "foreign" and not ROOT:
        pytest.skip("only root gives files away")
    cache = tmp_path / "above" / "cache"
    cache.mkdir(parents=True, mode=0o700)
    chosen = cache
    if whose == "writable":
        cache.chmod(0o777)
    elif whose == "foreign":
        os.chown(cache, 65534, 65534)
    elif whose == "above":
        cache.parent.chmod(0o777)
    else:
        cache.parent.chmod(0o777)
        chosen = tmp_path / "link"
        chosen.symlink_to(cache)
    planted(cache)
    monkeypatch.setenv("PYRO_VI_KIT_CACHE", str(chosen))
    with pytest.warns(CacheWarning, match="others may write|another user") as said:
        path = made()
    assert not inside(path, cache)
    assert path.parent.stat().st_mode & 0o077 == 0
    assert answer(path) == "4"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert made() == path  # found again, and nothing more is said
    assert len(said) == 1


def test_without_a_folder_libraries_are_of_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PYRO_VI_KIT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(CacheWarning, match="kept for this process alone"):
        path = made()
    assert answer(path) == "4"


def test_a_full_disk_is_said_and_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def full(handle: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{handle}")).parent == cache:
            raise OSError(28, "No space left on device")
        real(handle)

    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc")
    monkeypatch.setattr(caches.os, "fsync", full)
    with pytest.warns(CacheWarning, match="No space left"):
        path = made()
    assert answer(path) == "4"
    assert not inside(path, cache)
    assert not list(cache.iterdir())


def test_threads_do_not_write_one_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight at once, each held up between writing and moving: every one of them loads."""
    barrier, real, paths = threading.Barrier(8), os.fsync, []
    monkeypatch.setattr(caches.os, "fsync", lambda handle: (barrier.wait(20), real(handle)))
    threads = [threading.Thread(target=lambda: paths.append(made())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 8
    assert {answer(path) for path in set(paths)} == {"4"}
    assert not list(cache.glob(".*"))


def test_those_used_last_are_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "_MAX_KEPT", 2)
    abandoned = cache / ".x.partial"
    abandoned.write_text("")
    os.utime(abandoned, (0, 0))
    for age, name in ((50, "a"), (10, "b"), (90, "c")):
        file = cache / f"{name}.so"
        file.write_text("")
        now = file.stat().st_mtime
        os.utime(file, (now - age, now - age))
        file.with_suffix(".json").write_text("")
    path = made()
    assert {file.name for file in cache.iterdir()} == {path.name, "b.so", "b.json"}


# -- compilers ------------------------------------------------------------------------------------


def gone(process: int) -> bool:
    """Whether it ends, which is the system's doing and takes a moment."""
    for _ in range(100):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def script(folder: Path, text: str) -> str:
    path = folder.parent / f"cc_{abs(hash(text))}"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cat >/dev/null; printf 'schade: \\344\\366\\377' >&2; exit 1", "failed: schade"),
        ("cat >/dev/null; exit 0", "made no library"),
        ("exec 0<&-; exit 3", "no reason given"),
        ('cat >/dev/null; while [ "$1" != -o ]; do shift; done; : > "$2"', "made no library"),
    ],
)
def test_a_compiler_that_goes_wrong_is_refused(cache: Path, text: str, said: str) -> None:
    with pytest.raises(RefusedError, match=said):
        library.library(SOURCE, script(cache, text), "-O0")
    assert not list(cache.iterdir())


def test_a_compiler_that_hangs_is_asked_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = cache.parent / "pid"
    hangs = script(cache, f"sleep 1000 & echo $! > {pid}; wait")
    monkeypatch.setattr(library, "_SECONDS", 1.0)
    with pytest.raises(RefusedError, match="had not ended after 1 s"):
        library.library(SOURCE, hangs, "-O0")
    assert gone(int(pid.read_text()))
    monkeypatch.setattr(library.subprocess, "Popen", None)
    with pytest.raises(RefusedError, match="had not ended"):
        library.library(SOURCE + "/* another */", hangs, "-O0")


def test_a_private_folder_is_the_parents(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A child that ends as a program does leaves it where it is."""
    if not hasattr(os, "fork"):
        pytest.skip("no fork")
    (tmp_path / "file").write_text("")
    code = (
        "import os, sys, warnings; warnings.simplefilter('ignore')\n"
        "from pyro_vi_kit.capture import cache\n"
        "folder = cache.folder()\n"
        "if os.fork() == 0: sys.exit(0)\n"
        "os.wait(); print(folder.is_dir())"
    )
    monkeypatch.setenv("PYRO_VI_KIT_CACHE", str(tmp_path / "file" / "cache"))
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr
