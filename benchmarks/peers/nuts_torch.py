"""NUTS on Pyro models: `vi.nuts`, and Pyro's own."""

from __future__ import annotations

import importlib
import time
import warnings
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import MCMC, NUTS

import pyro_vi_kit as vi
from benchmarks.peers.ess import smallest


def ours(
    name: str, chains: int, tune: int, draws: int, cores: int, seed: int, repeats: int
) -> list[dict[str, float]]:
    """Runs of `vi.nuts`, one after another: the first in a process finds nothing prepared."""
    model = _model(name)
    done = []
    for repeat in range(repeats):
        started = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = vi.nuts(
                model,
                chains=chains,
                draws=draws,
                tune=tune,
                cores=cores,
                seed=seed + repeat,
                progress=False,
            )
        seconds = time.perf_counter() - started
        posterior: Any = tree["posterior"]
        values = {str(site): posterior[site].to_numpy() for site in posterior.data_vars}
        done.append(_row(values, seconds))
    return done


def stock(
    name: str, chains: int, tune: int, draws: int, seed: int, cap: float
) -> list[dict[str, Any]]:
    """Pyro's NUTS with defaults, chains one after another, all in float64.

    Chains stop at the cap; what they have drawn by then counts. A chain cut off in its warm-up has
    only cost time. Where no chain has come to 20 draws, the effective ones are bounded: every iteration
    up to the cap, warm-up and all, counts as an independent draw (``bound`` is then 1).
    """
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    model = _model(name)
    collected: list[list[dict[str, np.ndarray]]] = []
    transforms: dict[str, Any] = {}
    iterations = 0
    started = time.perf_counter()

    def keep(kernel: Any, params: dict[str, torch.Tensor], stage: str, _: int) -> None:
        nonlocal iterations
        iterations += 1
        if stage.startswith("Sample"):
            transforms.update(kernel.transforms)
            collected[-1].append({site: z.detach().numpy().copy() for site, z in params.items()})
        if time.perf_counter() - started > cap:
            raise _CapError

    for chain in range(chains):
        pyro.set_rng_seed(seed + chain)
        collected.append([])
        mcmc = MCMC(
            NUTS(model.fn), num_samples=draws, warmup_steps=tune, disable_progbar=True, hook_fn=keep
        )
        try:
            mcmc.run(*model.args, **model.kwargs)
        except _CapError:
            break
    seconds = time.perf_counter() - started
    useful = [chain for chain in collected if len(chain) >= 20]
    if not useful:
        row = {"seconds": seconds, "ess": float(iterations), "rhat": None, "after": 0.0}
        return [row | {"bound": 1.0}]
    length = min(len(chain) for chain in useful)
    unconstrained = {
        site: np.stack([[point[site] for point in chain[:length]] for chain in useful])
        for site in useful[0][0]
    }
    values = {
        site: transforms[site].inv(torch.from_numpy(z)).numpy() if site in transforms else z
        for site, z in unconstrained.items()
    }
    return [_row(_with_theta(values), seconds) | {"draws": float(length * len(useful))}]


class _CapError(Exception):
    """The time is up."""


def _with_theta(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Eight schools' effects too: they are what the others are measured on."""
    if "theta_trans" in values:
        theta = values["mu"][..., None] + values["tau"][..., None] * values["theta_trans"]
        return values | {"theta": theta}
    return values


def _row(values: dict[str, np.ndarray], seconds: float) -> dict[str, float]:
    found = smallest(values)
    return {
        "seconds": seconds,
        "ess": found["ess"],
        "rhat": found["rhat"],
        "after": found["seconds"],
    }


def _model(name: str) -> Any:
    torch.set_default_dtype(torch.float64)
    return importlib.import_module(f"models.{name}").MODEL
