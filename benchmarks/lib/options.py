"""What all benchmarks are asked on the command line, and how they say how far they are."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.lib.processes import ROOT

OUT = ROOT / "results" / "benchmarks"


def parser(description: str | None, *, cap: float | None = None) -> argparse.ArgumentParser:
    """A parser with the options that every script has: ``--quick``, ``--resume``, ``--out``.

    Args:
        description: The script's docstring.
        cap: Default of ``--cap``; without one the script has no such option.
    """
    words = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words.add_argument("--quick", action="store_true", help="a short version, for a first look")
    words.add_argument("--resume", action="store_true", help="keep what an earlier run measured")
    words.add_argument(
        "--out", type=Path, default=OUT, help="folder for CSV, JSON and Markdown (%(default)s)"
    )
    if cap is not None:
        words.add_argument(
            "--cap",
            type=positive,
            default=None,
            metavar="SECONDS",
            help=f"time that each measurement may take ({cap:g}; with --quick less)",
        )
    return words


def listed(text: str) -> list[str]:
    """The parts of a comma-separated list."""
    return [part.strip() for part in text.split(",") if part.strip()]


def integers(text: str) -> list[int]:
    """The numbers of a comma-separated list."""
    try:
        return [int(part) for part in listed(text)]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not whole numbers: {text!r}") from error


def positive(text: str) -> float:
    """A positive number."""
    try:
        value = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not a number: {text!r}") from error
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


def chosen(wanted: Sequence[str], known: Sequence[str], what: str) -> list[str]:
    """The known names that start with what is wanted, or all for ``all``; exits on an unknown one."""
    if list(wanted) == ["all"]:
        return list(known)
    names: list[str] = []
    for word in wanted:
        found = [name for name in known if name == word] or [
            name for name in known if name.startswith(word)
        ]
        if not found:
            sys.exit(f"no {what} {word!r}; there are: {', '.join(known)}")
        names += [name for name in found if name not in names]
    return names


def say(*words: object) -> None:
    """A line of progress on stderr."""
    print(*words, file=sys.stderr, flush=True)


def publish(out: Path, name: str, text: str) -> None:
    """Print a Markdown text and keep it beside the numbers."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text(text.rstrip() + "\n", encoding="utf-8")
    print(text)
