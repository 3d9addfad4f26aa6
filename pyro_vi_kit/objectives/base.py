"""What an objective is made of beside its bound: how it is trained, and where it is defined.

A bound is a function of log weights. Its gradient need not be: the forward KL is trained along
``sum_k w~_k grad log q(z_k)``, which is the gradient of no such function. So an objective also says

- ``carrier``: what the loss differentiates: the bound, or for an upper bound the importance-weighted
  one, along which the model's own parameters are to move;
- ``path``: what `dreg` multiplies the carrier's gradient at each draw by;
- ``score``: what `score` multiplies ``grad log q(z_k)`` by;
- ``look``: what a comparison of two fits maximises: the bound, or for an upper bound minus its gap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyro_vi_kit.core.contracts import LogWeights


class Bound:
    """Defaults of a lower bound of the Rényi family that is a function of log weights alone.

    Attributes:
        upper: Whether it is an upper bound on the log evidence, and is brought down.
        is_elbo: Whether what is trained in the end is the ELBO.
        warmup: Steps before what is trained is the bound itself.
        carried: Whether the loss differentiates a `carrier` that is not the bound.
        estimators: Gradient estimators that are defined for it; see `objectives.estimators`.
    """

    name: ClassVar[str]

    @property
    def upper(self) -> bool:
        """A lower bound."""
        return False

    @property
    def is_elbo(self) -> bool:
        """Another bound."""
        return False

    @property
    def warmup(self) -> int:
        """No step: it is the same bound at each."""
        return 0

    @property
    def carried(self) -> bool:
        """Whether the loss differentiates something else than the bound: for an upper one."""
        return self.upper

    @property
    def estimators(self) -> tuple[str, ...]:
        """All of them; ``stratified`` for a bound of the Rényi family."""
        everywhere = ("pathwise", "dreg", "score")
        return everywhere if self.order is None else (*everywhere, "stratified")

    @property
    def order(self) -> float | None:
        """None: no bound of the Rényi family."""
        return None

    def bound(self, log_w: Tensor) -> Tensor:
        """The bound over the first dimension, `[K, ...] -> [...]`, nats."""
        raise NotImplementedError

    def carrier(self, log_w: Tensor) -> Tensor:
        """What the loss is minus of, and differentiates: the bound, `[K, ...] -> [...]`."""
        return self.bound(log_w)

    def look(self, log_w: Tensor) -> Tensor:
        """What a comparison of two fits maximises: the bound, `[K, ...] -> [...]`, nats."""
        return self.bound(log_w)

    def path(self, log_w: Tensor) -> Tensor | None:
        """What ``dreg`` scales the gradient at each draw by, `[K, ...]`; None for 1.

        ``alpha + (1 - alpha) w~`` for the bound of order alpha (Tucker et al. 2019).
        """
        alpha = self.order
        if alpha is None or alpha == 1.0:
            return None
        return alpha + (1.0 - alpha) * torch.softmax((1.0 - alpha) * log_w, 0)

    def score(self, log_w: Tensor) -> Tensor:
        """What ``score`` multiplies the gradient of each log q by, `[K, ...]`.

        The bound less what it is without this draw (VIMCO, Mnih & Rezende 2016), and what log q is
        worth inside the bound.
        """
        return leave_one_out(self.bound, log_w) - slope_of(self.bound, log_w)

    def weights(
        self,
        guide: Any,
        draw: Any,
        params: Mapping[str, Tensor] | None = None,
        index: Mapping[str, Tensor] | None = None,
        *,
        data: Sequence[Tensor] | None = None,
        updates: Tensor | None = None,
    ) -> LogWeights:
        """The log weights that the bound is taken of, nats.

        Args:
            guide: A `guides.Guide`.
            draw: Draws of it.
            params: Unconstrained learned parameters of the model.
            index: Rows of each local plate; all when None.
            data: Tensors in the place of the density's own, where data are streamed.
            updates: Steps taken so far, a scalar; None where the bound itself is asked for.
        """
        return guide.weigh(draw, params, index, data=data)

    def require(self, guide: Any) -> None:
        """Refuse a guide that this objective is not defined for.

        Raises:
            OptionError: With the remedy.
        """


def slope_of(bound: Callable[[Tensor], Tensor], log_w: Tensor) -> Tensor:
    """Derivative of a bound in each log weight, `[K, ...]`, detached."""
    with torch.enable_grad():
        leaf = log_w.detach().requires_grad_()
        (slope,) = torch.autograd.grad(bound(leaf).sum(), leaf)
    return slope


def leave_one_out(bound: Callable[[Tensor], Tensor], log_w: Tensor) -> Tensor:
    """The bound, less what it is where one draw's log weight is the mean of the others', `[K, ...]`.

    For a mean over draws this is ``1 / K`` of each log weight less the mean of the others, the
    leave-one-out baseline (Kool, van Hoof & Welling 2019); for a multi-sample bound VIMCO's signal (Mnih
    & Rezende 2016, eq. 10).
    """
    count = len(log_w)
    others = (log_w.sum(0) - log_w) / (count - 1)
    own = torch.eye(count, dtype=torch.bool, device=log_w.device)
    own = own.reshape(count, count, *(1,) * (log_w.dim() - 1))
    return bound(log_w) - bound(torch.where(own, others, log_w.unsqueeze(1)))


def leave_one_out_mean(log_w: Tensor) -> Tensor:
    """`leave_one_out` of a mean, `[K, ...]`, without a table of K by K."""
    count = len(log_w)
    return (log_w - log_w.mean(0)) / (count - 1)


def draws_discrete(guide: Any) -> bool:
    """Whether a guide draws discrete sites itself, by the score function or relaxed."""
    families = guide.families.values()
    return any(getattr(f, "scored", False) or getattr(f, "relaxed", False) for f in families)
