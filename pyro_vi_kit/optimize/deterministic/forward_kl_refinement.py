"""Rounds of forward and reverse KL on fixed draws: how a flow leaves the folds that annealing laid.

A flow that was bent while its target was flat has all modes, but the threads between them lie where they
fell, and reverse KL, which sees only where draws are, does not move them. Forward KL does. So each round
fits the flow to its own draws under self-normalised importance weights (Jerfel, Wang, Wong-Fannjiang,
Heller, Ma & Jordan 2021), which is maximum likelihood, and then to the ELBO. Both are functions of fixed
draws (scrambled Sobol points, Giordano, Ingram & Broderick 2024), and so a matter of L-BFGS.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from pyro_vi_kit.core.runtime import seed_of
from pyro_vi_kit.guides import Guide
from pyro_vi_kit.guides.flows.flows import Flow
from pyro_vi_kit.optimize.deterministic.search import Search, sobol_normals

# Fewer are fitted one by one: a network of 8 units bends between 2,048 of them, 0.3 nats off.
_DRAWS = 8192
_MAX_DRAWS = 32_768
_DRAWS_PER_PARAMETER = 16
_MAX_DIM = 50
# Draws times data: numbers that one evaluation may meet.
_MAX_NUMBERS = 2**24
# Of the draws, that weights must leave: with less they say more of themselves than of the target.
_LEAST_SHARE = 0.05
_ROUNDS = 6
_FORWARD, _REVERSE = 300, 150
# Nats that L-BFGS may leave.
_LEFT = 1e-5


def applies_to(guide: object) -> bool:
    """Whether a guide is one flow of few parameters, over few data and no learned parameters."""
    if not isinstance(guide, Guide) or len(guide.blocks) > 1:
        return False
    density, family = guide.density, guide.families[guide.blocks[0].name]
    fixed = not density.params and density.streamed is None and density.drawn is None
    if not isinstance(family, Flow) or not fixed or density.dim > _MAX_DIM:
        return False
    draws, numbers = _draws_for(family), density.dim + sum(t.numel() for t in density.data)
    return draws <= _MAX_DRAWS and draws * numbers <= _MAX_NUMBERS


def improve(guide: Guide, search: Search) -> int:
    """Round after round while the ELBO gains more than the tolerance; leave the best in the guide.

    The ELBO is compared on draws that nothing is fitted to.

    Args:
        guide: One for which `applies_to` holds.
        search: Model, seed of the fixed draws, budget, and the nats that a round must gain for another
            one to follow.

    Returns:
        Per-sample gradient evaluations of the log density.

    Raises:
        KeyboardInterrupt: If the user interrupts, with the best so far in the guide.
    """
    rounds = _Rounds(search, guide.families[guide.blocks[0].name])  # type: ignore[arg-type]
    best, elbo = rounds.read(), rounds.elbo()
    try:
        for turn in range(_ROUNDS):
            if search.stopped or not rounds.forward(turn):
                break
            rounds.reverse(turn)
            gain = rounds.elbo() - elbo
            if gain > 0.0:
                best, elbo = rounds.read(), elbo + gain
            if not gain > search.tolerance:
                break
    finally:
        rounds.write(best)
    search.require_whole()
    return search.evaluations


class _Rounds:
    """A flow under way, its parameters as one vector `[P]`.

    Args:
        search: The model, and what is spent on it.
        flow: Changed in place.
    """

    def __init__(self, search: Search, flow: Flow) -> None:
        self._search, self._flow = search, flow
        self._parameters = list(flow.parameters())
        self._draws = _draws_for(flow)

    def read(self) -> Tensor:
        """A copy of the parameters, `[P]`."""
        return parameters_to_vector(self._parameters).detach().clone()

    @torch.no_grad()
    def write(self, x: Tensor) -> None:
        """Give the flow these parameters, `[P]`, in the tensors that it has."""
        sizes = [p.numel() for p in self._parameters]
        for parameter, part in zip(self._parameters, x.split(sizes), strict=True):
            parameter.copy_(part.view_as(parameter))

    @torch.no_grad()
    def elbo(self) -> float:
        """Nats, on draws of its own that are the same every time."""
        noise = self._normals(0)
        z, log_det = self._map(noise)
        return float((self._search.evaluate(z)[0] + log_det).mean()) + _entropy(noise)

    def forward(self, turn: int) -> bool:
        """Maximum likelihood on weighted draws of the flow; False where weights are too uneven."""
        noise = self._normals(2 * turn + 1)
        with torch.no_grad():
            z, log_det = self._map(noise)
            log_w = self._search.evaluate(z)[0] + 0.5 * noise.square().sum(-1) + log_det
            weights = torch.softmax(log_w.nan_to_num(nan=-torch.inf), 0)
        if not float(weights.square().sum()) * len(weights) * _LEAST_SHARE < 1.0:
            return False
        z, weights = z[weights > 0.0], weights[weights > 0.0]
        self._minimise(lambda: -(weights * self._flow().log_prob(z)).sum(), _FORWARD)
        return True

    def reverse(self, turn: int) -> None:
        """The ELBO on fixed noise."""
        noise = self._normals(2 * turn + 2)

        def loss() -> Tensor:
            z, log_det = self._map(noise)
            log_p, slope = self._search.evaluate(z.detach())
            # The value of log p, and its gradient through the draws.
            log_p = log_p + ((z - z.detach()) * slope).sum(-1)
            return -(log_p + log_det).mean()

        self._minimise(loss, _REVERSE)

    def _minimise(self, loss: Callable[[], Tensor], evaluations: int) -> None:
        def function(x: Tensor) -> tuple[Tensor, Tensor]:
            self.write(x[0])
            with torch.enable_grad():
                value = loss()
                gradients = torch.autograd.grad(value, self._parameters)
            return value.detach().unsqueeze(0), parameters_to_vector(gradients).unsqueeze(0)

        (found,) = self._search.minimise(
            function, [self.read()], tolerance=_LEFT, max_evaluations=evaluations
        )
        self.write(found.x)

    def _map(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Through the flow: `[N, D]`, and the log determinant `[N]`."""
        bent, log_det = self._flow.bend(noise)
        loc, scale_tril = self._flow.affine.moments()
        return loc + bent @ scale_tril.T, log_det + scale_tril.diagonal().log().sum()

    def _normals(self, which: int) -> Tensor:
        """Noise `[N, D]`, another for each number."""
        seed = seed_of(self._search.seed, "rounds", which)
        loc = self._flow.affine.loc
        return sobol_normals(self._draws, len(loc), seed).to(loc)


def _draws_for(flow: Flow) -> int:
    """Enough not to be fitted one by one, a power of two."""
    wanted = _DRAWS_PER_PARAMETER * sum(p.numel() for p in flow.parameters())
    return max(_DRAWS, 2 ** (wanted - 1).bit_length())


def _entropy(noise: Tensor) -> float:
    """Minus the mean log density of standard normals at these, `[N, D]`, nats."""
    normal = torch.distributions.Normal(noise.new_zeros(()), 1.0)
    return -float(normal.log_prob(noise).sum(-1).mean())
