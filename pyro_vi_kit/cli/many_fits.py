"""``compare`` and ``bench``: many fits beside NUTS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import pyro_vi_kit as vi
from pyro_vi_kit.cli.options import (
    common_options,
    configured,
    guides_option,
    init_option,
    json_option,
    model_argument,
    nuts_options,
    objective_option,
    one,
    part_options,
    progress_wanted,
    seed_option,
    several,
)
from pyro_vi_kit.cli.output import (
    message,
    print_json,
    records,
    relative,
    write_pictures,
    write_table,
)
from pyro_vi_kit.core.errors import OptionError

FAILED, INTERRUPTED = 1, 130


@click.command("compare", short_help="Fit guides and hold them against NUTS.")
@model_argument
@guides_option
@objective_option
@part_options
@nuts_options
@init_option
@seed_option
@click.option("--out", type=click.Path(), help="Folder for the files, the table and the pictures.")
@json_option
@common_options
def compare_command(
    model_file: str,
    guides: str,
    objective: str | None,
    guide_options: tuple[str, ...],
    objective_options: tuple[str, ...],
    init: str,
    seed: int,
    out: str | None,
    as_json: bool,
    **sampler: Any,
) -> None:
    """Fit guides and print how far each is from NUTS, and how much faster."""
    from pyro_vi_kit import plots
    from pyro_vi_kit.core.export import write
    from pyro_vi_kit.core.files import folder_for_results
    from pyro_vi_kit.model.modelfile import load_model_file
    from pyro_vi_kit.validation.compare import format_overview

    folder = None if out is None else folder_for_results(out)
    # It may register a guide or an objective of its own.
    model = load_model_file(model_file)
    named = several("guide", guides, guide_options)
    specs = {name: configured("guide", name, own) for name, own in named.items()}
    goal = one("objective", objective or "elbo", objective_options)
    _refuse_impossible(model, specs, goal, init)
    progress = progress_wanted()
    posteriors: dict[str, Any] = {}
    for name, spec in specs.items():
        posteriors[name] = vi.fit(model, spec, goal, init=init, seed=seed, progress=progress)
        if posteriors[name].status.reason == "interrupted":
            raise KeyboardInterrupt
        message(f"{name}: {posteriors[name].seconds:.2f} s")
    message("NUTS ...")
    start = "auto" if init == "origin" else init
    reference = vi.nuts(model, init=start, seed=seed, progress=progress, **sampler)
    if reference.attrs["interrupted"]:
        raise KeyboardInterrupt
    frame = vi.compare(reference, posteriors, seed=seed)
    if folder is not None:
        write_table(frame, folder / "table.csv", index=False)
        write(reference, folder / "reference.nc")
        for name, posterior in posteriors.items():
            posterior.save(folder / f"{name}.nc")
        write_pictures(
            folder,
            {
                "marginals.png": lambda path: plots.marginals(reference, posteriors, path=path),
                "losses.png": lambda path: plots.losses(posteriors, path=path),
            },
        )
    if as_json:
        facts = {"model": model.name, "folder": folder, **frame.attrs}
        print_json(facts | {"table": records(frame)})
    else:
        click.echo(format_overview(frame, f"{model.name}, objective {objective or 'elbo'}"))


@click.command("bench", short_help="Models x guides x objectives, resumable.")
@click.argument("models", metavar="MODEL.py|FOLDER...", nargs=-1, required=True, type=click.Path())
@guides_option
@click.option("--objectives", metavar="A,B,...", default="elbo", help="See vi-kit objectives.")
@part_options
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
    guides: str,
    objectives: str,
    guide_options: tuple[str, ...],
    objective_options: tuple[str, ...],
    with_nuts: bool,
    seed: int,
    resume: bool,
    out: str,
    **sampler: Any,
) -> None:
    """Fit all guides to all models with all objectives; may be interrupted and resumed."""
    from pyro_vi_kit.validation.suite import Nuts, format_results, load_models, run

    loaded = load_models(models)  # which may register guides and objectives of their own
    try:
        frame = run(
            loaded,
            several("guide", guides, guide_options),
            several("objective", objectives, objective_options),
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


def _refuse_impossible(model: Any, specs: dict[str, Any], goal: Any, init: str) -> None:
    """Refuse what cannot work before anything is run."""
    from pyro_vi_kit.model.log_density import Density, initial
    from pyro_vi_kit.validation.suite import obstacle

    where = initial.checked(init, ("auto", "origin"))
    density = Density(model, init=None if isinstance(where, str) else where)
    for spec in specs.values():
        reason = obstacle(density, spec, goal)
        if reason is not None:
            raise OptionError(reason)
