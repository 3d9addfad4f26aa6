"""What makes a model unusable: each in words that name the site, with the remedy, or None."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vi_kit.core.runtime import validation
from pyro_vi_kit.model.log_density.enumeration import Enumerated, log_total
from pyro_vi_kit.model.log_density.handlers import Replay, Visit
from pyro_vi_kit.model.log_density.runner import Runner


class Problem(NamedTuple):
    """What is wrong, and what to do about it."""

    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}: {self.remedy}"


def change_problem(first: Mapping[str, Visit], second: Mapping[str, Visit]) -> Problem | None:
    """How the sites of two runs at different latents differ."""
    if list(first) != list(second):
        changed = sorted(set(first) ^ set(second)) or list(second)
        return Problem(
            "the model's structure changes with its latents' values, site(s) "
            f"{', '.join(changed)} are not met in every run",
            "write the choice as a mixture, a mask or torch.where, or pass a Pyro guide of your "
            "own as guide= with engine='pyro'",
        )
    for name, visit in second.items():
        if first[name].value.shape != visit.value.shape:
            return Problem(
                f"site {name!r} has shape {tuple(first[name].value.shape)} in one run and "
                f"{tuple(visit.value.shape)} in the next",
                "shapes must not depend on latents; use a fixed size and mask what is not needed",
            )
    return None


def chance_problem(runner: Runner, run: Replay) -> Problem | None:
    """Which site changes when a run is repeated at the same latents; inside `Runner.first_runs`.

    That a model draws random numbers proves nothing: the initial value of a parameter that is known
    already is drawn in vain.
    """
    one, other = repetition(run), repetition(run)
    # Without validation, so that data outside a support is a number here and not an exception.
    with validation(False):
        runner.try_run(one)
        runner.try_run(other)
        for name, visit in one.visits.items():
            if name not in other.visits or not _same(visit, other.visits[name]):
                return changing_problem(name)
    return None


def changing_problem(name: str) -> Problem:
    """A site that is another one when the model is run again at the same latents."""
    return Problem(
        f"the model is not deterministic, site {name!r} differs between two runs at the "
        "same latents: it draws random numbers outside its sample sites (torch.randn, "
        "NumPy's or Python's random, dropout in training mode), or reads the time or what "
        "it has changed itself",
        "make each draw a pyro.sample site, call module.eval() first, and pass everything "
        "else as an argument",
    )


def repetition(run: Replay) -> Replay:
    """A handler that gives every latent, also a discrete one, the value that it had in a run."""
    visits = run.visits
    return Replay(
        unconstrained={
            n: v.unconstrained for n, v in visits.items() if v.unconstrained is not None
        },
        constrained={n: v.value for n, v in visits.items() if v.kind == "discrete"},
    )


def _same(one: Visit, other: Visit) -> bool:
    pairs = [(one.value, other.value)]
    # Data of a wrong shape have no density; that is another problem than this one.
    with contextlib.suppress(RuntimeError, ValueError):
        pairs.append((one.log_prob(), other.log_prob()))
    return all(a.shape == b.shape and _equal(a, b) for a, b in pairs)


def _equal(one: Tensor, other: Tensor) -> bool:
    return bool(torch.isclose(one, other, rtol=0.0, atol=0.0, equal_nan=True).all())


def sums(runner: Runner, point: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> Tensor:
    """The log joint at one point, discrete sites summed out, in two ways `[2]`, nats; unscaled.

    By elimination; and by the chain rule, log p(z) = log p(z, d) - log p(d | z) for any values d of
    the discrete sites. They are drawn, and p(z, d) is that of a plain run. The two differ where a
    model computes something else for discrete sites that hold all their values at once.
    """
    replay = Replay(unconstrained=point, enumerate=True)
    runner.run(replay, params)
    enumerated = Enumerated(replay.visits, runner.nesting)
    drawn, log_q = enumerated.draw()
    total = (
        enumerated.total()
    )  # before the next run, which writes anew into what a model closes over
    plain = Replay(unconstrained=point, constrained=drawn)
    runner.run(plain, params)
    return torch.stack([total, log_total(plain.visits) - log_q])


def sum_problem(
    discrete: Iterable[str], pairs: Tensor | None = None, error: Exception | None = None
) -> Problem | None:
    """Whether a model is right where its discrete sites hold all their values at once.

    Args:
        discrete: Those sites.
        pairs: What `sums` says, `[K, 2]`.
        error: What the model raised instead.
    """
    tolerance = 1e-8 if pairs is not None and pairs.dtype == torch.float64 else 1e-3
    if pairs is not None and torch.allclose(
        pairs[:, 0], pairs[:, 1], rtol=tolerance, atol=tolerance, equal_nan=True
    ):
        return None
    names = ", ".join(discrete)
    what = (
        "gives other log densities" if error is None else f"raised {type(error).__name__} ({error})"
    )
    return Problem(
        f"the model {what} where the discrete latent site(s) {names} hold all their values at "
        "once, as summing them out needs",
        "use them as indices, a[..., z] or Vindex(a)[..., z], or in elementwise operations and "
        "torch.where; no Python if on them, no sums over their dims, and only sites of the same "
        "plates may depend on them; or sum them out in the model",
    )


def aimless_problem(names: Iterable[str]) -> Problem:
    """Improper priors on latents that nothing else depends on, whose posterior is as improper."""
    return Problem(
        f"site(s) {', '.join(names)} have an improper prior and no influence on anything else, so that "
        "their posterior is improper",
        "give them a proper prior, or leave them out",
    )


def slope_problem(ahead: Tensor, behind: Tensor, slope: Tensor, step: float) -> Problem | None:
    """Whether gradients are those of the values.

    Args:
        ahead: Log densities `[K]` a step ahead of K points in float64, along some direction.
        behind: The same a step behind.
        slope: What autograd says about the direction, `[K]`.
        step: The step's length.
    """
    measured = (ahead - behind) / (2 * step)
    rounding = 1e-13 * (ahead.abs() + behind.abs()) / step
    # A loose bound, for badly scaled models; what is cut off from autograd is far outside of it.
    wrong = (measured - slope).abs() > 0.01 * (measured.abs() + slope.abs()) + rounding + 1e-6
    if not bool((wrong & measured.isfinite() & slope.isfinite()).all()):
        return None
    return Problem(
        "the gradient of the log density is not that of its values, some latent is cut off from it",
        "do not pass latents through NumPy, .detach(), .item() or torch.tensor([latent]); use "
        "torch functions, and torch.stack for vectors of latents",
    )
