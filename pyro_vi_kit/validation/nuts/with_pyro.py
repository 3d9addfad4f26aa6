"""NUTS by Pyro itself, on the same density: needs nothing else, and takes several times as long."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor

from pyro_vi_kit.core.progress import Progress
from pyro_vi_kit.core.runtime import RandomStream, isolated
from pyro_vi_kit.model.groups import in_chunks, width_of
from pyro_vi_kit.validation.nuts.target import Draws, Plan, Target


def sample(target: Target, plan: Plan, progress: Progress) -> Draws:
    """Run Pyro's chains one after another.

    Pyro is given the density, not the model: it knows nothing of transforms that change with other
    latents, and would sample priors to start from, which improper ones cannot be.

    Raises:
        ModelError: If the model raised, or no chain could start.
        KeyboardInterrupt: If the user interrupts while there is next to no draw.
    """
    seeds = np.random.SeedSequence(plan.seed).generate_state(plan.chains)
    chains: list[Draws] = []
    for seed in seeds:
        chains.append(_chain(target, plan, int(seed), progress))
        if chains[-1].interrupted:
            break
    interrupted = chains[-1].interrupted
    found = Draws(
        _side_by_side([chain.z for chain in chains]),
        {name: _side_by_side([chain.stats[name] for chain in chains]) for name in chains[0].stats},
    )
    if interrupted:
        found = found.rectangle()
        if found is None:
            raise KeyboardInterrupt
    stats = {"lp": _log_prob(target, found.z)} | found.stats
    return Draws(found.z, stats, interrupted)


def _side_by_side(chains: list[np.ndarray]) -> np.ndarray:
    """Chains as one array, shorter ones filled up: with NaN where these are draws."""
    length = max(map(len, chains))
    fill = np.nan if chains[0].dtype.kind == "f" else 0
    return np.stack(
        [
            np.concatenate(
                [chain, np.full((length - len(chain), *chain.shape[1:]), fill, chain.dtype)]
            )
            for chain in chains
        ]
    )


def _chain(target: Target, plan: Plan, seed: int, progress: Progress) -> Draws:
    """One chain: z `[draws, D]` and statistics `[draws]`, as many as there are on an interrupt."""
    points: list[np.ndarray] = []
    divergent: list[int] = []
    steps: list[int] = []
    sizes: list[float] = []
    done = target.evaluations

    def after_draw(kernel: Any, params: Any, stage: str, i: int) -> None:
        nonlocal done
        target.counted += 1
        progress.step()
        target.check()
        if stage.startswith("Sample"):
            points.append(params["z"].numpy().copy())
            # At its end, an interrupted one's too, the sampler forgets them.
            divergent[:] = kernel.diagnostics()["divergences"]
            steps.append(target.evaluations - done)
            sizes.append(float(kernel.step_size))
        done = target.evaluations

    with RandomStream(seed, "chain"), isolated(torch.float64):
        kernel = NUTS(potential_fn=_potential(target), target_accept_prob=plan.target_accept)
        mcmc = MCMC(
            kernel,
            num_samples=plan.draws,
            warmup_steps=plan.tune,
            initial_params={"z": torch.from_numpy(target.start(seed))},
            hook_fn=after_draw,
            disable_progbar=True,
        )
        interrupted = False
        try:
            mcmc.run()
        except KeyboardInterrupt:
            interrupted = True
            target.stop()
    # An interrupt may have come between the two notes of a draw.
    made = len(sizes)
    diverging = np.zeros(made, dtype=bool)
    diverging[[at for at in divergent if at < made]] = True
    n_steps = np.array(steps[:made], dtype=np.int64)
    stats = {
        "diverging": diverging,
        # A trajectory of n leapfrog steps holds this many whole doublings.
        "tree_depth": np.floor(np.log2(n_steps + 1)).astype(np.int64),
        "n_steps": n_steps,
        "step_size": np.array(sizes),
    }
    z = np.array(points[:made]).reshape(made, target.density.dim)
    return Draws(z, stats, interrupted)


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
