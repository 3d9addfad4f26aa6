"""What the stages of one deterministic fit share: one way to the density, and the count of its cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_vi_kit.core.progress import Progress
from pyro_vi_kit.core.undefined import ERRORS, is_undefined
from pyro_vi_kit.model.gradients import Gradients
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.optimize.deterministic.minimise import Minimum, Objective, minimise_several
from pyro_vi_kit.optimize.result import Budget

Evaluator = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From points `[K, D]` to log densities `[K]` and their gradients `[K, D]`, both detached."""

# Numbers that one evaluation may hold for each tensor of the model: half a gigabyte.
_MAX_NUMBERS = 2**26
_MAX_SEARCHES = 32


@dataclass
class Search:
    """A fit under way.

    Attributes:
        density: The model.
        seed: Of all that is drawn.
        budget: What may be spent.
        progress: Told each evaluation.
        losses: Minus the ELBO at each evaluation, nats.
        evaluations: Per-sample gradient evaluations so far.
        stopped: ``""``, ``"budget"``, ``"interrupted"`` or ``"failed"``: what cut the fit short.
        error: What was raised, where it was interrupted or failed.
        power: What the density is raised to; a small one flattens it.
    """

    density: Density
    seed: int
    budget: Budget
    progress: Progress
    losses: list[float] = field(default_factory=list)
    evaluations: int = 0
    stopped: str = ""
    error: BaseException | None = None
    power: float = 1.0
    _ways: dict[bool, Gradients] = field(default_factory=dict, repr=False)

    def evaluate(self, z: Tensor, *, jacobian: bool = True) -> tuple[Tensor, Tensor]:
        """Log density `[K]` and gradient `[K, D]` at `[K, D]`, in pieces that fit into memory.

        NaN at a point where the model's linear algebra fails.
        """
        self.evaluations += len(z)
        self.budget.spent += len(z)
        data = sum(t.numel() for t in self.density.data)
        piece = max(1, _MAX_NUMBERS // max(1, data + self.density.dim))
        parts = [self._evaluate_piece(p, jacobian) for p in z.split(piece)]
        if self.power != 1.0:
            parts = [(self.power * log_p, self.power * gradient) for log_p, gradient in parts]
        if len(parts) == 1:
            return parts[0]
        return torch.cat([log_p for log_p, _ in parts]), torch.cat([grad for _, grad in parts])

    @property
    def engine(self) -> str:
        """How the density was evaluated at last."""
        found = {gradients.engine for gradients in self._ways.values()}
        return next((name for name in ("compiled", "captured") if name in found), "eager")

    def _gradients(self, jacobian: bool) -> Gradients:
        """The density, which captures itself in long searches."""
        if jacobian not in self._ways:
            self._ways[jacobian] = Gradients(self.density, jacobian=jacobian)
        return self._ways[jacobian]

    def _evaluate_piece(self, z: Tensor, jacobian: bool) -> tuple[Tensor, Tensor]:
        try:
            return self._gradients(jacobian)(z)
        except ERRORS as error:
            if not is_undefined(error):
                raise
            # It is not defined at one point, which takes the batch with it. Which one matters to
            # searches that share a batch; an average over many draws is lost anyway.
            if len(z) == 1 or len(z) > _MAX_SEARCHES:
                return z.new_full((len(z),), torch.nan), torch.full_like(z, torch.nan)
            halves = [self._evaluate_piece(h, jacobian) for h in z.split((len(z) + 1) // 2)]
            return torch.cat([log_p for log_p, _ in halves]), torch.cat([g for _, g in halves])

    def minimise(
        self,
        function: Objective,
        starts: Sequence[Tensor],
        *,
        tolerance: float,
        curvature: Tensor | None = None,
        max_evaluations: int = 1000,
        patience: float = math.inf,
        record: bool = False,
    ) -> list[Minimum]:
        """Minimise within this fit's budget; see `minimise.minimise_several`.

        With ``record`` the values count as losses of the fit.
        """
        found = minimise_several(
            function,
            starts,
            tolerance=tolerance,
            curvature=curvature,
            max_evaluations=max_evaluations,
            patience=patience,
            budget=self.budget,
            on_value=self.record if record else None,
        )
        if not self.stopped:
            cut = next((m for m in found if m.stopped), None)
            self.stopped, self.error = ("", None) if cut is None else (cut.stopped, cut.error)
        return found

    def require_whole(self) -> None:
        """Raise what cut the fit short, other than its budget, where nothing of it is of use."""
        if self.error is not None:
            raise self.error

    def record(self, loss: float) -> None:
        """Take note of minus the ELBO, in nats."""
        self.losses.append(loss)
        self.progress.step(-loss)

    def check_time(self) -> None:
        """Stop the fit when its budget is spent."""
        if not self.stopped and self.budget.over:
            self.stopped = "budget"
