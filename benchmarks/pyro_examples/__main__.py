"""Pyro's examples and tutorials through the kit: which of their models work, and why others do not.

    python -m benchmarks.pyro_examples --pyro PATH/TO/A/CHECKOUT [--only hmm,tutorial/gmm] [--resume]

Every script of examples/ (with the arguments that Pyro's own test of it has) and every notebook of
tutorial/source/ is executed in a process of its own, with random data in the place of downloads, and
with inference cut to a few steps. Each model that it hands to SVI, MCMC or another of Pyro's algorithms
is then examined, its density compared with Pyro's trace, and it is fitted and sampled, each in a child
process that may take --seconds. Results go to results/pyro_examples/, a file of JSON lines for each
source, and the table of all of them to the file that --table names.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from benchmarks.lib.processes import ROOT
from benchmarks.pyro_examples import table
from benchmarks.pyro_examples.collect import run
from benchmarks.pyro_examples.sources import Source, sources

OUT = ROOT / "results" / "pyro_examples"
_ESTIMATOR = re.compile(r" --(tmc|tmcelbo|tmc-num-samples=\d+|jit)(?= |$)")
_IMPORTED_BY_MANY = (
    "matplotlib.pyplot",
    "pandas",
    "sklearn.datasets",
    "arviz",
    "pyro.infer",
    "pyro_vi_kit.model.checks",
    "pyro_vi_kit.fitting.fit",
    "pyro_vi_kit.validation.nuts",
    "benchmarks.pyro_examples.judge",
)


def main(arguments: Sequence[str] | None = None) -> int:
    words = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words.add_argument("--pyro", type=Path, required=True, help="a checkout of Pyro")
    words.add_argument(
        "--only", default="", help="sources whose name holds one of these, by commas"
    )
    words.add_argument("--ways", default="", help="check, density, mean_field, ... by commas")
    words.add_argument("--jobs", type=int, default=1)
    words.add_argument(
        "--seconds", type=float, default=60.0, help="CPU time of each way (%(default)s)"
    )
    words.add_argument(
        "--resume", action="store_true", help="keep sources that were run to the end"
    )
    words.add_argument("--out", type=Path, default=OUT)
    words.add_argument("--table", type=Path, help="write the table of all results there")
    words.add_argument("--note", default="", help="a sentence on this run, for the table")
    options = words.parse_args(arguments)
    if not (options.pyro / "examples").is_dir():
        words.error(f"{options.pyro} is no checkout of Pyro: it has no examples/")
    options.out.mkdir(parents=True, exist_ok=True)
    parts = [part.strip() for part in options.only.split(",") if part.strip()]
    chosen = [s for s in sources(options.pyro) if not parts or any(p in s.name for p in parts)]
    _run_all(_without_repeats(chosen, options.out), options)
    if options.table:
        command = "python -m benchmarks.pyro_examples --pyro PYRO --table docs/PYRO_EXAMPLES.md"
        options.table.write_text(
            table.markdown(options.out, command, options.note), encoding="utf-8"
        )
    return 0


def _without_repeats(chosen: Sequence[Source], out: Path) -> list[Source]:
    """One of the runs of a script that differ in nothing but Pyro's estimator; the others say so."""
    first: dict[str, Source] = {}
    for source in chosen:
        other = first.setdefault(_ESTIMATOR.sub("", source.name), source)
        if other is not source:
            words = f"the models of {other.name}; another estimator of Pyro's is all that differs"
            table.write(_results(out, source), source=source.name, outcome="same", detail=words)
    return list(first.values())


def _results(out: Path, source: Source) -> Path:
    return out / (re.sub(r"[^\w.=-]+", "_", source.name) + ".jsonl")


def _run_all(chosen: Sequence[Source], options: argparse.Namespace) -> None:
    """Fork a process for each source, ``--jobs`` at a time; what all of them import is imported once."""
    for name in _IMPORTED_BY_MANY:
        importlib.import_module(name)
    ways = [way.strip() for way in options.ways.split(",") if way.strip()]
    running: dict[int, tuple[Source, Path, float]] = {}
    waiting = list(reversed(chosen))
    while waiting or running:
        while waiting and len(running) < options.jobs:
            source = waiting.pop()
            results = _results(options.out, source)
            if options.resume and table.is_complete(results):
                continue
            child = os.fork()
            if child == 0:
                _child(source, results, options.seconds, ways)
            running[child] = source, results, time.monotonic()
        if running:
            child, _ = os.wait()
            source, results, started = running.pop(child)
            took = time.monotonic() - started
            print(f"{took:5.0f} s  {source.name}  {table.in_short(results)}", flush=True)


def _child(source: Source, results: Path, seconds: float, ways: Sequence[str]) -> NoReturn:
    log = os.open(results.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.alarm(int(60 * seconds))  # for an example that hangs by itself
    try:
        run(source, results, seconds, ways)
    except BaseException:  # noqa: BLE001  told in the log
        traceback.print_exc()
    finally:
        os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
