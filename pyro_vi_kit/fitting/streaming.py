"""Fits of streamed data: what they refuse, how large a batch is, and where they start."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.core.runtime import seed_of
from pyro_vi_kit.fitting.request import Request
from pyro_vi_kit.guides import Guide
from pyro_vi_kit.model.gradients import gradient_of
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.optimize.deterministic import fixed_draws
from pyro_vi_kit.optimize.deterministic.newton import moved
from pyro_vi_kit.optimize.deterministic.parametrisation import Gaussian
from pyro_vi_kit.optimize.engines.streaming import StreamedBatches, streamed_parts
from pyro_vi_kit.optimize.result import Budget

# Rows and numbers of the sample on which a Gaussian is fitted to start from.
_ROWS = 10_000
_NUMBERS = 2_000_000
_STEPS_WORTH = 5_000


def require_streamable(request: Request, guide: object) -> None:
    """Refuse what reads all data at each step, before any of them is read.

    Raises:
        OptionError: If the data are streamed and the request is for such a fit.
    """
    if request.model.stream is None:
        return
    if request.method == "lbfgs":
        raise OptionError(
            "method='lbfgs' reads all data at each step, and these are streamed: use "
            "method='stochastic', or pass tensors, vi.Model(fn, x, y)"
        )
    if request.engine == "pyro":
        raise OptionError(
            "engine='pyro' runs the model on all data, and these are streamed: leave engine= out, or "
            "pass tensors, vi.Model(fn, x, y)"
        )
    named = guide is None or isinstance(guide, str | Guide) or hasattr(guide, "build")
    if not named:
        raise OptionError(
            "a Pyro guide callable is run by pyro.infer.SVI on all data, and these are streamed: name a "
            "guide of vi.guides.names(), or pass tensors, vi.Model(fn, x, y)"
        )


def with_batch_size(request: Request) -> Request:
    """The request with the rows of a batch: the user's, the loader's, or as many as are cheap."""
    stream = request.model.stream
    if stream is None:
        return request
    if isinstance(request.batch_size, Mapping):
        raise OptionError("batch_size= of streamed data is one number: they have one data plate")
    return dataclasses.replace(request, batch_size=stream.size_for(request.batch_size))


def require_compatible(request: Request, guide: Guide) -> None:
    """Refuse combinations of guide and objective that a stream has no right bound for.

    Raises:
        OptionError: If local latents have no encoder, or a multi-sample bound would be joint.
    """
    streamed = guide.density.streamed
    if streamed is None:
        return
    local = [site.name for site in guide.density.latents if site.name in streamed.inside]
    encoded = any(block.plate for block in guide.blocks)
    if local and not encoded:
        raise OptionError(
            f"latent site(s) {', '.join(local)} lie in plate {streamed.plate!r}, whose rows are "
            f"streamed, and guide {guide.name!r} would need a place for each of {streamed.rows:,} rows: "
            "use guide='amortized', which reads them off the batch"
        )
    if request.objective.multi_sample and not encoded:
        raise OptionError(
            f"objective {request.objective.name!r} of a model without latents in plate "
            f"{streamed.plate!r} takes the logsumexp of all data's log weights, which a batch of them "
            "does not give: use objective='elbo', or pass tensors, vi.Model(fn, x, y)"
        )


def start(
    request: Request, batches: StreamedBatches, density: Density, point: Tensor | None
) -> Gaussian:
    """A Gaussian near the posterior: fitted on a sample of rows, and moved to where all data put it.

    Args:
        request: The fit.
        batches: All data.
        density: The model's.
        point: Where to search from, `[D]`; by default from several.
    """
    stream, streamed = streamed_parts(density)
    rows = max(batches.size, min(_ROWS, _NUMBERS // stream.numbers))
    sample = stream.sample(rows, seed_of(request.seed, "rows to start from"), density.dtype)
    held = density.held(streamed.completed(sample, density.data))
    gaussian = fixed_draws.prefit(held, request.seed, request.budget, point).best
    if streamed.rows <= len(sample[0]) or batches.epoch > _STEPS_WORTH:
        return gaussian

    def evaluate(z: Tensor) -> tuple[float, Tensor] | None:
        return _log_prob_and_grad(density, z, batches.all(), request.budget)

    return moved(gaussian, evaluate, request.tolerance)


def _log_prob_and_grad(
    density: Density, z: Tensor, batches: Iterable[list[Tensor]], budget: Budget
) -> tuple[float, Tensor] | None:
    """The log density of all data at `[D]`, nats, and its gradient; None where the budget is spent."""
    streamed: Any = density.streamed
    z = z.detach().requires_grad_()
    value, gradient, shared, seen = 0.0, torch.zeros_like(z), torch.zeros(()), 0
    for data in batches:
        if budget.over:
            return None
        terms = density.terms(density.block.unpack(z.unsqueeze(0)), data=data)
        shared, rows = (part.sum() for part in streamed.split(terms))
        gradient += gradient_of(rows, z)
        value, seen = value + float(rows.detach()), seen + len(data[0])
    scale = streamed.rows / seen
    return float(shared.detach()) + scale * value, gradient_of(shared, z) + scale * gradient
