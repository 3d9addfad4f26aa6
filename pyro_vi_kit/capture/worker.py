"""Compile one graph to a shared library; run as a script, by `native`.

    python worker.py FOLDER

reads FOLDER/job.json and writes FOLDER/made.so, or FOLDER/error.txt. Imports nothing of this package but
the file beside it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import operator
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

# The fit that it works for comes first.
_NICE = 10


def main(folder: Path) -> int:
    """Compile the job in ``folder``; the exit status."""
    threading.Thread(target=_end_with, args=(os.getppid(), folder), daemon=True).start()
    with contextlib.suppress(OSError, AttributeError):
        os.nice(_NICE)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    # Not tried out again for each graph, which takes seconds: where the compiler cannot, it says so.
    os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "1"
    try:
        made = _compile(json.loads((folder / "job.json").read_text()))
        # Operations that have no C interface are named in a file that lies beside the library.
        for suffix in (".json", ".so"):
            if made.with_suffix(suffix).exists():
                shutil.copyfile(made.with_suffix(suffix), folder / f"made{suffix}")
    except Exception:  # noqa: BLE001  told to the parent
        (folder / "error.txt").write_text(traceback.format_exc())
        return 1
    return 0


def _end_with(parent: int, folder: Path) -> None:
    """End when the process that asked has ended, however that came about."""
    while os.getppid() == parent:
        time.sleep(0.5)
    shutil.rmtree(folder, ignore_errors=True)
    if os.name == "posix" and os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)  # with the compilers that it has started
    os._exit(1)


def _compile(job: dict[str, Any]) -> Path:
    import torch
    import torch._inductor
    from torch import fx

    names = {name: _read(torch, *spelled) for name, spelled in job["names"].items()}
    exec(compile(job["source"], "<captured graph>", "exec"), names)
    module = fx.symbolic_trace(names["replay"])
    inputs = tuple(
        torch.empty_strided(shape, stride, dtype=getattr(torch, dtype)).zero_()
        for shape, stride, dtype in job["inputs"]
    )
    torch.set_num_threads(job["threads"])
    # Found beside this script, which is where Python looks first.
    importlib.import_module("lowerings").install()
    options = {
        "compile_threads": 1,
        "cpp.threads": job["threads"],
        # Where nothing but loops is left of a graph: allocating tensors would take a third of the time.
        "aot_inductor.allow_stack_allocation": True,
    }
    with torch.no_grad():
        return Path(str(torch._inductor.aot_compile(module, inputs, options=options)))


def _read(torch: Any, kind: str, text: str) -> Any:
    if kind == "op":
        return operator.attrgetter(text)(torch.ops)
    if kind == "device":
        return torch.device(text)
    return getattr(torch, text)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
