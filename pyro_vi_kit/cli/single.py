"""``check``, ``fit`` and ``nuts``: one thing done to one model."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import click

from pyro_vi_kit.cli.options import (
    common_options,
    init_option,
    json_option,
    key_values,
    make_objective,
    model_argument,
    netcdf_target,
    nuts_options,
    progress_wanted,
    seed_option,
)
from pyro_vi_kit.cli.output import in_options, message, print_json, print_table, records, relative
from pyro_vi_kit.core.errors import FitError

if TYPE_CHECKING:
    from pathlib import Path

    from pyro_vi_kit.core.export import Tree
    from pyro_vi_kit.posterior import Posterior

WRONG_REQUEST, REJECTED, NOT_CONVERGED, INTERRUPTED = 2, 3, 3, 130

_REPORT = ("max_rhat", "min_ess_bulk", "min_ess_tail", "divergences", "seconds", "warnings")


@click.command("check", short_help="Look a model over.")
@model_argument
@json_option
@common_options
@click.pass_context
def check_command(ctx: click.Context, model_file: str, as_json: bool) -> None:
    """Look a model over: named checks, each with its remedy. Exit code 2 if one fails."""
    from pyro_vi_kit.model.checks import check
    from pyro_vi_kit.model.modelfile import load_model_file

    report = check(load_model_file(model_file), verbose=False)
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
@click.option("--objective", show_default="elbo", help="See vi-kit objectives.")
@click.option(
    "--method", default="auto", show_default=True, help="auto, cavi, lbfgs, moments, stochastic."
)
@click.option(
    "--engine", default="auto", show_default=True, help="auto, captured, compiled, eager or pyro."
)
@click.option(
    "--estimator",
    default="auto",
    show_default=True,
    help="auto, pathwise, dreg, score or stratified.",
)
@click.option(
    "--tol", type=float, show_default="0.01", help="Nats that the bound may fall short by."
)
@click.option("--budget", type=float, help="Seconds after which to stop; 120 for auto.")
@click.option("--steps", type=click.IntRange(min=1), help="The most stochastic steps.")
@click.option("--epochs", type=click.IntRange(min=1), help="Train by passes over the data.")
@click.option("--checkpoint", type=click.Path(), help="Keep the fit here; go on if it exists.")
@click.option("--resume", type=click.Path(), help="A fit written by --out, to go on from.")
@seed_option
@init_option
@click.option("--batch-size", type=int, help="Rows of the data plate in a step.")
@click.option(
    "--device", help="Where to compute: cpu, cuda, cuda:1; by default where the data are."
)
@click.option("--particles", type=int, help="Draws per step, an option of the objective.")
@click.option("--alpha", type=float, help="The order, an option of the objective renyi.")
@click.option(
    "--guide-option",
    "guide_options",
    multiple=True,
    metavar="KEY=VALUE",
    help="An option of the guide, as in layers=4 or 'hidden=(8, 8)'. May be repeated.",
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
    particles: int | None,
    alpha: float | None,
    out: str | None,
    draws: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Fit a guide; print the verdict and a summary. Exit code 3 if the verdict is reject."""
    from pyro_vi_kit.fitting.fit import fit
    from pyro_vi_kit.model.modelfile import load_model_file

    fresh = options["resume"] is None
    given = key_values("--guide-option", guide_options)
    spec = _guide(guide, given)
    goal = None
    if fresh or objective is not None or particles is not None or alpha is not None:
        goal = make_objective(objective or "elbo", particles, alpha)
    target = netcdf_target(out)
    model = load_model_file(model_file)
    try:
        posterior = fit(model, spec, goal, progress=progress_wanted(), **options)
    except FitError as error:
        _keep(error.posterior, target, draws)
        raise
    if target is not None:
        posterior.save(target, draws)
        message(f"wrote {relative(target)}")
    if as_json:
        print_json(_fit_facts(posterior, None if target is None else str(target)))
    else:
        click.echo(in_options(f"{posterior!r}\n"))
        print_table(posterior.summary(), "--json prints all of them")
    if posterior.status.reason == "interrupted":
        ctx.exit(INTERRUPTED)
    if posterior.verdict is not None and posterior.verdict.level == "reject":
        ctx.exit(REJECTED)


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
    from pyro_vi_kit.validation.nuts import nuts

    target = netcdf_target(out)
    model = load_model_file(model_file)
    tree = nuts(model, progress=progress_wanted(), **options)
    if target is not None:
        write(tree, target)
        message(f"wrote {relative(target)}")
    if as_json:
        facts = {key: tree.attrs.get(key) for key in ("model", "sampler", "seed", *_REPORT)}
        facts["converged"] = bool(tree.attrs["converged"])
        rows = records(_draws_summary(tree).reset_index(names="parameter"))
        print_json(facts | {"file": None if target is None else str(target), "summary": rows})
    else:
        click.echo(in_options(_nuts_report(tree)) + "\n")
        print_table(_draws_summary(tree), "--json prints all of them")
    if tree.attrs["interrupted"]:
        ctx.exit(INTERRUPTED)
    if not tree.attrs["converged"]:
        ctx.exit(NOT_CONVERGED)


def _keep(posterior: Posterior | None, target: Path | None, draws: int | None) -> None:
    """Write what a fit had come to in which the model raised, if it lets itself be run once more."""
    if posterior is None or target is None:
        return
    with contextlib.suppress(Exception):  # what the model raised is told of in any case
        posterior.save(target, draws)
        message(f"wrote {relative(target)}, what the fit had come to")


def _guide(name: str | None, options: dict[str, Any]) -> Any:
    """What ``--guide`` and its options stand for; None where neither is given."""
    from pyro_vi_kit import guides
    from pyro_vi_kit.core.errors import OptionError

    guides.require_choice(name)
    if name != guides.AUTO:
        return guides.specify(name or "full_rank", **options) if name or options else None
    if options:
        raise OptionError(
            f"--guide auto tries several guides and takes no --guide-option {next(iter(options))}: "
            "name the guide"
        )
    return name


def _fit_facts(posterior: Posterior, file: str | None) -> dict[str, Any]:
    """A fit as JSON has it."""
    verdict, evidence = posterior.verdict, posterior.log_evidence
    return {
        "model": posterior.model.name,
        "guide": posterior.guide,
        "objective": posterior.record.objective.name,
        "verdict": None if verdict is None else vars(verdict),
        "status": vars(posterior.status),
        "khat": posterior.khat,
        "khat_se": posterior.khat_se,
        "ess": posterior.ess,
        "elbo": posterior.elbo,
        "elbo_se": posterior.elbo_se,
        "bound": posterior.bound,
        "log_evidence": None if evidence is None else evidence[0],
        "log_evidence_se": None if evidence is None else evidence[1],
        "method": posterior.method,
        "engine": posterior.engine,
        "seed": posterior.record.seed,
        "evaluations": posterior.evaluations,
        "seconds": posterior.seconds,
        "ladder": records(posterior.ladder),
        "file": file,
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
    from pyro_vi_kit.posterior.summary import labels_in

    frame = import_arviz().summary(tree, round_to="none")
    labels = [label for site in datasets(tree)["posterior"].values() for label in labels_in(site)]
    return frame.set_axis(labels) if len(labels) == len(frame) else frame
