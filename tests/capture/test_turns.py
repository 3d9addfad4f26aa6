"""The compiler beside a fit: one at a time, not on a busy machine, and never after the fit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import models.eight_schools
import pyro_vi_kit as vi
from pyro_vi_kit.capture import native, turns
from pyro_vi_kit.capture import program as programs
from pyro_vi_kit.capture.recorder import record

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="groups of processes"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]

WORKER = "import sys, time, subprocess\nsubprocess.Popen(['sleep', '1000'])\ntime.sleep(1000)\n"


@pytest.fixture(autouse=True)
def idle(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """A machine with time, on which a compiler never ends."""
    monkeypatch.delenv(turns.SIDE_BY_SIDE, raising=False)
    monkeypatch.setattr(turns.os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    endless = cache / "endless.py"
    endless.write_text(WORKER)
    monkeypatch.setattr(native, "_WORKER", endless)


def made() -> native.Library:
    graph = record(lambda x: [x.exp()], [torch.ones(2)])
    return native.Library(graph, [torch.ones(2)])


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def group_of(one: native.Library) -> int:
    assert one._worker is not None
    return one._worker.pid


def gone(group: int) -> bool:
    """Whether all of it ends, which is the system's doing and takes a moment."""
    for _ in range(100):
        if not alive(group):
            return True
        time.sleep(0.1)
    return False


def test_one_at_a_time(cache: Path) -> None:
    first, second = made(), made()
    first.start()
    second.start()
    assert (first.at_work, second.at_work, second.problem) == (True, False, "")
    group = group_of(first)
    first.stop()
    assert gone(group)
    second.start()
    assert second.at_work
    second.stop()


def test_not_where_there_is_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    one = made()
    monkeypatch.setattr(turns.os, "getloadavg", lambda: (turns.processors() + 0.1, 0.0, 0.0))
    assert "busy" in turns.busy()
    one.start()
    assert not one.at_work
    monkeypatch.setattr(turns.os, "getloadavg", lambda: (turns.processors() - 0.1, 0.0, 0.0))
    assert turns.busy() == ""
    monkeypatch.setenv(turns.SIDE_BY_SIDE, "1")
    one.start()
    assert not one.at_work
    one.start(asked=True)  # somebody waits for it
    assert one.at_work
    one.stop()


def test_it_ends_with_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "_PATIENCE", 0.0)
    monkeypatch.setattr(programs, "_BETWEEN_LOOKS", 0.0)
    started: list[int] = []
    begin = native.Library.start

    def start(self: native.Library, *, asked: bool = False) -> None:
        begin(self, asked=asked)
        started.extend([group_of(self)] if self.at_work else [])

    monkeypatch.setattr(native.Library, "start", start)
    vi.fit(models.eight_schools.MODEL, guide="affine_coupling", steps=60, seed=0, progress=False)
    assert started
    assert gone(started[0])


def test_it_ends_with_the_process_that_asked(cache: Path) -> None:
    """Killed, a process says nothing to anybody; what it started looks for it."""
    worker = Path(native.__file__).with_name("worker.py")
    code = (
        "import os, subprocess, sys, time\n"
        f"p = subprocess.Popen([sys.executable, {str(cache / 'own.py')!r}], start_new_session=True)\n"
        "print(p.pid, flush=True)\ntime.sleep(1000)\n"
    )
    scratch = cache / "scratch"
    scratch.mkdir()
    (cache / "own.py").write_text(
        "import sys, time, subprocess, pathlib, importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('worker', {str(worker)!r})\n"
        "worker = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(worker)\n"
        "def endless(job):\n"
        "    subprocess.Popen(['sleep', '1000'])\n    time.sleep(1000)\n"
        "worker._compile = endless\n"
        f"folder = pathlib.Path({str(scratch)!r})\n"
        "(folder / 'job.json').write_text('{}')\n"
        "worker.main(folder)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    group = int(parent.stdout.readline())
    while not (scratch / "job.json").exists():
        time.sleep(0.05)
    time.sleep(0.5)
    assert alive(group)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    assert gone(group)
    assert not scratch.exists()
