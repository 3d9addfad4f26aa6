"""The ELBO with a weight on the divergence from the prior (Higgins et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor

from pyro_vi_kit.core.contracts import ALL_DATA, Batch, LogWeights
from pyro_vi_kit.core.errors import OptionError, told
from pyro_vi_kit.core.registry import About
from pyro_vi_kit.guides.pyro_guide import Draw, Guide
from pyro_vi_kit.objectives.base import (
    Objective,
    leave_one_out_mean,
    no_stock_loss,
)


@dataclass(frozen=True)
class Beta(Objective):
    """ELBO with weight beta on KL(q || prior): beta > 1 asks for more, beta < 1 for less prior.

    E_q[log p(x | z)] - beta KL(q(z) || p(z)): beta times the ELBO of the model whose likelihood
    (observed sites and factors) is raised to the power 1 / beta.

    Args:
        beta: The weight.
        particles: K, draws per step; their mean is taken, so K changes the noise and not the bound.

    Raises:
        OptionError: If beta is no positive number, or `particles` not positive.
    """

    name = "beta"
    about = About(
        does="the elbo with beta times the KL to the prior",
        cost="K",
        use="learned models: more disentangled, or fewer idle, latents; no posterior",
        paper="Higgins et al. 2017",
    )

    beta: float = 4.0
    particles: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        number = isinstance(self.beta, int | float) and not isinstance(self.beta, bool)
        if not number or not 0.0 < self.beta < inf:
            raise OptionError(f"beta: beta must be a positive number, got {told(self.beta)}")

    @property
    def order(self) -> float:
        """1: that of the ELBO."""
        return 1.0

    def bound(self, log_w: Tensor) -> Tensor:
        """Mean of weighted log weights, `[K, ...] -> [...]`, nats."""
        return log_w.mean(0)

    def score(self, log_w: Tensor) -> Tensor:
        """As for the ELBO, `[K, ...]`."""
        return leave_one_out_mean(log_w)

    def weights(self, guide: Guide, draw: Draw, batch: Batch = ALL_DATA) -> LogWeights:
        """Log p(x | z) + beta (log p(z) - log q(z)), nats."""
        found = guide.weigh(draw, batch.params, batch.index, data=batch.data, power=1.0 / self.beta)
        local = {plate: self.beta * rows for plate, rows in found.local.items()}
        return LogWeights(self.beta * found.shared, local, found.scale)

    def require(self, guide: Guide) -> None:
        """Refuse models whose likelihood cannot be told from their prior."""
        if guide.density.discrete:
            raise OptionError(
                "objective 'beta' raises the likelihood to a power, and in this model it is a sum over "
                f"the discrete site {guide.density.discrete[0].name!r}: use objective='elbo', or "
                "'annealed'"
            )
        if guide.density.streamed is not None and not guide.local_blocks:
            raise OptionError(
                "objective 'beta' on streamed data needs latents in their plate: use objective='elbo', "
                "or pass tensors, vi.Model(fn, x, y)"
            )

    def stock_loss(self, *, vectorize: bool = False) -> ELBO:
        """`Trace_ELBO` for beta = 1.

        Raises:
            OptionError: For any other, which stock Pyro has no loss for.
        """
        if self.beta != 1.0:
            raise no_stock_loss(self.name, "objective='elbo'")
        return Trace_ELBO(num_particles=self.particles, vectorize_particles=vectorize)
