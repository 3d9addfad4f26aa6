"""NUTS by Pyro itself, on the same density: needs nothing else, and takes several times as long."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor

from pyro_vi_kit.groups import in_chunks, width_of
from pyro_vi_kit.progress import Progress
from pyro_vi_kit.runtime import RandomStream, isolated
from pyro_vi_kit.sampling.target import Draws, Plan, Target


def sample(target: Target, plan: Plan, progress: Progress) -> Draws:
    """Run Pyro's chains one after another.

    Pyro is given the density, not the model: it knows nothing of transforms that change with other
    latents, and would sample priors to start from, which improper ones cannot be.

    Raises:
        ModelError: If the model raised, or no chain could start.
    """
    seeds = np.random.SeedSequence(plan.seed).generate_state(plan.chains)
    chains = [_chain(target, plan, int(seed), progress) for seed in seeds]
    z = np.stack([chain.z for chain in chains])
    stats = {name: np.stack([chain.stats[name] for chain in chains]) for name in chains[0].stats}
    return Draws(z, {"lp": _log_prob(target, z)} | stats)


def _chain(target: Target, plan: Plan, seed: int, progress: Progress) -> Draws:
    """One chain: z `[draws, D]` and statistics `[draws]`."""
    steps: list[int] = []
    sizes: list[float] = []
    done = target.evaluations

    def after_draw(kernel: Any, params: Any, stage: str, i: int) -> None:
        nonlocal done
        target.counted += 1
        progress.step()
        target.check()
        if stage.startswith("Sample"):
            steps.append(target.evaluations - done)
            sizes.append(float(kernel.step_size))
        done = target.evaluations

    with RandomStream(seed, "chain"), isolated(torch.float64):
        mcmc = MCMC(
            NUTS(potential_fn=_potential(target), target_accept_prob=plan.target_accept),
            num_samples=plan.draws,
            warmup_steps=plan.tune,
            initial_params={"z": torch.from_numpy(target.start(seed))},
            hook_fn=after_draw,
            disable_progbar=True,
        )
        mcmc.run()
        divergent = mcmc.diagnostics()["divergences"]["chain 0"]
    diverging = np.zeros(plan.draws, dtype=bool)
    diverging[divergent] = True
    n_steps = np.array(steps)
    stats = {
        "diverging": diverging,
        # A trajectory of n leapfrog steps holds this many whole doublings.
        "tree_depth": np.floor(np.log2(n_steps + 1)).astype(np.int64),
        "n_steps": n_steps,
        "step_size": np.array(sizes),
    }
    return Draws(mcmc.get_samples()["z"].numpy(), stats)


def _potential(target: Target) -> Any:
    """Minus the log density, as a function of ``{"z": [D]}`` that autograd can go through."""

    def potential(values: dict[str, Tensor]) -> Tensor:
        z = values["z"]
        value, gradient = target(z.detach().numpy())
        # The right value and gradient at z; nothing asks for more.
        return -(value + (z - z.detach()) @ torch.from_numpy(gradient))

    return potential


def _log_prob(target: Target, z: np.ndarray) -> np.ndarray:
    """Log density in nats of each draw, `[chains, draws]`."""
    density = target.density
    points = density.block.unpack(torch.from_numpy(z).flatten(0, 1))

    def log_prob(part: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"lp": density.terms(part, target.params).total()}

    with torch.no_grad():
        values = in_chunks(log_prob, points, width_of(density))["lp"]
    return values.reshape(z.shape[:2]).numpy()
