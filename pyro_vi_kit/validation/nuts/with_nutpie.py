"""NUTS by nutpie: the chains are written in Rust and call back for the log density.

They call C where the density is compiled and nutpie takes an address (`by_address`), else Python.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from pyro_vi_kit.core.errors import MissingDependencyError, ModelError, first_line
from pyro_vi_kit.core.export import datasets, import_arviz
from pyro_vi_kit.core.progress import Progress
from pyro_vi_kit.validation.nuts import by_address
from pyro_vi_kit.validation.nuts.target import Draws, Plan, Target

_POLL_SECONDS = 0.1

# ArviZ's name of each statistic, and the names that nutpie has had for it.
_STATS = {
    "lp": ("logp", "lp"),
    "diverging": ("diverging",),
    "energy": ("energy",),
    "energy_error": ("energy_error",),
    "tree_depth": ("depth", "tree_depth"),
    "reached_max_treedepth": ("maxdepth_reached", "reached_max_treedepth"),
    "n_steps": ("n_steps",),
    "acceptance_rate": ("mean_tree_accept", "acceptance_rate"),
    "step_size": ("step_size",),
    "step_size_bar": ("step_size_bar",),
}


def import_nutpie() -> ModuleType:
    """The ``nutpie`` package.

    Raises:
        MissingDependencyError: If it is not installed.
    """
    import_arviz()  # nutpie imports it too, and would let its announcement through
    try:
        import nutpie
    except ImportError as error:
        raise MissingDependencyError(
            "sampler='nutpie' needs nutpie: pip install 'pyro_vi_kit[nuts]', or use "
            "sampler='pyro', which is slower"
        ) from error
    return nutpie


def sample(target: Target, plan: Plan, progress: Progress) -> Draws:
    """Run nutpie's chains in its threads, from this thread.

    Raises:
        ModelError: If the model raised, or no chain could start.
        KeyboardInterrupt: As soon as the chains have stopped, if there is next to no draw of them.
    """
    nutpie = import_nutpie()
    sampler = nutpie.sample(
        by_address.model(nutpie, target, _starts(target)),
        chains=plan.chains,
        draws=plan.draws,
        tune=plan.tune,
        seed=plan.seed,
        cores=plan.cores,
        target_accept=plan.target_accept,
        # On correlated posteriors a third of the gradients; on others no more than without.
        low_rank_modified_mass_matrix=True,
        save_warmup=False,
        progress_bar=False,
        blocking=False,
    )
    try:
        return _draws(_wait(sampler, target, progress))
    except KeyboardInterrupt:
        target.stop()
        found = _so_far(sampler)
        if found is None:
            raise
        return found
    except BaseException:
        target.stop()
        sampler.cancel()
        raise


def _draws(tree: Any) -> Draws:
    groups = datasets(tree)
    return Draws(
        groups["posterior"][by_address.VARIABLE].to_numpy(), _stats(groups["sample_stats"])
    )


def _so_far(sampler: Any) -> Draws | None:
    """What chains have come to that are stopped now; None where that is too little, or not told."""
    try:
        return _draws(sampler.abort()).rectangle()
    except Exception:  # noqa: BLE001  nutpie has no draws yet, or is of a release that does not give them
        return None


def _starts(target: Target) -> Callable[[int], np.ndarray]:
    """Starting points by seed, for threads of nutpie's, which must not be shown an exception."""

    def start(seed: int) -> np.ndarray:
        try:
            return target.start(seed)
        except ModelError as error:
            # `Target.check` tells the thread that waits.
            target.error = target.error or error
            target.stop()
            return np.zeros(target.density.dim)

    return start


def _wait(sampler: Any, target: Target, progress: Progress) -> Any:
    """Wait for the chains, showing how far they are; returns nutpie's ArviZ object."""
    shown = 0
    while True:
        try:
            tree = sampler.wait(timeout=_POLL_SECONDS)
        except TimeoutError:
            target.check()
        except Exception as error:
            target.check()
            raise ModelError(f"nutpie could not sample the model: {first_line(error)}") from error
        else:
            target.check()
            return tree
        for _ in range(target.draws - shown):
            progress.step()
        shown = target.draws


def _stats(dataset: Any) -> dict[str, np.ndarray]:
    """The statistics of nutpie's that ArviZ has a name for, `[chains, draws]` each."""
    stats = {}
    for name, aliases in _STATS.items():
        found = next((alias for alias in aliases if alias in dataset), None)
        if found is not None:
            values = dataset[found].to_numpy()
            stats[name] = values.astype(np.int64) if values.dtype.kind == "u" else values
    return stats
