"""The ELBO with the divergence from normal priors in closed form (Kingma & Welling 2014, appendix B)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import Independent, LowRankMultivariateNormal, MultivariateNormal, Normal
from pyro.infer import ELBO
from torch import Tensor

from pyro_vi_kit.core.contracts import ALL_DATA, Batch, LogWeights
from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.core.registry import About
from pyro_vi_kit.guides.pyro_guide import Draw, Guide
from pyro_vi_kit.objectives.base import no_stock_loss
from pyro_vi_kit.objectives.elbo import Elbo
from pyro_vi_kit.objectives.priors import normal_priors


@dataclass(frozen=True)
class ElboAnalytic(Elbo):
    """ELBO whose KL(q || prior) is in closed form where guide and priors are normal.

    In unconstrained space: q's entropy, and the expected log prior of every latent whose prior is normal
    there and depends on nothing (Normal, LogNormal, MultivariateNormal). The likelihood, and priors that
    depend on other latents, are averaged over draws. The bound is the ELBO; the noise is another.

    Args:
        particles: K, draws per step; their mean is taken, so K changes the noise and not the bound.

    Raises:
        OptionError: If `particles` is not positive.
    """

    name = "elbo_analytic"
    about = About(
        does="as elbo, with the KL to normal priors in closed form",
        cost="K",
        use="less noise where the data say little",
        paper="Kingma & Welling 2014",
    )

    particles: int = 10

    @property
    def estimators(self) -> tuple[str, ...]:
        """Not ``dreg``: there is no log q of draws to leave out."""
        return ("pathwise", "score")

    def weights(self, guide: Guide, draw: Draw, batch: Batch = ALL_DATA) -> LogWeights:
        """Log weights in which log q and normal priors stand as their expectations, nats."""
        found = guide.weigh(draw, batch.params, batch.index, data=batch.data)
        block: Any = guide.shared_block
        q: Any = guide.family_of(block)()
        mean, root = q.mean, _root(q)
        # `found` has log p(z_k) - log q(z_k): take out what is known in the mean, and put the mean.
        shared = found.shared + draw.shared + q.entropy()
        for prior in normal_priors(guide.density)[0]:
            flat = draw.flat[block.name]
            shared = shared + prior.expected(mean, root) - prior.log_prob(flat)
        return LogWeights(shared, found.local, found.scale)

    def require(self, guide: Guide) -> None:
        """Refuse guides that are no normal, and models without a normal prior."""
        block = guide.shared_block
        with torch.no_grad():
            normal = block and not guide.point and _is_normal(guide.family_of(block)())
        if block is None or not normal or guide.density.streamed is not None:
            raise OptionError(
                "objective 'elbo_analytic' needs one normal for the latents that all data share, and "
                f"data in memory; guide {guide.name!r} has none here: use guide='mean_field', "
                "'low_rank' or 'full_rank', or objective='elbo'"
            )
        priors, reasons = normal_priors(guide.density)
        names = {site.name for site in block.sites}
        if not any(prior.site in names for prior in priors) or len(guide.blocks) > 1:
            why = "; ".join(f"{name!r}: {reason}" for name, reason in reasons.items())
            why = why or "the guide holds latents of a data plate apart"
            raise OptionError(
                "objective 'elbo_analytic' has no latent with a closed form (" + why + "): use "
                "objective='elbo', whose estimator has no variance either where q is the posterior"
            )

    def stock_loss(self, *, vectorize: bool = False) -> ELBO:
        """There is none: `TraceMeanField_ELBO` forgets the Jacobian of constrained sites.

        Raises:
            OptionError: Always.
        """
        raise no_stock_loss(self.name, "objective='elbo', the same bound")


def _is_normal(q: Any) -> bool:
    if isinstance(q, Independent):
        return isinstance(q.base_dist, Normal)
    return isinstance(q, MultivariateNormal | LowRankMultivariateNormal)


def _root(q: Any) -> Tensor:
    """R of the covariance R R^T, `[D, r]`; or standard deviations, `[D]`."""
    if isinstance(q, MultivariateNormal):
        return q.scale_tril
    if isinstance(q, LowRankMultivariateNormal):
        diagonal = q._unbroadcasted_cov_diag.sqrt().diag()
        return torch.cat([diagonal, q._unbroadcasted_cov_factor], -1)
    return q.stddev
