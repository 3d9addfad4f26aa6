"""NumPyro's steps on eight schools: `svi.update` in a compiled loop, and called from Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import random
from numpyro.distributions import constraints
from numpyro.distributions.transforms import LowerCholeskyAffine, PermuteTransform, Transform
from numpyro.infer import SVI, RenyiELBO, Trace_ELBO
from numpyro.infer.autoguide import AutoContinuous, AutoNormal

from benchmarks.lib.clock import pace
from benchmarks.peers.numpyro_models import eight_schools_noncentered
from benchmarks.peers.numpyro_svi import start, stepper
from benchmarks.peers.schools import LAYERS, SIGMA, WIDTH, Y

RATE = 0.005


def run(
    guide: str, objective: str, particles: int, loop: bool, seconds: float, seed: int
) -> dict[str, Any]:
    """Steps of NumPyro's SVI.

    Args:
        guide: ``mean_field`` (AutoNormal) or ``affine_coupling`` (the flow that ours is).
        objective: ``elbo`` or ``iwae``.
        particles: K.
        loop: All steps of a stretch in one compiled loop; otherwise one compiled call each.
        seconds: How long to go on.
        seed: Of the noise.
    """
    jax.config.update("jax_enable_x64", True)
    loss = (
        Trace_ELBO(num_particles=particles)
        if objective == "elbo"
        else RenyiELBO(alpha=0.0, num_particles=particles)
    )
    arguments = (jnp.array(SIGMA), jnp.array(Y))

    def set_up() -> Callable[[int], object]:
        kind = AutoNormal if guide == "mean_field" else Coupling
        model = eight_schools_noncentered
        svi = SVI(model, kind(model), numpyro.optim.Adam(RATE), loss)
        state = start(svi, seed, arguments)
        compiled = stepper(svi, arguments)
        update = jax.jit(svi.update)

        def in_loop(steps: int) -> None:
            nonlocal state
            state = compiled(state, steps)

        def one_by_one(steps: int) -> None:
            nonlocal state
            for _ in range(steps):
                state, _ = update(state, *arguments)
            jax.block_until_ready(state)

        return in_loop if loop else one_by_one

    return pace(set_up, seconds=seconds, stretch=1000 if loop else 100)


class Coupling(AutoContinuous):
    """`affine_coupling` with its defaults: tanh layers whose halves change roles, a triangular map."""

    def _get_posterior(self) -> Any:
        dim = self.latent_dim
        split = dim // 2
        base = dist.Normal(jnp.zeros(dim), 1.0).to_event(1)
        parts: list[Any] = []
        for i in range(LAYERS):
            start = random.normal(random.PRNGKey(i), (split, WIDTH)) / split**0.5
            weights = (
                numpyro.param(f"weight_{i}_0", start),
                numpyro.param(f"bias_{i}_0", jnp.zeros(WIDTH)),
                numpyro.param(f"weight_{i}_1", jnp.zeros((WIDTH, 2 * (dim - split)))),
                numpyro.param(f"bias_{i}_1", jnp.zeros(2 * (dim - split))),
            )
            parts.append(_CouplingTransform(split, weights))
            if i % 2:
                parts.append(PermuteTransform(random.permutation(random.PRNGKey(100 + i), dim)))
        loc = numpyro.param("loc", jnp.zeros(dim))
        tril = numpyro.param(
            "tril", 0.1 * jnp.eye(dim), constraint=constraints.scaled_unit_lower_cholesky
        )
        return dist.TransformedDistribution(base, [*parts, LowerCholeskyAffine(loc, tril)])


class _CouplingTransform(Transform):
    domain = constraints.real_vector
    codomain = constraints.real_vector

    def __init__(self, split: int, weights: tuple[Any, ...]) -> None:
        self.split, self.weights = split, weights

    def _moments(self, given: Any) -> Any:
        inward, inner, outward, outer = self.weights
        raw, shift = jnp.split(jnp.tanh(given @ inward + inner) @ outward + outer, 2, -1)
        return 2.0 * jnp.tanh(raw), shift

    def __call__(self, x: Any) -> Any:
        return self.call_with_intermediates(x)[0]

    def call_with_intermediates(self, x: Any) -> Any:
        given, moved = x[..., : self.split], x[..., self.split :]
        log_scale, shift = self._moments(given)
        y = jnp.concatenate([shift + jnp.exp(log_scale) * moved, given], -1)
        return y, log_scale.sum(-1)

    def _inverse(self, y: Any) -> Any:
        given = y[..., y.shape[-1] - self.split :]
        moved = y[..., : y.shape[-1] - self.split]
        log_scale, shift = self._moments(given)
        return jnp.concatenate([given, (moved - shift) * jnp.exp(-log_scale)], -1)

    def log_abs_det_jacobian(self, x: Any, y: Any, intermediates: Any = None) -> Any:
        if intermediates is not None:
            return intermediates
        return self._moments(x[..., : self.split])[0].sum(-1)

    def tree_flatten(self) -> Any:
        return (self.weights,), (("weights",), {"split": self.split})
