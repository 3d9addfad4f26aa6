"""What the stages of a deterministic fit share: one way to the density, its cost, draws to hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from pyro_vi_kit.core.contracts import Status
from pyro_vi_kit.core.progress import Progress
from pyro_vi_kit.core.undefined import ERRORS, is_undefined
from pyro_vi_kit.model.gradients import Gradients
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.optimize.deterministic.minimise import Minimum, Objective, minimise_several
from pyro_vi_kit.optimize.result import Budget, Outcome, cut_short

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
        tolerance: Nats by which the result may fall short of the best.
        losses: Minus the ELBO at each evaluation, nats.
        evaluations: Per-sample gradient evaluations so far.
        stopped: ``""``, ``"budget"``, ``"interrupted"`` or ``"failed"``: what cut the fit short.
        error: What was raised, where it was interrupted or failed.
        power: What the density is raised to; a small one flattens it.
    """

    density: Density
    seed: int
    budget: Budget = field(default_factory=Budget)
    progress: Progress = field(default_factory=lambda: Progress("", enabled=False))
    tolerance: float = 0.01
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
        self.count(len(z))
        data = sum(t.numel() for t in self.density.data)
        piece = max(1, _MAX_NUMBERS // max(1, data + self.density.dim))
        parts = [self._evaluate_piece(p, jacobian) for p in z.split(piece)]
        if self.power != 1.0:
            parts = [(self.power * log_p, self.power * gradient) for log_p, gradient in parts]
        if len(parts) == 1:
            return parts[0]
        return torch.cat([log_p for log_p, _ in parts]), torch.cat([grad for _, grad in parts])

    def negative(self, jacobian: bool = True) -> Objective:
        """Minus the log density and its gradient, to be minimised."""

        def function(z: Tensor) -> tuple[Tensor, Tensor]:
            log_p, gradient = self.evaluate(z, jacobian=jacobian)
            return -log_p, -gradient

        return function

    def count(self, evaluations: int) -> None:
        """Take note of so many per-sample gradient evaluations."""
        self.evaluations += evaluations
        self.budget.spent += evaluations

    def _evaluate_piece(self, z: Tensor, jacobian: bool) -> tuple[Tensor, Tensor]:
        if jacobian not in self._ways:
            # It captures itself in long searches.
            self._ways[jacobian] = Gradients(self.density, jacobian=jacobian)
        try:
            return self._ways[jacobian](z)
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

    def check_budget(self) -> None:
        """Stop the fit when its budget is spent."""
        if not self.stopped and self.budget.over:
            self.stopped = "budget"

    def stopped_status(self, kept: str = "the best point so far was kept.") -> Status:
        """How a fit ended that was cut short by its budget, by the user, or by what was raised."""
        if self.error is not None:
            return cut_short(self.error, f"; {kept}")
        return Status(False, "budget", f"The budget ran out; {kept}")

    def outcome(self, method: str, status: Status) -> Outcome:
        """What the fit hands back.

        Args:
            method: Its name.
            status: How it ended.
        """
        ways = self._ways.values()
        engines = {gradients.engine for gradients in ways}
        engine = next((name for name in ("compiled", "captured") if name in engines), "eager")
        why = next((gradients.note for gradients in ways if gradients.note), "")
        if why:
            self.density.give_up(f"The density was run by Python and not captured: {why}")
        return Outcome(
            method, status, self.losses, self.evaluations, engine=engine, error=self.error
        )


# -- draws to hold fixed; made on the CPU, so that a fit holds the same ones on every device -----------


def standard_normals(draws: int, dim: int, generator: torch.Generator) -> Tensor:
    """Independent normals `[draws, dim]` on the CPU, float64, from a generator of the CPU."""
    return torch.randn(draws, dim, generator=generator, dtype=torch.float64, device="cpu")


def matched_normals(draws: int, dim: int, seed: int) -> Tensor:
    """Moment-matched normals `[draws, dim]` on the CPU, float64.

    Each draw stands beside its mirror image, so odd moments vanish; the covariance is whitened to the
    identity where the draws outnumber twice the dimension, and to unit variances else. A Gaussian
    target's ELBO over these draws is exact, which is what keeps few of them from overfitting.

    Args:
        draws: An even number.
        dim: D.
        seed: The same seed gives the same draws.
    """
    generator = torch.Generator().manual_seed(seed)
    half = standard_normals(draws // 2, dim, generator)
    if draws // 2 > dim:
        factor = torch.linalg.cholesky(half.T @ half / len(half))
        half = torch.linalg.solve_triangular(factor, half.T, upper=False).T
    else:
        half = half / half.square().mean(0).sqrt()
    return torch.cat([half, -half])


def sobol_normals(draws: int, dim: int, seed: int) -> Tensor:
    """Standard normals `[draws, dim]` from scrambled Sobol points, on the CPU, float64.

    In few dimensions a mean over them is nearly as good as one over as many draws squared.

    Args:
        draws: A power of two, where their balance matters.
        dim: D.
        seed: Of the scrambling.
    """
    points = SobolEngine(dim, scramble=True, seed=seed).draw(draws, dtype=torch.float64)
    return normals_at(points)


def normals_at(points: Tensor) -> Tensor:
    """Standard normals at uniform points in [0, 1), of any shape."""
    tiny = 2.0**-32
    return torch.special.ndtri(points.clamp(tiny, 1.0 - tiny))
