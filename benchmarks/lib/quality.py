"""How far a posterior is from its reference."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.lib.references import Reference
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.posterior import Posterior

_SEED = 271_828
_ENTRY = re.compile(r"(\w+)(?:\[(\d+)\])?")


def elbo_of(posterior: Posterior, draws: int) -> tuple[float, float]:
    """ELBO on fresh draws and its standard error, nats."""
    log_p, log_q = posterior.approximation.weigh(draws, _SEED)
    log_w = log_p - log_q
    return float(log_w.mean()), float(log_w.std() / draws**0.5)


def against(posterior: Posterior, reference: Reference, draws: int) -> dict[str, float]:
    """ELBO, KL(q || p) and the worst errors of the reported parameters' moments.

    Args:
        posterior: The fit.
        reference: What it is compared with.
        draws: Draws of q for all of it.

    Returns:
        ``elbo``, ``elbo_se``, ``kl`` in nats; ``mean_error``, the largest |mean - reference mean| in
        reference sds; ``sd_error``, the largest |sd / reference sd - 1|.
    """
    facts = reference.facts
    values, weighed = posterior.approximation.draw_and_weigh(draws, _SEED)
    log_w = weighed.log_p - weighed.log_q
    q = entries(values, facts["parameters"])
    mean, sd = np.array(facts["mean"]), np.array(facts["sd"])
    elbo = float(log_w.mean())
    return {
        "elbo": elbo,
        "elbo_se": float(log_w.std() / draws**0.5),
        "kl": facts["log_evidence"] - elbo,
        "mean_error": float(np.abs((q.mean(0) - mean) / sd).max()),
        "sd_error": float(np.abs(q.std(0, ddof=1) / sd - 1).max()),
    }


def log_joint_error(module: Any, reference: Reference) -> float:
    """How far the model's log joint at the reference mean is from the reference's, nats.

    The comparison is void where this is not rounding: the model would be another one.

    Args:
        module: The model file.
        reference: Its reference.
    """
    facts = reference.facts
    density = Density(module.MODEL)
    mean = torch.tensor(facts["unconstrained"]["mean"], dtype=torch.float64)
    sites = {site.name: site for site in density.latents}
    parts, start = {}, 0
    for name in module.UNCONSTRAINED:
        shape = sites[name].unconstrained_shape
        parts[name] = mean[start : start + shape.numel()].reshape(1, *shape)
        start += shape.numel()
    log_joint = density.log_prob(density.block.pack(parts))
    return abs(float(log_joint) - facts["log_joint_at_reference_mean_unconstrained"])


def entries(values: Mapping[str, Tensor], parameters: Sequence[str]) -> np.ndarray:
    """The draws of these parameters, as the reference names them, `[S, P]`."""
    return np.stack([_entry(values, name) for name in parameters], -1)


def _entry(values: Mapping[str, Tensor], parameter: str) -> np.ndarray:
    """The draws of ``beta[2]``, or of ``alpha``."""
    match = _ENTRY.fullmatch(parameter)
    if match is None:
        raise ValueError(f"not a parameter's name: {parameter!r}")
    draws = values[match[1]].numpy().astype(np.float64)
    return draws if match[2] is None else draws[:, int(match[2]) - 1]
