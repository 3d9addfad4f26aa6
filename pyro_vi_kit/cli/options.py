"""Options that several commands have, and how their values are read."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

import pyro_vi_kit as vi
from pyro_vi_kit.core.errors import OptionError, UnknownNameError, told

Command = TypeVar("Command", bound=Callable[..., Any])

_META = "pyro_vi_kit"
_NETCDF = (".nc", ".nc4", ".netcdf", ".h5", ".hdf5")
_DEFAULTS = {"guide": "full_rank", "objective": "elbo"}


def all_of(*options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """One decorator for several options, in this order."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _remembered(*names: str, **options: Any) -> Callable[[Any], Any]:
    """An option that may stand before the command's name or behind it, and is kept in the context."""

    def callback(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:
        # Not given behind the command's name, it may have been given before it.
        if value is not None:
            ctx.meta[f"{_META}.{parameter.name}"] = value

    return click.option(*names, default=None, expose_value=False, callback=callback, **options)


def _former(name: str) -> Callable[[Any], Any]:
    """An option of the objective by the flag that it once had, read as ``--objective-option``."""

    def callback(ctx: click.Context, parameter: click.Parameter, value: str | None) -> None:
        if value is not None:
            ctx.meta.setdefault(f"{_META}.objective", []).append(f"{name}={value}")

    return click.option(f"--{name}", hidden=True, expose_value=False, callback=callback)


common_options = all_of(
    _remembered("--debug", is_flag=True, flag_value=True, help="Show tracebacks."),
    _remembered(
        "--progress/--quiet",
        help="Show progress, or no progress and no messages; by default progress on a terminal.",
    ),
)
model_argument = click.argument("model_file", metavar="MODEL.py", type=click.Path())
json_option = click.option("--json", "as_json", is_flag=True, help="The result as JSON on stdout.")
seed_option = click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    help="The same seed gives the same numbers.",
)
init_option = click.option(
    "--init",
    default="auto",
    help="Where to start: auto, or a function of Pyro's, median, mean, sample, feasible, uniform; fit "
    "also takes origin.",
)


def _run_files(ctx: click.Context, parameter: click.Parameter, names: Sequence[str]) -> None:
    from pyro_vi_kit.model.modelfile import run_file

    for name in names:
        run_file(name)


import_option = click.option(
    "--import",
    metavar="FILE.py",
    multiple=True,
    expose_value=False,
    callback=_run_files,
    help="A file, or a module, that registers guides or objectives; may be repeated.",
)
guides_option = click.option(
    "--guides",
    metavar="A,B,...",
    default="mean_field,full_rank",
    help="See vi-kit guides.",
)
objective_option = click.option(
    "--objective", show_default=_DEFAULTS["objective"], help="See vi-kit objectives."
)
part_options = all_of(
    import_option,
    click.option(
        "--guide-option",
        "guide_options",
        multiple=True,
        metavar="NAME=VALUE",
        help="An option of the guide, as in layers=4 or 'hidden=(8, 8)'; may be repeated. Of several "
        "guides those that have it take it; planar.layers=4 is for one.",
    ),
    click.option(
        "--objective-option",
        "objective_options",
        multiple=True,
        metavar="NAME=VALUE",
        help="An option of the objective likewise, as in particles=10.",
    ),
    _former("particles"),
    _former("alpha"),
)
training_options = all_of(
    click.option("--method", default="auto", help="auto, cavi, lbfgs, moments or stochastic."),
    click.option(
        "--tol", type=float, show_default="0.01", help="Nats that the bound may fall short by."
    ),
    click.option(
        "--budget",
        type=float,
        help="Seconds after which to stop; without it auto goes by counted work, about 120 s of it.",
    ),
    click.option("--steps", type=click.IntRange(min=1), help="The most stochastic steps."),
)
nuts_options = all_of(
    click.option("--chains", type=click.IntRange(min=1), default=4),
    click.option("--draws", type=click.IntRange(min=4), default=1000, help="Draws kept per chain."),
    click.option(
        "--tune",
        type=click.IntRange(min=10),
        show_default="400 with nutpie, 800 with Pyro",
        help="Warm-up draws per chain.",
    ),
    click.option("--sampler", default="auto", help="auto, nutpie or pyro."),
)


def debugging(ctx: click.Context) -> bool:
    """Whether tracebacks are wanted."""
    return bool(ctx.meta.get(f"{_META}.debug"))


def progress_wanted() -> bool | None:
    """What ``--progress/--quiet`` says; None where neither is given."""
    return click.get_current_context().meta.get(f"{_META}.progress")


def several(kind: str, text: str, pairs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Guides or objectives separated by commas, each once, with the options that are given to each.

    Raises:
        UnknownNameError: If one is not known; names the nearest.
        OptionError: If there is none, or an option is not of the form NAME=VALUE.
    """
    known = list(vi.guides.choices() if kind == "guide" else vi.objectives.names())
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise OptionError(f"no {kind} is given; known {kind}s: {', '.join(known)}")
    for name in names:
        if name not in known:
            raise UnknownNameError(kind, name, known)
    return options_of(kind, names, pairs)


def one(kind: str, name: str | None, pairs: Sequence[str]) -> Any:
    """A guide or an objective as `fit` takes it; None where neither a name nor an option is given."""
    options = options_of(kind, [name or _DEFAULTS[kind]], pairs)
    ((chosen, own),) = options.items()
    return configured(kind, chosen, own) if name or own else None


def configured(kind: str, name: str, options: dict[str, Any]) -> Any:
    """A guide or an objective; its name alone where it has no options, so that `fit` may choose them.

    Raises:
        UnknownNameError: If the name is not known.
        OptionError: If it has no such option, or the value cannot be used.
    """
    if kind == "guide":
        vi.guides.require_choice(name)
        if name == vi.guides.AUTO:
            return name
        made: Any = vi.guides.specify(name, **options)
    else:
        made = vi.objectives.make(name, **options)
    return made if options else name


def options_of(kind: str, names: Sequence[str], pairs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What was given with ``--guide-option`` or ``--objective-option``, by guide or objective.

    Args:
        kind: ``guide`` or ``objective``.
        names: Those that are named.
        pairs: ``NAME=VALUE`` for all that have such an option, ``planar.NAME=VALUE`` for one.

    Raises:
        UnknownNameError: If one is for a part that is not named.
        OptionError: If one is not of this form, or is for ``auto``.
    """
    if kind == "objective":
        pairs = [*pairs, *click.get_current_context().meta.get(f"{_META}.objective", ())]
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    for key, value in key_values(f"--{kind}-option", pairs).items():
        part, _, option = key.rpartition(".")
        if part and part not in names:
            raise UnknownNameError(kind, part, names)
        # What none has is given to all, and refused by the first.
        takers = [part] if part else [n for n in names if _has(kind, n, option)] or names
        if takers[0] == vi.guides.AUTO:
            raise OptionError(
                f"--guide auto tries several guides and takes no --guide-option {option}: name the "
                "guide"
            )
        for name in takers:
            found[name][option] = value
    return found


def _has(kind: str, name: str, option: str) -> bool:
    """Whether a guide or an objective has an option of this name."""
    registry: Any = vi.guides.REGISTRY if kind == "guide" else vi.objectives.REGISTRY
    fields = dataclasses.fields(registry[name]) if name in registry else ()
    return any(field.name == option for field in fields)


def key_values(option: str, pairs: Sequence[str]) -> dict[str, Any]:
    """``NAME=VALUE`` with values as Python writes them: ``layers=4``, ``hidden=(8, 8)``.

    A single word stands for itself.

    Raises:
        OptionError: If one is not of this form.
    """
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = (part.strip() for part in pair.partition("="))
        if not (all(map(str.isidentifier, key.split("."))) and equals and text):
            raise OptionError(f"{option} takes NAME=VALUE, as in layers=4, got {told(pair)}")
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
