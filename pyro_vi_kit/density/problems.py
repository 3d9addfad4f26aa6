"""What makes a model unusable, each said in words that name the site and the remedy, or None."""

from __future__ import annotations

from collections.abc import Mapping

import pyro
import torch
from torch import Tensor

from pyro_vi_kit.density.handlers import Replay, Visit
from pyro_vi_kit.density.runner import Runner


def change_problem(first: Mapping[str, Visit], second: Mapping[str, Visit]) -> str | None:
    """How the sites of two runs at different latents differ."""
    if list(first) != list(second):
        changed = sorted(set(first) ^ set(second)) or list(second)
        return (
            f"the model's structure changes with its latents' values: site(s) {', '.join(changed)} "
            "are not met in every run. Write the choice as a mixture, a mask or torch.where, or "
            "pass a Pyro guide of your own as guide= with engine='pyro'."
        )
    for name, visit in second.items():
        if first[name].value.shape != visit.value.shape:
            return (
                f"site {name!r} has shape {tuple(first[name].value.shape)} in one run and "
                f"{tuple(visit.value.shape)} in the next: shapes must not depend on latents."
            )
    return None


def chance_problem(runner: Runner, run: Replay) -> str | None:
    """Which site changes when a run is repeated at the same latents; inside `Runner.first_runs`.

    That a model draws random numbers proves nothing: the initial value of a parameter that is known
    already is drawn in vain.
    """
    point = {n: v.unconstrained for n, v in run.visits.items() if v.unconstrained is not None}
    one, other = Replay(unconstrained=point), Replay(unconstrained=point)
    # Without validation, so that data outside a support is a number here and not an exception.
    with pyro.validation_enabled(False):
        runner.try_run(one)
        runner.try_run(other)
        for name, visit in one.visits.items():
            if name not in other.visits or not _same(visit, other.visits[name]):
                return (
                    f"the model draws random numbers outside its sample sites: site {name!r} "
                    "differs between two runs at the same latents (torch.randn, dropout in "
                    "training mode, ...). Make each draw a pyro.sample site, or call "
                    "module.eval() first."
                )
    return None


def _same(one: Visit, other: Visit) -> bool:
    pairs = [(one.value, other.value), (one.log_prob(), other.log_prob())]
    return all(a.shape == b.shape and _equal(a, b) for a, b in pairs)


def _equal(one: Tensor, other: Tensor) -> bool:
    return bool(torch.isclose(one, other, rtol=0.0, atol=0.0, equal_nan=True).all())


def discrete_problem(visits: Mapping[str, Visit]) -> str | None:
    """Discrete latents."""
    discrete = [visit.name for visit in visits.values() if visit.kind == "discrete"]
    if not discrete:
        return None
    return (
        f"discrete latent site(s) {', '.join(discrete)}: a continuous guide cannot hold them. Sum "
        "them out in the model (dist.MixtureSameFamily, dist.DiscreteHMM, or a pyro.factor with "
        "logsumexp), or pass a Pyro guide of your own as guide=."
    )


def latents_problem(visits: Mapping[str, Visit]) -> str | None:
    """Nothing to infer."""
    if any(visit.kind == "latent" for visit in visits.values()):
        return None
    return (
        "the model has no latent sites: every pyro.sample is observed or there is none, so there "
        "is nothing to infer"
    )


def data_problem(visit: Visit) -> str | None:
    """NaN at an observed site, or values that its distribution cannot produce."""
    value = visit.value
    if value.is_floating_point() and value.isnan().any():
        return (
            f"the data at site {visit.name!r} hold {int(value.isnan().sum())} NaN: drop the rows, "
            "or fill the values and hide them with poutine.mask"
        )
    outside = _outside(visit)
    if outside:
        return (
            f"the data at site {visit.name!r} hold {outside} value(s) outside the support of its "
            f"{type(visit.fn).__name__}, {visit.fn.support}: their density is zero everywhere. "
            "Correct the values, or choose a distribution that can produce them."
        )
    return None


def _outside(visit: Visit) -> int:
    """How many observations are outside the support; none where a mask may hide them."""
    masked = isinstance(visit.mask, Tensor) or visit.mask is False
    if masked or type(visit.fn).__name__ == "MaskedDistribution":
        return 0
    try:
        return int((~visit.fn.support.check(visit.value)).sum())
    except (NotImplementedError, AttributeError):
        return 0
