"""What is printed where: results on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pyro_vi_kit.cli.options import progress_wanted
from pyro_vi_kit.core.errors import MissingDependencyError

if TYPE_CHECKING:
    import pandas as pd

_ROWS = 40
_KEYWORD = re.compile(
    r"""(?<![\w.'"-])(?P<name>[a-z_]+)=(?:'(?P<quoted>[^']*)'|(?P<plain>\w[\w.+-]*\w|\w))?"""
)
_CALL = re.compile(r"\w\([^()]*$")


def in_options(text: str, command: click.Command | None = None) -> str:
    """Text that speaks of ``steps=`` and ``guide='delta'`` with the options of a command: ``--steps``.

    Args:
        text: What a function of Python says. Calls in it, as ``vi.fit(model, steps=10)``, stay.
        command: The command; the one that is running when None.
    """
    command = click.get_current_context().command if command is None else command
    options = {
        name.lstrip("-").replace("-", "_"): name
        for parameter in command.params
        if isinstance(parameter, click.Option) and not parameter.hidden
        for name in parameter.opts
        if name.startswith("--")
    }

    def spoken(found: re.Match[str]) -> str:
        option = options.get(found["name"])
        if option is None or _CALL.search(text[: found.start()]):
            return found[0]
        value = found["quoted"] or found["plain"] or ""
        return f"{option} {value}" if value else option

    return _KEYWORD.sub(spoken, text)


def message(text: str) -> None:
    """Tell the user something that is no result, unless they asked for quiet."""
    if progress_wanted() is not False:
        click.echo(text, err=True)


@contextlib.contextmanager
def warnings_as_messages() -> Iterator[None]:
    """Show each warning as one line on stderr; also where none of the rest is shown."""

    def show(text: Warning | str, *_: Any, **__: Any) -> None:
        click.echo(f"warning: {in_options(str(text))}", err=True)

    with warnings.catch_warnings():
        # Ours are UserWarnings, and say what must not be missed; the others stay as Python has them.
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show
        yield


def print_json(document: Mapping[str, Any]) -> None:
    """Print one JSON document; what JSON has no number for (NaN, infinity) becomes null."""
    click.echo(json.dumps(_plain(document), indent=2, allow_nan=False))


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """A table as a list of objects."""
    return [{str(k): v for k, v in row.items()} for row in frame.to_dict(orient="records")]


def write_table(frame: pd.DataFrame, path: Path, **options: Any) -> None:
    """Write a table as CSV, all of it or nothing."""
    from pyro_vi_kit.core import files

    files.write(path, frame.to_csv(**options).encode())


def write_pictures(folder: Path, pictures: Mapping[str, Callable[[Path], Any]]) -> None:
    """Draw pictures by name in a folder, where matplotlib is installed, and say what is there then."""
    try:
        for name, draw in pictures.items():
            draw(folder / name)
    except MissingDependencyError as error:
        click.echo(f"warning: no pictures: {error}", err=True)
    message(f"wrote {', '.join(sorted(p.name for p in folder.iterdir()))} in {relative(folder)}")


def print_result(text: str, frame: pd.DataFrame) -> None:
    """Print what was found, and the first forty rows of a table of numbers."""
    click.echo(in_options(text))
    shown = frame.head(_ROWS)
    click.echo(shown.to_string(float_format=_number))
    if len(frame) > len(shown):
        left = f"{len(frame) - len(shown):,} of {len(frame):,}"
        click.echo(f"... {left} rows not shown; --json prints all of them")


def relative(path: str | os.PathLike[str]) -> str:
    """A path as the user would write it."""
    text = os.path.relpath(path)
    return os.fspath(path) if text.startswith("..") else text


def _number(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:.3f}"


def _plain(value: Any) -> Any:
    """The value in what JSON has."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, bool | int | None) else str(value)
