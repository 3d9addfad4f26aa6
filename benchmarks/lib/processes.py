"""Measured work in processes of their own: no state leaks, a hang has an end, memory has a peak."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.lib.worker import MARK

ROOT = Path(__file__).resolve().parents[2]

# One thread for every library of ours and of the peers, float64 for JAX.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "NPROC": "1",  # XLA's thread pool
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    "JAX_ENABLE_X64": "1",
    "JAX_PLATFORMS": "cpu",
}
_RAISED = re.compile(r"[\w.]*(Error|Exception|Interrupt|Exit)\b")
CACHE = "PYRO_VI_KIT_CACHE"
# The cap ends what is measured; a process also starts, evaluates and ends.
_GRACE = 300.0


@dataclass(frozen=True)
class Result:
    """What came of a call.

    Attributes:
        value: What the function returned; None where it failed.
        seconds: Wall time of the whole process, start and imports included.
        peak_mib: Most memory that it held, MiB.
        error: Last line of what it said, where it failed; None otherwise.
    """

    value: Any
    seconds: float
    peak_mib: float
    error: str | None


def call(
    target: str,
    arguments: Mapping[str, Any],
    *,
    cap: float,
    env: Mapping[str, str] | None = None,
) -> Result:
    """Call ``package.module:function`` in a fresh process with one thread.

    Args:
        target: What to call; its arguments and its value pass through JSON.
        arguments: Keyword arguments.
        cap: Seconds that its measured part may take; the process gets some minutes more.
        env: More environment variables.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        # Nothing that an earlier process has compiled is found. A compiler that this one has started
        # may still be writing when it ends.
        return _call(target, arguments, cap, ONE_THREAD | {CACHE: cache} | dict(env or {}))


def _call(target: str, arguments: Mapping[str, Any], cap: float, env: dict[str, str]) -> Result:
    command = [sys.executable, "-m", "benchmarks.lib.worker", target, json.dumps(dict(arguments))]
    environment = os.environ | env
    started = time.perf_counter()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=cap + _GRACE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        seconds = time.perf_counter() - started
        return Result(None, seconds, 0.0, f"stopped after {seconds:.0f} s")
    seconds = time.perf_counter() - started
    for line in reversed(done.stdout.splitlines()):
        if line.startswith(MARK):
            said = json.loads(line.removeprefix(MARK))
            return Result(said["value"], seconds, said["peak_mib"], None)
    return Result(None, seconds, 0.0, _reason(done.stderr) or f"exit code {done.returncode}")


def _reason(stderr: str) -> str:
    """The last exception that a traceback names; it may go on for lines behind its first."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    raised = [line for line in lines if _RAISED.match(line)]
    return (raised or lines or [""])[-1][:300]
