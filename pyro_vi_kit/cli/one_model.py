"""``check``, ``fit``, ``nuts`` and ``calibrate``: one thing done to one model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

import pyro_vi_kit as vi
from pyro_vi_kit.cli.options import (
    common_options,
    init_option,
    json_option,
    model_argument,
    netcdf_target,
    nuts_options,
    objective_option,
    one,
    part_options,
    progress_wanted,
    seed_option,
    training_options,
)
from pyro_vi_kit.cli.output import (
    message,
    print_json,
    print_result,
    records,
    relative,
    write_pictures,
    write_table,
)
from pyro_vi_kit.core.errors import FitError, in_words

if TYPE_CHECKING:
    from pathlib import Path

    from pyro_vi_kit.core.export import Tree
    from pyro_vi_kit.posterior import Posterior
    from pyro_vi_kit.validation.calibrate import Calibration

# Exit codes; 3 where something was found, and is not to be believed.
WRONG_REQUEST, UNBELIEVABLE, INTERRUPTED = 2, 3, 130

_REPORT = ("max_rhat", "min_ess_bulk", "min_ess_tail", "divergences", "seconds", "warnings")


@click.command("check", short_help="Look a model over.")
@model_argument
@json_option
@common_options
@click.pass_context
def check_command(ctx: click.Context, model_file: str, as_json: bool) -> None:
    """Look a model over: named checks, each with its remedy. Exit code 2 if one fails."""
    from pyro_vi_kit.model.modelfile import load_model_file

    report = vi.check(load_model_file(model_file), verbose=False)
    if as_json:
        checks = [{**vars(check)} for check in report.checks]
        print_json({"model": report.model, "ok": report.ok, "checks": checks})
    else:
        click.echo(str(report))
    if not report.ok:
        ctx.exit(WRONG_REQUEST)


@click.command("fit", short_help="Fit a guide, with a verdict.")
@model_argument
@click.option("--guide", show_default="full_rank", help="See vi-kit guides; auto tries several.")
@objective_option
@part_options
@training_options
@click.option("--engine", default="auto", help="auto, captured, compiled, eager or pyro.")
@click.option("--estimator", default="auto", help="auto, or see vi-kit estimators.")
@click.option("--epochs", type=click.IntRange(min=1), help="Train by passes over the data.")
@click.option("--checkpoint", type=click.Path(), help="Keep the fit here; go on if it exists.")
@click.option("--resume", type=click.Path(), help="A fit written by --out, to go on from.")
@seed_option
@init_option
@click.option("--batch-size", type=int, help="Rows of the data plate in a step.")
@click.option(
    "--device", help="Where to compute: cpu, cuda, cuda:1; by default where the data are."
)
@click.option("--out", type=click.Path(), help="Write the posterior here, ArviZ netCDF (.nc).")
@click.option(
    "--draws",
    type=click.IntRange(min=1),
    help="Draws in the file; by default 1,000, and down to 100 where a draw makes many numbers.",
)
@json_option
@common_options
@click.pass_context
def fit_command(
    ctx: click.Context,
    model_file: str,
    guide: str | None,
    objective: str | None,
    guide_options: tuple[str, ...],
    objective_options: tuple[str, ...],
    out: str | None,
    draws: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Fit a guide; print the verdict and a summary. Exit code 3 if the verdict is reject."""
    from pyro_vi_kit.model.modelfile import load_model_file

    target = netcdf_target(out)
    # It may register a guide or an objective of its own.
    model = load_model_file(model_file)
    spec, goal = one("guide", guide, guide_options), one("objective", objective, objective_options)
    if goal is None and options["resume"] is None:
        goal = "elbo"
    try:
        posterior = vi.fit(model, spec, goal, progress=progress_wanted(), **options)
    except FitError as error:
        _keep(error.posterior, target, draws)
        raise
    if target is not None:
        posterior.save(target, draws)
        message(f"wrote {relative(target)}")
    if as_json:
        print_json(_fit_facts(posterior) | {"file": target})
    else:
        print_result(f"{posterior!r}\n", posterior.summary())
    if posterior.status.reason == "interrupted":
        ctx.exit(INTERRUPTED)
    if posterior.verdict is not None and posterior.verdict.level == "reject":
        ctx.exit(UNBELIEVABLE)


@click.command("nuts", short_help="Sample with NUTS.")
@model_argument
@nuts_options
@click.option("--cores", type=click.IntRange(min=1), help="nutpie's chains that run at once.")
@init_option
@seed_option
@click.option("--out", type=click.Path(), help="Write the draws here, ArviZ netCDF (.nc).")
@json_option
@common_options
@click.pass_context
def nuts_command(
    ctx: click.Context, model_file: str, out: str | None, as_json: bool, **options: Any
) -> None:
    """Sample with NUTS; print whether the chains converged and a summary.

    Exit code 3 if they did not.
    """
    from pyro_vi_kit.core.export import write
    from pyro_vi_kit.model.modelfile import load_model_file

    target = netcdf_target(out)
    model = load_model_file(model_file)
    tree = vi.nuts(model, progress=progress_wanted(), **options)
    if target is not None:
        write(tree, target)
        message(f"wrote {relative(target)}")
    converged, summary = bool(tree.attrs["converged"]), _draws_summary(tree)
    if as_json:
        facts = {key: tree.attrs.get(key) for key in ("model", "sampler", "seed", *_REPORT)}
        rows = records(summary.reset_index(names="parameter"))
        print_json(facts | {"converged": converged, "file": target, "summary": rows})
    else:
        print_result(f"{_nuts_report(tree)}\n", summary)
    if tree.attrs["interrupted"]:
        ctx.exit(INTERRUPTED)
    if not converged:
        ctx.exit(UNBELIEVABLE)


@click.command("calibrate", short_help="Fit a guide to simulated data, and find the truth.")
@model_argument
@click.option("--guide", default="full_rank", help="See vi-kit guides.")
@click.option(
    "--simulations",
    type=click.IntRange(min=20),
    default=200,
    help="Data sets to simulate.",
)
@click.option(
    "--draws",
    type=click.IntRange(min=19),
    default=999,
    help="Draws that each truth is ranked among.",
)
@click.option("--sites", metavar="A,B,...", show_default="all", help="Sites to rank.")
@objective_option
@part_options
@training_options
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
    objective: str | None,
    guide_options: tuple[str, ...],
    objective_options: tuple[str, ...],
    out: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Fit a guide to data simulated from the model, and see whether the truth lies where it says.

    Exit code 3 if it does not.
    """
    from pyro_vi_kit.core.files import folder_for_results
    from pyro_vi_kit.model.modelfile import load_model_file

    folder = None if out is None else folder_for_results(out)
    model = load_model_file(model_file)
    spec, goal = one("guide", guide, guide_options), one("objective", objective, objective_options)
    names = None if sites is None else [part.strip() for part in sites.split(",") if part.strip()]
    found = vi.calibrate(
        model, spec, sites=names, objective=goal, progress=progress_wanted(), **options
    )
    if folder is not None:
        _write_calibration(folder, found)
    if as_json:
        print_json(_calibration_facts(found) | {"folder": folder})
    else:
        print_result(f"{found!r}\n", found.summary())
    if found.interrupted:
        ctx.exit(INTERRUPTED)
    if not found.verdict.calibrated:
        ctx.exit(UNBELIEVABLE)


def _keep(posterior: Posterior | None, target: Path | None, draws: int | None) -> None:
    """Write what a fit had come to in which the model raised, if it lets itself be run once more."""
    if posterior is None or target is None:
        return
    try:
        posterior.save(target, draws)
    except Exception as error:  # noqa: BLE001  what the model raised is told of in any case
        message(f"what the fit had come to was not written: {in_words(error)}")
    else:
        message(f"wrote {relative(target)}, what the fit had come to")


def _fit_facts(posterior: Posterior) -> dict[str, Any]:
    """A fit as JSON has it."""
    names = ("guide", "khat", "khat_se", "ess", "elbo", "elbo_se", "bound", "method", "engine")
    evidence = posterior.log_evidence or (None, None)
    return {
        "model": posterior.model.name,
        "objective": posterior.record.objective.name,
        "verdict": None if posterior.verdict is None else vars(posterior.verdict),
        "status": vars(posterior.status),
        **{name: getattr(posterior, name) for name in (*names, "evaluations", "seconds")},
        "log_evidence": evidence[0],
        "log_evidence_se": evidence[1],
        "seed": posterior.record.seed,
        "ladder": records(posterior.ladder),
        "summary": records(posterior.summary().reset_index(names="parameter")),
    }


def _nuts_report(tree: Tree) -> str:
    """Whether to believe the chains, first of all."""
    facts = tree.attrs
    converged = "converged" if facts["converged"] else f"NOT converged: {facts['warnings']}"
    return "\n".join(
        [
            f"NUTS posterior of {facts['model']}: {converged}",
            f"  R-hat    {facts['max_rhat']:.4f} at the most",
            f"  ESS      {facts['min_ess_bulk']:,.0f} bulk, {facts['min_ess_tail']:,.0f} tail, at "
            "the least",
            f"  diverged {facts['divergences']} transitions",
            f"  made by  {facts['sampler']}: {facts['chains']} chains of {facts['draws']:,} draws "
            f"after {facts['tune']:,} of warm-up, {facts['evaluations']:,} gradient evaluations in "
            f"{facts['seconds']:.2f} s",
        ]
    )


def _draws_summary(tree: Tree) -> Any:
    """ArviZ's summary: mean, sd, interval, Monte Carlo errors, ESS and R-hat of each number."""
    from pyro_vi_kit.core.export import datasets, import_arviz
    from pyro_vi_kit.posterior.labels import labels_in

    frame = import_arviz().summary(tree, round_to="none")
    labels = [label for site in datasets(tree)["posterior"].values() for label in labels_in(site)]
    return frame.set_axis(labels) if len(labels) == len(frame) else frame


def _calibration_facts(found: Calibration) -> dict[str, Any]:
    """A calibration as JSON has it."""
    names = ("guide", "simulations", "not_converged", "draws", "seed", "jobs", "seconds")
    return {
        "model": found.model.name,
        "verdict": {"level": found.verdict.level, **vars(found.verdict)},
        "ranked": len(found.numbers),
        "failed": len(found.failures),
        **{name: getattr(found, name) for name in (*names, "interrupted")},
        "summary": records(found.summary().reset_index(names="parameter")),
    }


def _write_calibration(folder: Path, found: Calibration) -> None:
    """The tables, and pictures where they can be drawn."""
    from pyro_vi_kit import plots

    write_table(found.summary(), folder / "summary.csv", index_label="parameter")
    write_table(found.coverage(), folder / "coverage.csv", index=False)
    write_table(found.expected_coverage(), folder / "expected_coverage.csv", index=False)
    write_table(found.to_frame(), folder / "ranks.csv", index=False)
    write_pictures(
        folder,
        {
            "rank_ecdf.png": lambda path: plots.rank_ecdf(found, path=path),
            "coverage.png": lambda path: plots.coverage(found, path=path),
            "expected_coverage.png": lambda path: plots.expected_coverage(found, path=path),
        },
    )
