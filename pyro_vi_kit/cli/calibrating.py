"""``calibrate``: whether a guide can be believed on data such as a model makes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pyro_vi_kit.cli.options import (
    common_options,
    json_option,
    key_values,
    make_objective,
    model_argument,
    progress_wanted,
    seed_option,
)
from pyro_vi_kit.cli.output import (
    in_options,
    message,
    print_json,
    print_table,
    records,
    relative,
    write_table,
)
from pyro_vi_kit.core.errors import MissingDependencyError

if TYPE_CHECKING:
    from pyro_vi_kit.validation.calibrate import Calibration

NOT_CALIBRATED, INTERRUPTED = 3, 130


@click.command("calibrate", short_help="Fit a guide to simulated data, and find the truth.")
@model_argument
@click.option("--guide", default="full_rank", show_default=True, help="See vi-kit guides.")
@click.option(
    "--simulations",
    type=click.IntRange(min=20),
    default=200,
    show_default=True,
    help="Data sets to simulate.",
)
@click.option(
    "--draws",
    type=click.IntRange(min=19),
    default=999,
    show_default=True,
    help="Draws that each truth is ranked among.",
)
@click.option("--sites", metavar="A,B,...", show_default="all", help="Sites to rank.")
@click.option("--objective", default="elbo", show_default=True, help="See vi-kit objectives.")
@click.option("--particles", type=int, help="Draws per step, an option of the objective.")
@click.option("--alpha", type=float, help="The order, an option of the objective renyi.")
@click.option("--method", default="auto", show_default=True, help="auto, lbfgs or stochastic.")
@click.option(
    "--tol", type=float, show_default="0.01", help="Nats that the bound may fall short by."
)
@click.option("--budget", type=float, help="Seconds of each fit, after which it stops.")
@click.option("--steps", type=click.IntRange(min=1), help="The most stochastic steps of each fit.")
@click.option(
    "--guide-option",
    "guide_options",
    multiple=True,
    metavar="KEY=VALUE",
    help="An option of the guide, as in layers=4 or 'hidden=(8, 8)'. May be repeated.",
)
@seed_option
@click.option(
    "--jobs", type=click.IntRange(min=1), show_default="cores, if it pays", help="Processes."
)
@click.option("--out", type=click.Path(), help="Folder for the tables (CSV) and the pictures.")
@json_option
@common_options
@click.pass_context
def calibrate_command(
    ctx: click.Context,
    model_file: str,
    guide: str,
    sites: str | None,
    objective: str,
    particles: int | None,
    alpha: float | None,
    guide_options: tuple[str, ...],
    out: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Fit a guide to data simulated from the model, and see whether the truth lies where it says.

    Exit code 3 if it does not.
    """
    from pyro_vi_kit import guides
    from pyro_vi_kit.model.modelfile import load_model_file
    from pyro_vi_kit.validation.calibrate import calibrate
    from pyro_vi_kit.validation.suite import folder_for_results

    spec = guides.specify(guide, **key_values("--guide-option", guide_options))
    goal = make_objective(objective, particles, alpha)
    folder = None if out is None else folder_for_results(out)
    model = load_model_file(model_file)
    names = None if sites is None else [part.strip() for part in sites.split(",") if part.strip()]
    found = calibrate(
        model, spec, sites=names, objective=goal, progress=progress_wanted(), **options
    )
    if folder is not None:
        _write(folder, found)
    if as_json:
        print_json(_facts(found, None if folder is None else str(folder)))
    else:
        click.echo(in_options(f"{found!r}\n"))
        print_table(found.summary(), "--json prints all of them")
    if found.interrupted:
        ctx.exit(INTERRUPTED)
    if not found.verdict.calibrated:
        ctx.exit(NOT_CALIBRATED)


def _facts(found: Calibration, folder: str | None) -> dict[str, Any]:
    """A calibration as JSON has it."""
    return {
        "model": found.model.name,
        "guide": found.guide,
        "verdict": {"level": found.verdict.level, **vars(found.verdict)},
        "simulations": found.simulations,
        "ranked": len(found.numbers),
        "failed": len(found.failures),
        "not_converged": found.not_converged,
        "draws": found.draws,
        "seed": found.seed,
        "jobs": found.jobs,
        "seconds": found.seconds,
        "interrupted": found.interrupted,
        "folder": folder,
        "summary": records(found.summary().reset_index(names="parameter")),
    }


def _write(folder: Path, found: Calibration) -> None:
    """The tables, and pictures where they can be drawn."""
    from pyro_vi_kit import plots

    write_table(found.summary(), folder / "summary.csv", index_label="parameter")
    write_table(found.coverage(), folder / "coverage.csv", index=False)
    write_table(found.expected_coverage(), folder / "expected_coverage.csv", index=False)
    write_table(found.to_frame(), folder / "ranks.csv", index=False)
    try:
        plots.rank_ecdf(found, path=folder / "rank_ecdf.png")
        plots.coverage(found, path=folder / "coverage.png")
        plots.expected_coverage(found, path=folder / "expected_coverage.png")
    except MissingDependencyError as error:
        click.echo(f"warning: no pictures: {error}", err=True)
    message(f"wrote {', '.join(sorted(p.name for p in folder.iterdir()))} in {relative(folder)}")
