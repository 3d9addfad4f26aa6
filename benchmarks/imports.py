"""What it costs to load this package: `import pyro_vi_kit` beside `import pyro`, and `vi-kit --help`.

    python -m benchmarks.imports [--repeats 10]

Fresh interpreters that take turns; the fastest of each counts. The first turn, which reads files from
the disk, is not counted.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.lib import options
from benchmarks.lib.processes import ROOT
from benchmarks.lib.records import Records
from benchmarks.lib.tables import markdown

NAME = "imports"
IMPORT_AIM, HELP_AIM = 0.3, 0.5
# Where the aims were set, an interpreter that does nothing took this long.
REFERENCE_PASS = 0.02


def commands() -> dict[str, list[str]]:
    """What is run, by name."""
    beside = Path(sys.executable).with_name("vi-kit")
    cli = str(beside) if beside.exists() else shutil.which("vi-kit")
    everything = "import pyro, pyro_vi_kit as vi; [getattr(vi, name) for name in vi.__all__]"
    found = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "import pyro": [sys.executable, "-c", "import pyro"],
        "import pyro, pyro_vi_kit": [sys.executable, "-c", "import pyro, pyro_vi_kit"],
        "the same, and every public name": [sys.executable, "-c", everything],
    }
    return found | ({"vi-kit --help": [cli, "--help"]} if cli else {})


def measure(repeats: int) -> dict[str, float]:
    """The fastest of so many runs of each, seconds, in turns."""
    times: dict[str, list[float]] = {}
    for turn in range(repeats + 1):
        for name, command in commands().items():
            started = time.perf_counter()
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
            if turn:
                times.setdefault(name, []).append(time.perf_counter() - started)
        options.say(f"turn {turn} of {repeats}")
    return {name: min(seconds) for name, seconds in times.items()}


def report(seconds: dict[str, float]) -> str:
    """All of it as Markdown."""
    # A slower machine is given more time, a faster one not less.
    scale = max(1.0, seconds["python -c pass"] / REFERENCE_PASS)
    over = seconds["import pyro, pyro_vi_kit"] - seconds["import pyro"]
    aims = [("import pyro_vi_kit over import pyro", over, IMPORT_AIM * scale)]
    if "vi-kit --help" in seconds:
        aims.append(("vi-kit --help", seconds["vi-kit --help"], HELP_AIM * scale))
    lines = [{"process": name, "seconds": value} for name, value in seconds.items()]
    verdicts = [
        {"what": what, "seconds": value, "at most (for this machine)": limit, "met": value <= limit}
        for what, value, limit in aims
    ]
    return "\n\n".join(
        [
            "## Loading",
            markdown(["process", "seconds"], lines),
            markdown(["what", "seconds", "at most (for this machine)", "met"], verdicts),
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    words = options.parser(__doc__)
    words.add_argument("--repeats", type=int, default=None, help="runs of each (10)")
    asked = words.parse_args(argv)
    seconds = measure(asked.repeats or (3 if asked.quick else 10))
    records = Records(asked.out, NAME, resume=False)
    for name, value in seconds.items():
        records.add({"process": name, "seconds": value})
    options.publish(asked.out, NAME, report(seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
