"""Whether a model makes use of the values between the states of its relaxed discrete sites."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.core.runtime import RandomStream
from pyro_vi_kit.model.log_density.density import Density

_SEED = 512


def require_smooth(density: Density) -> None:
    """Refuse a model that rounds the value of a relaxed site, or uses it as an index.

    At one point, the rest of the model has to have a derivative in it wherever its states matter.

    Raises:
        OptionError: With the remedy.
    """
    drawn = density.drawn
    relaxed = [s.name for s in density.latents if s.states and drawn and drawn.of(s.name)]
    if not relaxed:
        return
    with RandomStream(_SEED):
        flat = density.cast(torch.randn(1, density.dim, dtype=density.dtype, device="cpu"))
    z = density.within(density.block.unpack(flat))
    for name in relaxed:
        weights = z[name].detach().requires_grad_()
        total = _others(density, z | {name: weights}, name)
        slope = None
        if total.requires_grad:
            (slope,) = torch.autograd.grad(total, weights, allow_unused=True)
        if slope is None or not bool((slope != 0).any()):
            whole = [torch.zeros_like(z[name]).index_fill(-1, i, 1.0) for i in _states(z[name])]
            ends = [_others(density, z | {name: one}, name) for one in whole]
            if any(not torch.isclose(end, total) for end in ends):
                raise OptionError(
                    f"discrete='relaxed' gives the model values between the states of site {name!r}, "
                    "and it rounds them or uses them as an index: multiply by them (a one-hot row times "
                    f"a table, 1 - z and z), or take discrete={{{name!r}: 'score'}}"
                )


def _states(weights: Tensor) -> list[Tensor]:
    return list(torch.arange(weights.shape[-1], device=weights.device).unsqueeze(-1).unbind())


def _others(density: Density, z: Mapping[str, Tensor], name: str) -> Tensor:
    """The log density of all sites but this one at the first point, nats."""
    visits = density.differentiable_visits(z)
    parts = [
        visit.log_prob().sum() for site, visit in visits.items() if site != name and visit.counts
    ]
    return torch.stack([density.cast(torch.zeros(())), *parts]).sum()
