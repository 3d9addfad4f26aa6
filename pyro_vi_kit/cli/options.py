"""Options that several commands have, and how their values are read."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pyro_vi_kit.core.errors import OptionError, UnknownNameError, told

if TYPE_CHECKING:
    from pyro_vi_kit.core.contracts import Objective

Command = TypeVar("Command", bound=Callable[..., Any])

_META = "pyro_vi_kit"
_NETCDF = (".nc", ".nc4", ".netcdf", ".h5", ".hdf5")

model_argument = click.argument("model_file", metavar="MODEL.py", type=click.Path())
json_option = click.option("--json", "as_json", is_flag=True, help="The result as JSON on stdout.")
seed_option = click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="The same seed gives the same numbers.",
)


def common_options(command: Command) -> Command:
    """``--debug`` and ``--progress/--quiet``, before or behind the command's name."""
    debug = click.option(
        "--debug",
        is_flag=True,
        expose_value=False,
        callback=_remember("debug"),
        help="Show tracebacks.",
    )
    progress = click.option(
        "--progress/--quiet",
        default=None,
        expose_value=False,
        callback=_remember("progress"),
        help="Show progress, or no progress and no messages; by default progress on a terminal.",
    )
    return debug(progress(command))


def debugging(ctx: click.Context) -> bool:
    """Whether tracebacks are wanted."""
    return bool(ctx.meta.get(f"{_META}.debug"))


def progress_wanted() -> bool | None:
    """What ``--progress/--quiet`` says; None where neither is given."""
    return click.get_current_context().meta.get(f"{_META}.progress")


init_option = click.option(
    "--init",
    default="auto",
    show_default=True,
    help="Where to start: auto, or a function of Pyro's, median, mean, sample, feasible, uniform; fit "
    "also takes origin.",
)


def nuts_options(command: Command) -> Command:
    """How NUTS is to sample."""
    options = (
        click.option("--chains", type=click.IntRange(min=1), default=4, show_default=True),
        click.option(
            "--draws",
            type=click.IntRange(min=4),
            default=1000,
            show_default=True,
            help="Draws kept per chain.",
        ),
        click.option(
            "--tune",
            type=click.IntRange(min=10),
            show_default="400 with nutpie, 800 with Pyro",
            help="Warm-up draws per chain.",
        ),
        click.option("--sampler", default="auto", show_default=True, help="auto, nutpie or pyro."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def split_names(kind: str, text: str, known: Iterable[str]) -> list[str]:
    """Names separated by commas, each once.

    Args:
        kind: What they name, for messages.
        text: As it was given.
        known: What can be named.

    Raises:
        UnknownNameError: If one is not known; names the nearest.
        OptionError: If there is none.
    """
    known = list(known)
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise OptionError(f"no {kind} is given; known {kind}s: {', '.join(known)}")
    for name in names:
        if name not in known:
            raise UnknownNameError(kind, name, known)
    return names


def netcdf_target(out: str | None) -> Path | None:
    """Where ``--out`` writes ArviZ netCDF, refused before any work where it cannot.

    Raises:
        OptionError: If its ending is that of another kind of file.
        FileError: If it cannot be written.
    """
    from pyro_vi_kit.core.files import check_writable

    if out is None:
        return None
    suffix = Path(out).suffix.lower()
    if suffix not in ("", *_NETCDF):
        raise OptionError(
            f"--out {out}: what is written is ArviZ netCDF, and {suffix} is another kind of file: end "
            "it in .nc. --json prints the summary for other programs"
        )
    return check_writable(out)


def key_values(option: str, pairs: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE`` with values as Python writes them: ``layers=4``, ``hidden=(8, 8)``.

    A single word stands for itself.

    Args:
        option: What they were given to, for messages.
        pairs: As they were given.

    Raises:
        OptionError: If one is not of this form.
    """
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = (part.strip() for part in pair.partition("="))
        if not (key.isidentifier() and equals and text):
            raise OptionError(f"{option} takes KEY=VALUE, as in layers=4, got {told(pair)}")
        try:
            values[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            if not text.isidentifier():
                raise OptionError(
                    f"{option} {pair}: {text!r} is no number, word or tuple; write it as Python "
                    "does, in quotes for the shell: 'hidden=(8, 8)'"
                ) from None
            values[key] = text
    return values


def make_objective(name: str, particles: int | None, alpha: float | None) -> str | Objective:
    """The objective; its name alone where no option is given, so that `fit` may choose them.

    Raises:
        UnknownNameError: If the name is not known.
        OptionError: If the objective has no such option, or the value cannot be used.
    """
    from pyro_vi_kit import objectives

    given = {"particles": particles, "alpha": alpha}
    made = objectives.make(name, **{k: v for k, v in given.items() if v is not None})
    return name if particles is None and alpha is None else made


def _remember(key: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def callback(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:
        # Not given behind the command's name, it may have been given before it.
        if value not in (None, False) or (key == "progress" and value is False):
            ctx.meta[f"{_META}.{key}"] = value

    return callback
