"""Run one source in this process, and each model it has through the kit, in children of it.

Children are forked where an example has its model, its data and its parameters at hand, so that one
that crashes, hangs or eats memory is a finding and not the end.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import runpy
import signal
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.pyro_examples.sources import Source

_MEMORY = 12 << 30  # bytes of address space
_WALL = 10  # times the limit in seconds of CPU: for what waits


def run(source: Source, results: Path, seconds: float, ways: Sequence[str]) -> None:
    """Run a source, in a process of its own.

    Args:
        source: The script or notebook.
        results: A file for JSON lines, one for each way that each model was tried, and a last one.
        seconds: CPU time that each of them may take.
        ways: Which to try; all where none are given.
    """
    from benchmarks.pyro_examples import stubs

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    results = results.resolve()
    with tempfile.TemporaryDirectory() as folder, results.open("w", encoding="utf-8") as lines:
        os.environ.update(CI="1", HOME=folder, MPLBACKEND="Agg", PYRO_VI_KIT_COMPILE="off")
        _execute(source, Path(folder), stubs.install, _Sink(source.name, lines, seconds, ways))
        os.chdir("/")  # out of what is removed


def _execute(source: Any, folder: Path, stubs: Callable[[], None], sink: Any) -> None:
    """The script or the notebook's cells, with stand-ins for data, and inference caught."""
    missing = source.needs()
    if missing:
        sink.say(way="source", outcome="not run", detail=f"needs {missing}")
        return
    import pyro
    import torch

    from benchmarks.pyro_examples.hooks import Hooks

    torch.set_num_threads(1)
    stubs()
    pyro.__version__ = "1.9.1"  # of the checkout, which its examples assert
    Hooks(sink).install()
    code, path = source.code(), source.path
    sys.argv = [str(path), *source.arguments]
    sys.path[:0] = [str(path.parent), str(path.parent.parent), str(path.parent.parent.parent)]
    (
        folder / "source"
    ).mkdir()  # what a notebook writes is left there; scripts read data beside them
    os.chdir(path.parent if path.suffix == ".py" else folder / "source")
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for the rest of the process
    try:
        if path.suffix == ".py":
            runpy.run_path(str(path), run_name="__main__")
        else:
            _notebook(code, path)
    except (Exception, SystemExit) as error:  # noqa: BLE001  of the example itself
        if not isinstance(error, SystemExit) or error.code:
            sink.say(way="source", outcome="ended", detail=_cause(error))
            return
    sink.say(way="source", outcome="ran", detail="")


def _cause(error: BaseException) -> str:
    """What an example raised, and where."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} [{Path(frame.filename).name}:{frame.lineno}]"


def _notebook(code: str, path: Path) -> None:
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    vars(module).update(__file__=str(path), display=lambda *_: None)
    exec(compile(code, str(path), "exec"), vars(module))


class _Sink:
    """Runs the ways of each model that is found, and writes a line for each."""

    def __init__(self, name: str, lines: Any, seconds: float, ways: Sequence[str]) -> None:
        self._name, self._lines, self._seconds, self._ways = name, lines, seconds, ways
        self._models: dict[Any, str] = {}

    def say(self, **row: Any) -> None:
        self._lines.write(json.dumps({"source": self._name, **row}) + "\n")
        self._lines.flush()

    def __call__(self, found: Any) -> None:
        from benchmarks.pyro_examples.hooks import code_of, name_of
        from benchmarks.pyro_examples.judge import attempt, ways

        key = code_of(found.model)
        known = key in self._models
        if not known:
            name = name_of(found.model)
            same = sum(other.partition(" #")[0] == name for other in self._models.values())
            self._models[key] = f"{name} #{same + 1}" if same else name
        guide = None if found.guide is None else name_of(found.guide)
        for way, action in ways(found, known):
            if self._ways and way not in self._ways:
                continue
            started = time.monotonic()
            outcome, detail = _forked(lambda: attempt(action, found), self._seconds)  # noqa: B023
            self.say(
                model=self._models[key],
                guide=guide if way == "own guide" else None,
                loss=found.loss,
                way=way,
                outcome=outcome,
                detail=detail[:2000],
                seconds=round(time.monotonic() - started, 2),
            )


def _forked(action: Callable[[], tuple[str, str]], seconds: float) -> tuple[str, str]:
    """What an action gives in a child of this process, within a time."""
    with tempfile.TemporaryFile("w+") as answer, tempfile.TemporaryFile("w+") as stuck:
        child = os.fork()
        if child == 0:
            faulthandler.register(signal.SIGPROF, file=stuck, chain=True)
            faulthandler.dump_traceback_later(_WALL * seconds, exit=True, file=stuck)
            signal.setitimer(signal.ITIMER_PROF, seconds)
            answer.write(json.dumps(action()))
            answer.flush()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        answer.seek(0)
        text = answer.read()
        if text:
            outcome, detail = json.loads(text)
            return outcome, detail
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) != signal.SIGPROF:
            return "crash", f"signal {os.WTERMSIG(status)}"
        stuck.seek(0)
        return "not ended", _where(stuck.read())


def _where(dump: str) -> str:
    """The innermost lines of the package in a dumped traceback."""
    lines = [line.strip() for line in dump.splitlines() if "pyro_vi_kit/" in line]
    return " < ".join(line.rpartition("pyro_vi_kit/")[2] for line in lines[:3])
