"""`nuts`: the reference posterior that variational ones are compared with."""

from __future__ import annotations

import importlib.metadata
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from pyro_vi_kit.capture.turns import processors
from pyro_vi_kit.core.errors import MissingDependencyError, OptionError
from pyro_vi_kit.core.export import Group, Tree, to_arviz
from pyro_vi_kit.core.options import (
    COUNT,
    SEED,
    checks,
    flag,
    integer,
    mapping,
    one_of,
    optional,
    share,
)
from pyro_vi_kit.core.progress import Progress
from pyro_vi_kit.core.runtime import RandomStream, fresh_seed, one_thread
from pyro_vi_kit.core.stopping import terminable
from pyro_vi_kit.model.groups import coords_of, model_groups, require_names, shares_outside
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.model.log_density.initial import InitFunction
from pyro_vi_kit.model.log_density.initial import checked as checked_init
from pyro_vi_kit.model.model import Model, a_model
from pyro_vi_kit.validation.nuts import with_nutpie, with_pyro
from pyro_vi_kit.validation.nuts.report import SamplerReport, SamplerWarning, diagnose
from pyro_vi_kit.validation.nuts.target import Draws, Plan, Target

SAMPLERS = {"nutpie": with_nutpie.sample, "pyro": with_pyro.sample}

_PACKAGES = {"nutpie": "nutpie", "pyro": "pyro-ppl"}
_INSIDE = "write the argument as exp, softplus or sigmoid of latents, which keep it inside"
# nutpie learns its step sizes and scales from gradients too, in fewer draws.
_TUNE = {"nutpie": 400, "pyro": 800}


@terminable
@checks(
    model=a_model,
    chains=integer(1, 10_000),
    draws=integer(4, 10**8),
    tune=optional(integer(10, 10**8)),
    seed=optional(SEED),
    sampler=one_of("sampler", (*SAMPLERS, "auto")),
    target_accept=share,
    cores=optional(COUNT),
    params=optional(mapping),
    progress=optional(flag),
)
def nuts(
    model: Model,
    *,
    chains: int = 4,
    draws: int = 1000,
    tune: int | None = None,
    seed: int | None = 0,
    sampler: str = "auto",
    target_accept: float = 0.9,
    cores: int | None = None,
    params: Mapping[str, Tensor] | None = None,
    init: str | Mapping[str, Any] | InitFunction = "auto",
    progress: bool | None = None,
) -> Tree:
    """Sample the posterior with NUTS, and say whether the chains converged.

    Chains start uniformly within 2 of the origin of unconstrained space, each elsewhere. Learned
    parameters (``pyro.param``, ``pyro.module``) are held fixed. The user's random state and
    parameter store are left alone. It runs on the CPU: data that are elsewhere are copied.

    Args:
        model: The model and its data. Discrete latents are summed out, and drawn afterwards.
        chains: Independent chains. Fewer than two cannot show whether they agree.
        draws: Draws kept per chain.
        tune: Warm-up draws per chain, thrown away; 400 with nutpie and 800 with Pyro by default.
        seed: The same seed, sampler and machine give the same draws, as long as gradients are computed
            by the same means (``engine`` below): C, which small models of enough draws get if there is
            a compiler, or for others one compiled by Inductor, which takes over in long runs and is
            kept for the next. Each rounds otherwise, and chains magnify that.
            ``PYRO_VI_KIT_COMPILE=off`` in the environment rules both out. None for a fresh seed.
        sampler: ``nutpie``; ``pyro``, Pyro's own; ``auto``, nutpie where it is installed.
        target_accept: Mean acceptance probability to tune the step size to, between 0 and 1.
            Nearer to 1 it takes smaller steps, with fewer divergences.
        cores: nutpie's chains that run at once. By default as many as there are processors where
            gradients are in C or captured, less one while Inductor is at work on them. Others take
            turns in Python's interpreter, and run one chain after another.
        params: Unconstrained learned parameters by name, as ``Density.params`` has them, in the
            place of the model's own.
        init: Where chains start instead, each as far from it as the density lets it: a dict of site
            values, or a function of the site as `fit` takes it, for models that few points suit.
        progress: Show progress on stderr; None for only on a terminal.

    Returns:
        An ArviZ object with the groups that a fit's ``to_arviz`` has and ``sample_stats``. Its
        attrs say how it was made (``sampler``, ``seed``, ``draws``, ``tune``, ``seconds`` of
        sampling with warm-up, ``evaluations`` of the gradient, the ``engine`` that computed it,
        ``frozen_parameters``) and how it went (``max_rhat``, ``min_ess_bulk``, ``min_ess_tail``,
        ``divergences``, ``converged`` as 1 or 0, ``warnings``); see `SamplerReport`. On Ctrl-C it holds
        the draws until then, ``interrupted`` is 1, and ``converged`` 0.

    Raises:
        OptionError: If an option cannot be used.
        MissingDependencyError: If ``sampler="nutpie"`` and nutpie is not installed.
        ModelError: If the model cannot be sampled.

    Warns:
        SamplerWarning: For each problem of the draws, and where ``auto`` falls back on Pyro.
    """
    if model.stream is not None:
        raise OptionError(
            "nuts reads all data at each step, and those of this model are streamed: pass tensors, "
            "vi.Model(fn, x, y)"
        )
    init = checked_init(init, ("auto",))
    where = None if isinstance(init, str) else init
    name = _choose(sampler)
    seed = fresh_seed() if seed is None else seed
    plan = Plan(
        chains, draws, _TUNE[name] if tune is None else tune, seed, target_accept, cores or 1
    )
    total = chains * (draws + plan.tune)
    # The caller may be inside torch.no_grad().
    with torch.enable_grad(), one_thread():
        # One point at a time, from NumPy and back: that is the CPU's work, wherever the data are.
        density = Density(model, dtype=torch.float64, device="cpu", init=where)
        require_names(density)
        target = Target(density, params)
        threads = target.threads(total, processors())
        if cores is None:
            plan = replace(plan, cores=min(chains, threads))
        before = time.perf_counter()
        try:
            with Progress(f"NUTS, {chains} chains", total, progress) as bar:
                result = SAMPLERS[name](target, plan, bar)
        finally:
            target.gradients.stop()
        seconds = time.perf_counter() - before
    asked, (made, length) = plan, result.z.shape[:2]
    plan = replace(plan, chains=made, draws=length)
    facts = {
        "model": model.name,
        "sampler": name,
        "sampler_version": importlib.metadata.version(_PACKAGES[name]),
        **asdict(plan),
        "seconds": seconds,
        "evaluations": target.evaluations,
        "engine": target.engine,
        "frozen_parameters": ", ".join(target.params),
        "interrupted": int(result.interrupted),
    }
    groups = _groups(target, plan, result)
    judged = {"posterior": _sampled_group(target, groups), "sample_stats": groups["sample_stats"]}
    report = diagnose(to_arviz(judged, coords_of(model, groups)))
    report = _with_domain(report, target, result)
    if result.interrupted:
        words = (
            f"interrupted: there are {made} of {asked.chains} chains, of {length:,} of "
            f"{asked.draws:,} draws"
        )
        report = replace(report, converged=False, problems=(words, *report.problems))
    for problem in report.problems:
        warnings.warn(problem, SamplerWarning, stacklevel=2)
    return to_arviz(groups, coords_of(model, groups), facts | _verdict(report))


def _choose(sampler: str) -> str:
    """The sampler to use."""
    if sampler == "nutpie":
        with_nutpie.import_nutpie()
    if sampler != "auto":
        return sampler
    try:
        with_nutpie.import_nutpie()
    except MissingDependencyError:
        warnings.warn(
            "nutpie is not installed, so Pyro's NUTS runs, which is several times slower: "
            "pip install 'pyro_vi_kit[nuts]'",
            SamplerWarning,
            stacklevel=3,
        )
        return "pyro"
    return "nutpie"


def _groups(target: Target, plan: Plan, result: Draws) -> dict[str, Group]:
    """Draws and statistics in the groups that a variational posterior has."""
    z = target.density.block.unpack(torch.from_numpy(result.z).flatten(0, 1))
    groups = model_groups(
        target.density, z, chains=plan.chains, params=target.params, seed=plan.seed
    )
    return groups | {"sample_stats": Group(result.stats)}


def _sampled_group(target: Target, groups: Mapping[str, Group]) -> Group:
    """The posterior without discrete sites, which are drawn afresh at each draw of the chains."""
    discrete = {site.name for site in target.density.discrete}
    variables = groups["posterior"].variables
    kept = {name: values for name, values in variables.items() if name not in discrete}
    return replace(groups["posterior"], variables=kept)


def _with_domain(report: SamplerReport, target: Target, result: Draws) -> SamplerReport:
    """The report, with what leaves the domain of a distribution at draws or where chains turned."""
    density = target.density
    z = density.block.unpack(torch.from_numpy(result.z).flatten(0, 1))
    with RandomStream(0, "draws"):
        shares = shares_outside(density, z, target.params)
    problems = [
        f"{100 * share:.3g} % of the draws are where the density is zero ({what}): {_INSIDE}"
        for what, share in shares.items()
    ]
    if report.divergences and not shares:
        problems += [
            f"the density is zero at some latents (site {site!r}: {what}), and transitions that meet "
            f"them count as divergent: {_INSIDE}"
            for site, what in density.leaving.items()
        ]
    converged = report.converged and not shares
    return replace(report, converged=converged, problems=(*report.problems, *problems))


def _verdict(report: SamplerReport) -> dict[str, Any]:
    """The report as attrs of a file, which keeps neither booleans nor lists of one text."""
    facts = asdict(report)
    problems = "; ".join(facts.pop("problems"))
    return facts | {"converged": int(report.converged), "warnings": problems}
