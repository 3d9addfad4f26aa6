"""``guides``, ``objectives`` and ``estimators``: what can be named, as tables to choose from."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

import click

import pyro_vi_kit as vi
from pyro_vi_kit.cli.options import common_options, import_option, json_option
from pyro_vi_kit.cli.output import print_json

if TYPE_CHECKING:
    from pyro_vi_kit.core.registry import About

# Narrower, words stand one below the other; wider, lines are hard to follow.
_WIDTHS = (96, 150)
_GAP = "  "


@click.command("guides")
@import_option
@json_option
@common_options
def guides_command(as_json: bool) -> None:
    """List the guides: what each can represent, what a step costs, when to use it, its paper."""
    heads = ("guide", "what it can represent", "cost of a step", "when to use it", "paper")
    _print(vi.guides.choices(), vi.guides.about(), heads, as_json)


@click.command("objectives")
@import_option
@json_option
@common_options
def objectives_command(as_json: bool) -> None:
    """List the objectives: what each bounds, what a step costs, when to use it, its paper."""
    heads = ("objective", "what it bounds", "cost of a step", "when to use it", "paper")
    heads = (*heads, "gradients")
    gradients = {name: ", ".join(each) for name, each in vi.objectives.estimators_of().items()}
    _print(
        vi.objectives.describe(), vi.objectives.about(), heads, as_json, {"estimators": gradients}
    )


@click.command("estimators")
@json_option
@common_options
def estimators_command(as_json: bool) -> None:
    """List the estimators of a gradient: what each does, its cost, when to use it, its paper."""
    about = vi.objectives.about_estimators()
    heads = ("estimator", "what it is", "cost of a step", "when to use it", "paper")
    trained = {
        name: ", ".join(o for o, each in vi.objectives.estimators_of().items() if name in each)
        for name in about
    }
    described = {name: each.does for name, each in about.items()}
    _print(described, about, (*heads, "objectives"), as_json, {"objectives": trained})


def _print(
    described: Mapping[str, str],
    about: Mapping[str, About],
    heads: Sequence[str],
    as_json: bool,
    more: Mapping[str, Mapping[str, str]] | None = None,
) -> None:
    """A table, or JSON; ``more`` has further columns, by their keys in JSON and then by name."""
    further = more or {}
    if as_json:
        lines = {
            name: {"description": line, **about[name]._asdict()}
            | {key: column[name] for key, column in further.items()}
            for name, line in described.items()
        }
        print_json(lines)
        return
    rows = [(name, *about[name], *(c[name] for c in further.values())) for name in described]
    click.echo("\n".join(_table(heads, rows, shutil.get_terminal_size().columns)))


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Lines of a table whose cells are wrapped; the first column never is."""
    first = max(len(row[0]) for row in (heads, *rows))
    width = min(max(width, _WIDTHS[0]), _WIDTHS[1])
    left = width - first - (len(heads) - 1) * len(_GAP)
    # Of what is left a column has its share by the root of its longest cell.
    needs = [max(len(row[i]) for row in (heads, *rows)) ** 0.5 for i in range(1, len(heads))]
    widths = [first, *(int(left * need / sum(needs)) for need in needs)]
    lines = _wrapped(heads, widths)
    lines.append(_GAP.join("-" * w for w in widths))
    for row in rows:
        lines += _wrapped(row, widths)
    return lines


def _wrapped(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    """A row's cells, as many lines as the longest one takes."""
    cells = [
        textwrap.wrap(cell, width, break_on_hyphens=False)
        for cell, width in zip(row, widths, strict=True)
    ]
    return [
        _GAP.join(part.ljust(width) for part, width in zip(parts, widths, strict=True)).rstrip()
        for parts in zip_longest(*cells, fillvalue="")
    ]
