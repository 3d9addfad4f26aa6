"""``compare`` and ``bench``: many fits beside NUTS."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pyro_vi_kit.cli.options import (
    common_options,
    init_option,
    json_option,
    make_objective,
    model_argument,
    nuts_options,
    progress_wanted,
    seed_option,
    split_names,
)
from pyro_vi_kit.cli.output import message, print_json, records, relative, write_table
from pyro_vi_kit.core.errors import MissingDependencyError, OptionError

if TYPE_CHECKING:
    from pyro_vi_kit.core.export import Tree
    from pyro_vi_kit.model.model import Model
    from pyro_vi_kit.posterior import Posterior

FAILED, INTERRUPTED = 1, 130

_GUIDES = "mean_field,full_rank"


@click.command("compare", short_help="Fit guides and hold them against NUTS.")
@model_argument
@click.option("--guides", "guide_text", metavar="A,B,...", default=_GUIDES, show_default=True)
@click.option("--objective", default="elbo", show_default=True, help="See vi-kit objectives.")
@click.option("--particles", type=int, help="Draws per step, an option of the objective.")
@click.option("--alpha", type=float, help="The order, an option of the objective renyi.")
@nuts_options
@init_option
@seed_option
@click.option("--out", type=click.Path(), help="Folder for the files, the table and the pictures.")
@json_option
@common_options
def compare_command(
    model_file: str,
    guide_text: str,
    objective: str,
    particles: int | None,
    alpha: float | None,
    init: str,
    seed: int,
    out: str | None,
    as_json: bool,
    **sampler: Any,
) -> None:
    """Fit guides and print how far each is from NUTS, and how much faster."""
    from pyro_vi_kit import guides
    from pyro_vi_kit.fitting.fit import fit
    from pyro_vi_kit.model.modelfile import load_model_file
    from pyro_vi_kit.validation.compare import compare, format_overview
    from pyro_vi_kit.validation.nuts import nuts
    from pyro_vi_kit.validation.suite import folder_for_results

    names = split_names("guide", guide_text, list(guides.choices()))
    goal = make_objective(objective, particles, alpha)
    folder = None if out is None else folder_for_results(out)
    model = load_model_file(model_file)
    _refuse_impossible(model, names, objective, init)
    progress = progress_wanted()
    posteriors: dict[str, Posterior] = {}
    for name in names:
        posteriors[name] = fit(model, name, goal, init=init, seed=seed, progress=progress)
        if posteriors[name].status.reason == "interrupted":
            raise KeyboardInterrupt
        message(f"{name}: {posteriors[name].seconds:.2f} s")
    message("NUTS ...")
    start = "auto" if init == "origin" else init
    reference = nuts(model, init=start, seed=seed, progress=progress, **sampler)
    if reference.attrs["interrupted"]:
        raise KeyboardInterrupt
    frame = compare(reference, posteriors, seed=seed)
    if folder is not None:
        write_table(frame, folder / "table.csv", index=False)
        _write(folder, reference, posteriors)
    if as_json:
        place = None if folder is None else str(folder)
        facts = {"model": model.name, "folder": place, **frame.attrs}
        print_json(facts | {"table": records(frame)})
    else:
        click.echo(format_overview(frame, f"{model.name}, objective {objective}"))


@click.command("bench", short_help="Models x guides x objectives, resumable.")
@click.argument("models", metavar="MODEL.py|FOLDER...", nargs=-1, required=True, type=click.Path())
@click.option("--guides", "guide_text", metavar="A,B,...", default=_GUIDES, show_default=True)
@click.option("--objectives", "goal_text", metavar="A,B,...", default="elbo", show_default=True)
@click.option("--nuts/--no-nuts", "with_nuts", default=True, help="Beside NUTS, or fits alone.")
@nuts_options
@seed_option
@click.option("--resume", is_flag=True, help="Leave out what is done, with the same settings.")
@click.option("--out", type=click.Path(), required=True, help="Folder for results.csv and files.")
@common_options
@click.pass_context
def bench_command(
    ctx: click.Context,
    models: tuple[str, ...],
    guide_text: str,
    goal_text: str,
    with_nuts: bool,
    seed: int,
    resume: bool,
    out: str,
    **sampler: Any,
) -> None:
    """Fit all guides to all models with all objectives; may be interrupted and resumed."""
    from pyro_vi_kit import guides, objectives
    from pyro_vi_kit.validation.suite import Nuts, format_results, run

    names = split_names("guide", guide_text, list(guides.choices()))
    goals = split_names("objective", goal_text, objectives.names())
    try:
        frame = run(
            models,
            names,
            goals,
            out,
            seed=seed,
            resume=resume,
            nuts=Nuts(seed=seed, **sampler) if with_nuts else None,
            say=message,
            progress=progress_wanted(),
        )
    except KeyboardInterrupt:
        click.echo("interrupted: the same command with --resume goes on from here", err=True)
        ctx.exit(INTERRUPTED)
    click.echo(format_results(frame))
    message(f"wrote {relative(Path(out) / 'results.csv')}")
    if "failed" in frame["status"].tolist():
        ctx.exit(FAILED)


def _refuse_impossible(model: Model, names: list[str], objective: str, init: str) -> None:
    """Refuse what cannot work before anything is run."""
    from pyro_vi_kit.model.log_density import Density, initial
    from pyro_vi_kit.validation.suite import obstacle

    where = initial.checked(init, ("auto", "origin"))
    density = Density(model, init=None if isinstance(where, str) else where)
    for name in names:
        reason = obstacle(density, name, objective)
        if reason is not None:
            raise OptionError(reason)


def _write(folder: Path, reference: Tree, posteriors: dict[str, Posterior]) -> None:
    """Everything that a comparison is made of, and pictures where they can be drawn."""
    from pyro_vi_kit import plots
    from pyro_vi_kit.core.export import write

    write(reference, folder / "reference.nc")
    for name, posterior in posteriors.items():
        posterior.save(folder / f"{name}.nc")
    pictures = {
        "marginals.png": functools.partial(plots.marginals, reference, posteriors),
        "losses.png": functools.partial(plots.losses, posteriors),
    }
    try:
        for name, draw in pictures.items():
            draw(path=folder / name)
    except MissingDependencyError as error:
        click.echo(f"warning: no pictures: {error}", err=True)
    message(f"wrote {', '.join(sorted(p.name for p in folder.iterdir()))} in {relative(folder)}")
