"""Look a model over without refusing it: every problem that can be found, not only the first."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Mapping

import torch
from pyro.distributions import MaskedDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch import Tensor
from torch.distributions import Independent

from pyro_vi_kit.core.errors import ModelError
from pyro_vi_kit.core.runtime import random_state, validation
from pyro_vi_kit.model.log_density.enumeration import Enumerated, nesting_of
from pyro_vi_kit.model.log_density.guarding import flags
from pyro_vi_kit.model.log_density.handlers import Replay, Visit
from pyro_vi_kit.model.log_density.problems import (
    Problem,
    aimless_problem,
    chance_problem,
    change_problem,
    repetition,
    slope_problem,
    sum_problem,
    sums,
)
from pyro_vi_kit.model.log_density.raised import arguments, not_finite
from pyro_vi_kit.model.log_density.runner import Runner
from pyro_vi_kit.model.log_density.shapes import plateless_problem
from pyro_vi_kit.model.log_density.sizes import Sizes, StatesError
from pyro_vi_kit.model.log_density.streamed import streamed
from pyro_vi_kit.model.log_density.structure import is_improper, parameters_of, starts
from pyro_vi_kit.model.log_density.supports import bijector
from pyro_vi_kit.model.log_density.terms import add_up
from pyro_vi_kit.model.log_density.usable import (
    constant_data,
    data_problems,
    discrete_problem,
    is_unchecked,
    latents_problem,
    minibatch_note,
    require_whole_rows,
    shape_problems,
    unchecked_note,
)
from pyro_vi_kit.model.model import Model

_POINTS = 10
_RADIUS = 2.0


class Examination:
    """First runs of a model, and what they show.

    Args:
        model: The model and its data.
        dtype: Precision to run it in.

    Attributes:
        runs: The runs that did not raise.
        error: What the model raised, if it did.
        draws_in_vain: Whether a run beyond the first drew random numbers outside sample sites.
        parameters: Learned parameters with their shapes.
    """

    def __init__(self, model: Model, dtype: torch.dtype) -> None:
        self.model = model
        self.runner = Runner(model, dtype)
        self.runs: list[Replay] = []
        self.error: str | None = None
        self.draws_in_vain = False
        self._gradients: dict[str, bool] = {}
        drew = False
        with self.runner.first_runs():
            for fill in starts(self.runner.device):
                before = random_state()
                self._try(Replay(fill=fill))
                drew = random_state() != before
            if self.error is not None and not self.runs:
                # A latent without a bijector ends a run; drawn from its prior it does not.
                self._try(Replay(sample_latents=True))
                self.error = None if self.runs else self.error
            elif self.runs:
                kinds = {visit.kind for visit in self.runs[-1].visits.values()}
                self.draws_in_vain = drew and "discrete" not in kinds
                self.runner.nesting = nesting_of(self.runs[-1].visits)
                visits = self.runs[-1].visits.values()
                self.runner.guarded = frozenset(v.name for v in visits if not is_unchecked(v))
        # Stores are private to the runs, modules are not: what was learned is read off the run.
        learned = parameters_of(self.runs[-1]) if self.runs else {}
        self.parameters = [f"{p.name} {tuple(p.value.shape)}" for p in learned.values()]

    def _try(self, replay: Replay) -> None:
        try:
            self.runner.try_run(replay)
        except ModelError as error:
            self.error = str(error)
        else:
            self.runs.append(replay)

    def _unconstrained(self) -> bool:
        return bool(self.runs) and not self.runs[-1].sample_latents

    @property
    def last(self) -> Replay | None:
        """The last run that did not raise."""
        return self.runs[-1] if self.runs else None

    @property
    def visits(self) -> Mapping[str, Visit]:
        """The sites of the last run."""
        return self.runs[-1].visits if self.runs else {}

    def _of_kind(self, kind: str) -> list[Visit]:
        return [visit for visit in self.visits.values() if visit.kind == kind]

    @property
    def support_problems(self) -> list[Problem]:
        """Latents without a bijector, or no latents at all."""
        nothing = latents_problem(self.visits)
        problems = [nothing] if nothing else []
        for visit in self._of_kind("latent"):
            try:
                bijector(visit.name, visit.fn)
            except ModelError as error:
                what, _, remedy = str(error).partition(". ")
                problems.append(Problem(what, remedy[:1].lower() + remedy[1:].rstrip(".")))
        return problems

    @property
    def structure_problems(self) -> list[Problem]:
        """Sites and shapes that differ between runs."""
        changes = (change_problem(run.visits, self.visits) for run in self.runs[:-1])
        return [change for change in changes if change is not None][:1]

    @property
    def discrete_problems(self) -> list[Problem]:
        """Discrete latents that cannot be summed out."""
        problem = discrete_problem(self.visits)
        if problem is None and self._unconstrained() and self._of_kind("discrete"):
            problem = self._sum_problem()
        return [problem] if problem else []

    def _sum_problem(self) -> Problem | None:
        names = [visit.name for visit in self._of_kind("discrete")]
        point = self._point(0.5, torch.Generator().manual_seed(20263))
        try:
            with self.runner.first_runs(), validation(False), torch.no_grad():
                with self._sizes():
                    found = sums(self.runner, point, {})
                return sum_problem(names, found.unsqueeze(0))
        except StatesError as error:
            what, _, remedy = str(error).rpartition(": ")
            return Problem(what, remedy)
        except Exception as error:  # noqa: BLE001  whatever a model raises there, it is told
            return sum_problem(names, error=error)

    @property
    def summed_out(self) -> list[str]:
        """Each discrete latent with its number of values and its plates."""
        described = []
        for visit in self._of_kind("discrete"):
            values = visit.fn.enumerate_support(expand=False).shape[0]
            plates = "".join(f", plate {f.name!r} of {f.size}" for f in visit.frames)
            described.append(f"{visit.name} ({values} values{plates})")
        return described

    @property
    def data_problems(self) -> list[Problem]:
        """Observed values that are no numbers, or that cannot occur."""
        return list(data_problems(self.visits))

    @property
    def data_notes(self) -> list[Problem]:
        """Data outside a support that the model asks not to check, with ``validate_args=False``."""
        notes = map(unchecked_note, self._of_kind("observed"))
        remedy = "a density on all that the data can be gives evidence and predictions a meaning"
        return [Problem(note, remedy) for note in notes if note is not None]

    @property
    def minibatch_problems(self) -> list[Problem]:
        """Latents in plates of which the arguments hold some rows."""
        try:
            require_whole_rows(self.visits, self.runner.at_hand)
        except ModelError as error:
            what, _, remedy = str(error).partition(". ")
            return [Problem(what, remedy[:1].lower() + remedy[1:])]
        return []

    @property
    def minibatch_notes(self) -> list[Problem]:
        """Plates of which the arguments hold some rows."""
        note = minibatch_note(self.visits, self.runner.at_hand)
        remedy = "pass a Dataset, or all rows, where there are more of them"
        return [Problem(note, remedy)] if note else []

    @property
    def argument_problems(self) -> list[Problem]:
        """NaN and infinite numbers among the arguments, which a model may deal with."""
        remedy = "drop the rows, or fill the values; a mask alone leaves NaN gradients"
        return [Problem(what, remedy) for what in not_finite(self.model)]

    @property
    def shape_problems(self) -> list[Problem]:
        """Data, distributions and plates that do not agree."""
        return list(shape_problems(self.visits))

    @property
    def plateless(self) -> list[Problem]:
        """Sites with batch dims that no plate made."""
        visits = [*self._of_kind("latent"), *self._of_kind("observed")]
        problems = map(plateless_problem, visits)
        return [problem for problem in problems if problem is not None]

    @property
    def stream_problems(self) -> list[Problem]:
        """Why the batches of a streamed model do not stand for all data."""
        stream = self.model.stream
        if stream is None or not self._unconstrained():
            return []
        try:
            streamed(self.runner, stream)
        except ModelError as error:
            what, _, remedy = str(error).rpartition(": ")
            return [Problem(what, remedy)]
        return []

    @property
    def improper(self) -> list[str]:
        """Latents with an improper prior."""
        return [visit.name for visit in self._of_kind("latent") if is_improper(visit.fn)]

    @property
    def aimless(self) -> list[Problem]:
        """Latents with an improper prior and no influence on anything else."""
        names = self.improper if self._unconstrained() else []
        generator = torch.Generator().manual_seed(20266)
        with self.runner.first_runs(), validation(False):
            for radius in (0.5, 3.0) if names else ():
                point = self._point(radius, generator)
                leaves = [value.requires_grad_() for value in point.values()]
                try:
                    total, _ = self._evaluate(point, jacobian=False)
                    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
                except Exception:  # noqa: BLE001  told by `finite`
                    return []
                pairs = zip(point, gradients, strict=True)
                moved = {name for name, g in pairs if g is not None and bool((g != 0).any())}
                names = [name for name in names if name not in moved]
        return [aimless_problem(names)] if names else []

    @property
    def masked_out(self) -> list[str]:
        """Latents whose prior a mask hides wholly, other than those that `obs_mask` makes."""
        return [v.name for v in self._of_kind("latent") if _is_hidden(v, self.visits)]

    @property
    def forgotten(self) -> list[str]:
        """Arguments that are None in a model that observes nothing."""
        if any(visit.kind in ("observed", "factor") for visit in self.visits.values()):
            return []
        given = arguments(self.model)
        try:
            defaults = inspect.signature(self.model.fn).parameters.values()
        except (TypeError, ValueError):
            defaults = ()
        missing = [p.name for p in defaults if p.default is None and p.name not in given]
        return [name for name, value in given.items() if value is None] + missing

    @property
    def constant_data(self) -> list[str]:
        """Observed sites of real numbers that are all the same."""
        return constant_data(self.visits)

    @functools.cached_property
    def chance(self) -> Problem | None:
        """Whether a run at the same latents gives something else."""
        if not self._unconstrained():
            return None
        with self.runner.first_runs():
            return chance_problem(self.runner, self.runs[-1])

    # -- the log density at starting points ---------------------------------------------------

    @functools.cached_property
    def without_influence(self) -> list[str]:
        """Latents whose gradient was exactly zero wherever it was taken; after `finite`."""
        return [name for name, moved in self._gradients.items() if not moved]

    def finite(self) -> tuple[int, int, list[str]]:
        """At how many of how many points value and gradient are finite, and the sites to blame."""
        if not self._unconstrained() or not self._of_kind("latent"):
            return 0, 0, []
        finite, blamed = 0, {}
        generator = torch.Generator().manual_seed(20261)
        with self.runner.first_runs(), validation(False):
            for k in range(_POINTS):
                point = self._point(_RADIUS if k else 0.0, generator)
                try:
                    culprits = self._culprits(point)
                except StatesError:  # told by `discrete_problems`
                    return 0, 0, []
                finite += not culprits
                blamed.update(dict.fromkeys(culprits))
        return finite, _POINTS, list(blamed)

    def _point(self, radius: float, generator: torch.Generator) -> dict[str, Tensor]:
        """A uniform point in a box around the origin."""
        return {
            name: (
                radius * (2 * torch.rand(value.shape, generator=generator, device="cpu") - 1)
            ).to(value.device)
            for name, value in repetition(self.runs[-1]).unconstrained.items()
        }

    def _evaluate(
        self, point: Mapping[str, Tensor], *, jacobian: bool = True
    ) -> tuple[Tensor, Replay]:
        enumerate_ = bool(self._of_kind("discrete")) and discrete_problem(self.visits) is None
        replay = repetition(self.runs[-1])
        replay.unconstrained, replay.enumerate = point, enumerate_
        with self._sizes() if enumerate_ else contextlib.nullcontext():
            self.runner.run(replay, {})
            enumerated = Enumerated(replay.visits, self.runner.nesting) if enumerate_ else None
            return add_up(replay.visits, jacobian, self.runner.dtype, enumerated).total(), replay

    def _sizes(self) -> Sizes:
        """A watch on what runs that hold all values of discrete latents make."""
        kept = [*self.runner.data, *(v.value for v in self.visits.values())]
        return Sizes(sum(t.numel() for t in kept), [v.name for v in self._of_kind("discrete")])

    def _culprits(self, point: dict[str, Tensor]) -> list[str]:
        """Sites with a value or gradient that is not finite."""
        leaves = [value.requires_grad_() for value in point.values()]
        try:
            total, replay = self._evaluate(point)
            gradients = torch.autograd.grad(total, leaves, allow_unused=True)
        except StatesError:
            raise
        except Exception as error:  # noqa: BLE001  whatever a model raises there, it is told
            return [f"(raised {type(error).__name__}: {error})"]
        left = {
            site: what for (site, what), out in flags(replay.visits, frozenset()).items() if out
        }
        culprits = [
            f"{v.name} ({left[v.name]})" if v.guarded and v.name in left else v.name
            for v in replay.visits.values()
            if not _sound(v, replay)
        ]
        if not culprits and not _finite(total):
            culprits = ["(the sum over discrete sites)"]
        for name, gradient in zip(point, gradients, strict=True):
            moved = gradient is not None and bool((gradient != 0).any())
            self._gradients[name] = self._gradients.get(name, False) or moved
            if gradient is not None and not _finite(gradient):
                culprits.append(f"{name} (gradient)")
        return culprits

    def slope(self) -> Problem | None:
        """Whether autograd's gradient is the slope of the values."""
        if not self._unconstrained() or self.runner.dtype != torch.float64:
            return None
        generator, step = torch.Generator().manual_seed(20262), 1e-5
        rows = []
        with self.runner.first_runs(), validation(False):
            for _ in range(3):
                point = self._point(0.5, generator)
                try:
                    rows.append(self._slopes(point, self._point(1.0, generator), step))
                except Exception:  # noqa: BLE001  told by `finite`
                    return None
        ahead, behind, slopes = torch.stack(rows, -1)
        return slope_problem(ahead, behind, slopes, step)

    def _slopes(
        self, point: Mapping[str, Tensor], direction: Mapping[str, Tensor], step: float
    ) -> Tensor:
        ahead, _ = self._evaluate({n: v + step * direction[n] for n, v in point.items()})
        behind, _ = self._evaluate({n: v - step * direction[n] for n, v in point.items()})
        leaves = [value.requires_grad_() for value in point.values()]
        total, _ = self._evaluate(point)
        gradients = torch.autograd.grad(total, leaves, allow_unused=True)
        parts = zip(gradients, direction.values(), strict=True)
        slope = sum((g * d).sum() for g, d in parts if g is not None)
        return torch.stack([ahead.detach(), behind.detach(), torch.as_tensor(slope)])


def _is_hidden(visit: Visit, visits: Mapping[str, Visit]) -> bool:
    stem = visit.name.removesuffix("_unobserved")
    if stem != visit.name and {stem, f"{stem}_observed"} <= set(visits):
        return False
    masks, fn = [visit.mask], visit.fn
    while isinstance(fn, Independent | MaskedDistribution | ExpandedDistribution):
        masks.append(getattr(fn, "_mask", None))
        fn = fn.base_dist
    return any(mask is False or (isinstance(mask, Tensor) and not mask.any()) for mask in masks)


def _sound(visit: Visit, replay: Replay) -> bool:
    """Whether a site's log density is finite; under enumeration single values may be impossible."""
    log_prob = visit.log_prob()
    return _finite(log_prob.clamp(min=-1.0)) if replay.enumerate else _finite(log_prob)


def _finite(value: Tensor) -> bool:
    return bool(value.isfinite().all())
