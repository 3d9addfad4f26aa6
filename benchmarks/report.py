"""All benchmarks, one after another, and docs/BENCHMARKS.md of what they printed.

    python -m benchmarks.report --quick      # what `make bench` runs: minutes
    python -m benchmarks.report              # the long version: an hour or two
    python -m benchmarks.report --only speed_svi,speed_nuts --resume

A script that fails is named in the document and does not stop the others.
"""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.lib import machine, options, references
from benchmarks.lib.processes import ONE_THREAD, ROOT

DOCUMENT = ROOT / "docs" / "BENCHMARKS.md"
SCRIPTS = (
    "imports",
    "engines_table",
    "accuracy",
    "verdicts",
    "corrections",
    "families",
    "auto",
    "speed_svi",
    "speed_steps",
    "speed_nuts",
    "growth",
    "minibatches",
    "streaming",
    "amortization",
    "calibration",
    "estimators",
    "kl_direction",
    "targets",
    "funnel",
)
NEED_REFERENCES = ("accuracy", "verdicts", "corrections", "families", "auto", "speed_svi")


def run(script: str, asked: list[str], out: Path) -> tuple[str, float]:
    """One script: what it printed, or why it could not, and the seconds that it took."""
    started = time.perf_counter()
    if script in NEED_REFERENCES and (reason := references.missing()):
        return f"## {script}\n\nLeft out: {reason}", 0.0
    command = [sys.executable, "-m", f"benchmarks.{script}", "--out", str(out), *asked]
    # Its standard output is the table; progress goes on to the terminal.
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | ONE_THREAD,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - started
    if done.returncode != 0:
        return f"## {script}\n\nIt failed, with exit code {done.returncode}.", seconds
    return done.stdout.strip(), seconds


def document(parts: Sequence[str], seconds: dict[str, float], quick: bool, pictures: str) -> str:
    """The whole document."""
    minutes = sum(seconds.values()) / 60
    kind = "short version, `make bench`" if quick else "long version, `python -m benchmarks.report`"
    peer = machine.numpyro_missing()
    each = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    return "\n\n".join(
        [
            "# Benchmarks",
            f"Written by `python -m benchmarks.report{' --quick' if quick else ''}` ({kind}) on "
            f"{datetime.datetime.now(tz=datetime.UTC):%Y-%m-%d} in {minutes:.0f} minutes. Everything "
            "was measured in one run on one machine, on one thread in float64, the contestants taking "
            "turns; ratios are of numbers measured side by side, and only they should travel. ≥ marks "
            "a lower bound: the other side had not arrived at its cap. No compiled code was cached.",
            machine.describe() + f"\n- seconds: {each}",
            "To reproduce: `make bench` for the short version; `python -m benchmarks.report` for the "
            "long one; `python -m benchmarks.NAME --help` for one table with other options. Peers: "
            "`pip install -c constraints.txt -e '.[bench]'`. Rows of all tables are written to "
            "results/benchmarks/ as CSV and JSON lines.",
            *([peer] if peer else []),
            *parts,
            pictures,
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    words = options.parser(__doc__)
    words.add_argument("--only", type=options.listed, default=["all"], help=", ".join(SCRIPTS))
    words.add_argument("--document", type=Path, default=DOCUMENT, help="(%(default)s)")
    asked = words.parse_args(argv)
    passed = [f"--{name}" for name in ("quick", "resume") if getattr(asked, name)]
    out = asked.out / ("quick" if asked.quick else "long")
    parts, seconds = [], {}
    for script in options.chosen(asked.only, SCRIPTS, "benchmark"):
        options.say(f"== {script}")
        text, seconds[script] = run(script, passed, out)
        parts.append(text)
        print(text, end="\n\n", flush=True)
        options.say(f"== {script}: {seconds[script]:.0f} s")
    found = sorted(out.glob("growth_*.png")) if "growth" in seconds else []
    names = ", ".join(path.name for path in found)
    pictures = f"Growth as pictures: {names} in {os.path.relpath(out, ROOT)}." if found else ""
    asked.document.write_text(
        document(parts, seconds, asked.quick, pictures).rstrip() + "\n", encoding="utf-8"
    )
    options.say(f"written: {asked.document}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
