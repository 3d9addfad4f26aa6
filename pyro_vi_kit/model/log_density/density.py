"""A Pyro model as a batched, differentiable log density over unconstrained space."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Container, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_vi_kit.core.device import Device, checked
from pyro_vi_kit.core.errors import ModelError, ModelWarning, ViError, in_words
from pyro_vi_kit.core.runtime import LOCK, RandomStream
from pyro_vi_kit.model.log_density.batching import (
    Batching,
    VectorisedCauchy,
    agree,
    batched,
    first_that_agrees,
)
from pyro_vi_kit.model.log_density.drawn import Drawn, hardened
from pyro_vi_kit.model.log_density.enumeration import Enumerated, Sizes, log_total
from pyro_vi_kit.model.log_density.handlers import (
    ArgumentRows,
    Replay,
    rows_among,
    subsample_indices,
)
from pyro_vi_kit.model.log_density.initial import (
    SPREADS,
    InitFunction,
    function_of,
    require_latents,
)
from pyro_vi_kit.model.log_density.oracle import Oracle, Rounded, Seen, require_same_as_pyro
from pyro_vi_kit.model.log_density.problems import (
    aimless_problem,
    chance_problems,
    is_unchecked,
    minibatch_note,
    require,
    require_usable,
    slope_problem,
    sum_problem,
    unchecked_notes,
)
from pyro_vi_kit.model.log_density.raised import Problem, not_finite, told
from pyro_vi_kit.model.log_density.runner import Runner
from pyro_vi_kit.model.log_density.streamed import Streamed
from pyro_vi_kit.model.log_density.structure import Block, FirstRuns, Site, global_block
from pyro_vi_kit.model.log_density.visits import (
    Key,
    Terms,
    Visit,
    add_up,
    constant_data,
    flags,
    scaled,
)
from pyro_vi_kit.model.model import Model

Values = dict[str, Tensor]

# Where it is looked for sites that leave their constraints: distances from the start in unconstrained
# space (the origin where none is given), some points at each, from where a fit begins to what is beyond
# any prior. Exponentials overflow on the way, which is no way out of a domain.
_RADII = (0.5, 2.0, 8.0, 30.0, 300.0, 1e4)
_POINTS = 6
# Of all points together, in numbers of the model.
_NUMBERS = 4_000_000
_SEED = 20265


@dataclass(frozen=True, eq=False)
class Recordings:
    """Recordings that densities of one model share, whatever their data; each is made once.

    Attributes:
        data: The data that recordings are made on. They are the same whoever asks first, and so are the
            recordings' last digits.
    """

    data: Sequence[Tensor]
    _made: dict[Hashable, Any] = field(default_factory=dict)

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What is kept under a key; made where there is nothing yet."""
        with LOCK:
            if key not in self._made:
                self._made[key] = make()
            return self._made[key]


class Density:
    """The unconstrained log density of a model, `log_prob(z): [K, D] -> [K]`.

    Data, learned parameters and minibatch indices are inputs of every call; what the model object
    holds is only their default. Of every method ``z`` are K unconstrained points, values `[K, *batch,
    *event]` by site or flat `[K, D]`; ``params`` unconstrained learned parameters by name, by default
    `params`; ``data`` tensors in the place of `data`, in the same order; ``index`` the rows `[B]` of a
    minibatch, by plate.

    Args:
        model: The model and its data.
        dtype: Precision of everything: arguments, learned parameters and literals are cast to it.
        device: Where everything is: arguments, learned parameters and what the model closes over are
            copied there. By default where the arguments are.
        drawn: Discrete latents that are not summed out: they are among ``latents``, by a weight for each
            of their states.
        init: Where the model is first run, if it cannot be run anywhere: constrained values by site, or
            a function of the site as Pyro's ``init_to_*``.

    Attributes:
        start: The unconstrained point `[D]` that ``init`` gives; None without it.
        device: Where everything is.
        structure: Sites, plates and parameters, as two runs of the model met them.
        latents: The continuous latent sites and the drawn ones, in the model's order.
        discrete: The other discrete latent sites, which are summed out exactly.
        block: Their layout in a flat vector.
        dim: D, the length of that vector.
        data: The tensors among the model's arguments, cast.
        params: Unconstrained learned parameters by name, copies of the user's.
        observed: Values of the observed sites.
        batching: How K points are evaluated: see `batching.batched`.
        streamed: How a batch stands for all data, where they are streamed: ``data`` is an example then.
        constant: Observed sites of real numbers that are all the same.
        exempt: Sites made with ``validate_args=False``, whose arguments and data may be what they are.
        largest: Numbers of the largest tensor of one point where discrete latents are summed out.
        leaving: What leaves its constraint somewhere, in words, by site: the density is zero there.
        notes: What to know of how the model is read; each is said as a `ModelWarning` when it is made.
        given_up: What was tried and given up, and why, one line each.
        recordings: Where recordings are kept that serve other data too; shared with what `with_data`
            gives. None where nobody asked for other data.

    Raises:
        ModelError: If the model raises, has no continuous latent, has discrete latents that cannot be
            summed out, changes its structure, holds NaN in its data, or draws random numbers outside
            its sample sites; if it is streamed, and has no plate that follows the batch.
    """

    @torch.enable_grad()  # a caller may have gradients off; what follows differentiates
    def __init__(
        self,
        model: Model,
        *,
        dtype: torch.dtype = torch.float64,
        device: Device | None = None,
        drawn: Drawn | None = None,
        init: Mapping[str, Any] | InitFunction | None = None,
    ) -> None:
        where = None if init is None else function_of(init)
        first = FirstRuns(Runner(model, dtype, checked(device), drawn), where)
        require(first)
        self._read(first)
        if init is not None:
            require_latents(init, [site.name for site in self.latents])
        self._verify(first)
        for note in self.notes:
            warnings.warn(note, ModelWarning, stacklevel=2)

    @classmethod
    def unverified(cls, first: FirstRuns) -> Density:
        """The density of a model that may have faults, evaluated point by point, to look for them.

        Args:
            first: Runs that had unconstrained values of their latents.
        """
        density = cls.__new__(cls)
        density._read(first)
        return density.strict()

    def _read(self, first: FirstRuns) -> None:
        """Take over what the first runs showed."""
        self._runner = runner = first.runner
        self.model = runner.model
        self.drawn = runner.drawn
        self.dtype = runner.dtype
        self.device: torch.device = runner.device
        self.data: list[Tensor] = runner.data
        self.given_up: list[str] = []
        self.recordings: Recordings | None = None
        self.structure = first.structure
        self.streamed: Streamed | None = first.streamed
        visits = first.visits
        self.observed: Values = _observed(visits)
        self.params: Values = {
            name: self.cast(p.value).requires_grad_(p.value.is_floating_point())
            for name, p in self.structure.parameters.items()
        }
        runner.owners = {
            (p.owner, p.attribute): name
            for name, p in self.structure.parameters.items()
            if p.owner is not None
        }
        at_hand = minibatch_note(visits, runner.at_hand)
        self.notes: list[str] = [*unchecked_notes(visits), *([at_hand] if at_hand else [])]
        self.constant: list[str] = constant_data(visits)
        self.exempt = frozenset(v.name for v in visits.values() if is_unchecked(v))
        self.latents: list[Site] = self.structure.of_kind("latent")
        self.discrete: list[Site] = self.structure.of_kind("discrete")
        self._example = {v.name: v.value for v in first.of_kind("discrete")}
        self.block: Block = global_block(self.latents)
        self.dim = self.block.dim
        self.start = self._packed(runner.centre) if runner.centre else None
        self.batching: Batching = "loop"
        self.largest = 0
        self.leaving: dict[str, str] = {}

    def _verify(self, first: FirstRuns) -> None:
        """Find the fastest right way to evaluate it, and refuse it where no way is right.

        Raises:
            ModelError: If it is not the density of Pyro's own trace, its gradient or its sum over
                discrete latents is wrong, or a latent with an improper prior has no influence.
        """
        with RandomStream(1):
            # Three is no likely size of a model's dimension; four, ten or sixteen would be.
            away = self.cast(torch.randn(3, self.dim, dtype=self.dtype, device="cpu"))
            # Numbers of float32, so that a model in either precision has them exactly.
            z = self._around(away).float().to(self.dtype)
            exact = self._compared(z)
            self.batching, reason = first_that_agrees(lambda mode: self._in_mode(mode, z), exact)
            again = exact
            if self.batching == "loop":
                self.give_up(f"The density is evaluated point by point in a Python loop: {reason}")
                again = self._in_mode("loop", z)
            changes = not all(agree(a, b, 1e-9, 1e-4) for a, b in zip(exact, again, strict=True))
            # A model that is not the same twice agrees with itself in no way.
            problem = next(chance_problems(first), None) if changes else None
            problem = problem or self.slope_problem(z, exact[1])
            problem = problem or self.sum_problem(z) or self.aimless_problem(z)
            if problem is not None:
                raise ModelError(str(problem))
            self.leaving = self._sites_that_leave()
            self._runner.guarded = frozenset(self.leaving)

    def _packed(self, values: Mapping[str, Tensor]) -> Tensor:
        """One point `[D]`; drawn discrete sites, which have no value among these, stand at zeros."""
        rest = {site.name: site.unconstrained_shape for site in self.latents}
        full = {n: values[n] if n in values else self.cast(torch.zeros(s)) for n, s in rest.items()}
        return self.block.pack({name: value.unsqueeze(0) for name, value in full.items()})[0]

    def near_start(self, away: Tensor) -> Tensor:
        """Points `[K, D]` at which the model can be run, for standard normal numbers.

        Around the origin of unconstrained space, or as near to `start` as the model needs.
        """
        away = self._runner.spread * away
        return away if self.start is None else self.start + away

    def trial(self, seed: int) -> Values:
        """One unconstrained point `[1, ...]` by site near the start, the same for the same seed."""
        with RandomStream(seed):
            away = self.cast(torch.randn(1, self.dim, dtype=self.dtype, device="cpu"))
        return self.within(self.block.unpack(self.near_start(away)))

    def _around(self, away: Tensor) -> Tensor:
        """Points `[K, D]` to try the model at; finds how near to its start it has to be."""
        if self.start is None:
            return self.block.pack(self.within(self.block.unpack(self.near_start(away))))
        # Which of them need it is not known yet.
        self._runner.guarded = frozenset(self.structure.sites)
        for spread in [spread for spread in SPREADS if spread <= self._runner.spread]:
            self._runner.spread = spread
            z = self.block.pack(self.within(self.block.unpack(self.near_start(away))))
            with torch.no_grad(), contextlib.suppress(RuntimeError, ValueError):
                if bool(self.log_prob(z).isfinite().all()):
                    self._runner.guarded = frozenset()
                    return z
        _, ended = self.visits(self.somewhere())
        found = self.not_finite(self.somewhere()) or [ended or "none alone"]
        raise ModelError(
            "the log density is not finite near the point that init= names (site(s) "
            f"{', '.join(found)}): give a point where it is"
        )

    def not_finite(self, z: Mapping[str, Tensor]) -> list[str]:
        """Sites whose log density is not finite at the first of K points, discrete latents held."""
        visits, _ = self.visits(z)
        with torch.no_grad(), self._runner.isolated():
            met = [visit for visit in visits.values() if visit.counts]
            return [visit.name for visit in met if not bool(visit.log_prob().isfinite().all())]

    @property
    def width(self) -> int:
        """Numbers that one point makes in the model, roughly: latents, data and observations."""
        held = [*self.data, *self.observed.values()]
        return self.dim + sum(tensor.numel() for tensor in held)

    @property
    def inside(self) -> frozenset[str]:
        """Sites of a streamed model that are about a batch alone."""
        return frozenset() if self.streamed is None else self.streamed.inside

    @property
    def at_hand(self) -> frozenset[str]:
        """Plates of which the arguments hold the minibatch that they declare."""
        return self._runner.at_hand

    def cast(self, tensor: Tensor) -> Tensor:
        """A tensor in this precision and on this device, detached where it is a floating one.

        Random points are drawn on the CPU and brought here, so that they are the same everywhere.
        """
        return self._runner.cast(tensor)

    def somewhere(self) -> Values:
        """One unconstrained point `[1, ...]` by site at which the model runs."""
        zeros = torch.zeros(self.dim, dtype=self.dtype, device=self.device)
        return self.block.unpack((zeros if self.start is None else self.start).unsqueeze(0))

    def initial(self, without: Container[str] = ()) -> Values | None:
        """The values that ``init`` gave, for another Density of the same model; None without it.

        Args:
            without: Plates whose latents are left out, since the other has other rows of them.
        """
        sites = self.structure.sites
        found = {
            name: value
            for name, value in self._runner.initial.items()
            if not any(plate.name in without for plate in sites[name].plates)
        }
        return found if self._runner.initial else None

    def within(self, z: Mapping[str, Tensor]) -> Values:
        """Unconstrained values in which the weights of drawn discrete sites are on the simplex."""
        states = {site.name for site in self.latents if site.states}
        return {name: v.softmax(-1) if name in states else v for name, v in z.items()}

    # -- evaluation ---------------------------------------------------------------------------

    def terms(
        self,
        z: Mapping[str, Tensor],
        params: Mapping[str, Tensor] | None = None,
        data: Sequence[Tensor] | None = None,
        index: Mapping[str, Tensor] | None = None,
        *,
        jacobian: bool = True,
        power: float = 1.0,
        seen: list[Seen] | None = None,
    ) -> Terms:
        """The log joint at K points, by part.

        Args:
            z: Unconstrained values `[K, *batch, *event]` by site; on a minibatch, the plate's batch
                dim has the minibatch's length.
            params: See the class.
            data: Tensors in the place of `self.data`, in the same order. For a streamed model they are
                a batch of any length B, and the scale of its plate is N / B.
            index: See the class.
            jacobian: Whether the density is that of z (with the log determinant of the constraining
                transforms) or that of the constrained values.
            power: What the likelihood is raised to, observed sites and factors; for models whose
                discrete sites, if any, it does not depend on.
            seen: Filled with what each run met, where points are evaluated one by one.
        """
        scale: dict[str, float] = {}

        def single(point: Values) -> tuple[Tensor, dict[str, Tensor]]:
            visits = self._with_all_states(point, params, data, index)
            summed = self._enumerated(visits)
            terms = add_up(
                visits,
                self.dtype,
                jacobian=jacobian,
                power=power,
                without=summed.factors if summed else (),
                marginals=summed.marginals() if summed else (),
            )
            scale.update(terms.scale)
            if seen is not None:
                seen.append(Seen.of(visits))
            return terms.shared, terms.local

        shared, local = self._batched(single, z)
        if self.streamed is not None:
            scale[self.streamed.plate] = self.streamed.scale(self.data if data is None else data)
        return Terms(shared, local, scale)

    def batches(self, size: int | None = None) -> Iterator[list[Tensor]]:
        """The data tensors of a streamed model, a batch at a time, every row once.

        Args:
            size: Rows of a dataset's batches, the last may have fewer; by default about 200,000 numbers.
                A loader has its own.
        """
        stream, streamed = self.model.stream, self.streamed
        if stream is not None and streamed is not None:
            for batch in stream.all_batches(size or stream.size_for(None), self.dtype):
                yield streamed.completed(batch, self.data)

    def held(self, data: Sequence[Tensor]) -> Density:
        """The density of a streamed model on one batch, scaled to all rows; see `subset`."""
        other = copy.copy(self)
        other.data = list(data)
        other._runner = self._runner.holding(data)
        return other

    def with_data(self, data: Sequence[Tensor]) -> Density:
        """The density of the same model on other data of the same shapes.

        The model is not looked over again, and what is recorded for one of them serves all.

        Raises:
            ModelError: If a shape differs, the data are no numbers or cannot occur, or the model raises.
        """
        shapes = [tuple(tensor.shape) for tensor in self.data]
        if [tuple(tensor.shape) for tensor in data] != shapes:
            found = ", ".join(str(tuple(tensor.shape)) for tensor in data)
            raise ModelError(
                f"data of shapes {found} do not fit a model on {', '.join(map(str, shapes))}: make a "
                "new Density of them"
            )
        if self.recordings is None:
            self.recordings = Recordings(self.data)
        other = self.held([self.cast(tensor) for tensor in data])
        args, kwargs = other.arguments()
        other.model = self.model.with_args(*args, **kwargs)
        # Leaves that require a gradient tell supports that follow latents.
        leaves = {name: value.requires_grad_() for name, value in self.trial(_SEED).items()}
        with other._runner.isolated(), torch.enable_grad():
            visits = other.differentiable_visits(leaves)
            require_usable(visits, self.exempt)
        other.observed = _observed(visits)
        return other

    def log_prob(
        self,
        z: Tensor,
        params: Mapping[str, Tensor] | None = None,
        data: Sequence[Tensor] | None = None,
        *,
        jacobian: bool = True,
    ) -> Tensor:
        """Log density `[K]` in nats at K flat points `[K, D]`, differentiable in z and params."""
        return self.terms(self.block.unpack(z), params, data, jacobian=jacobian).total()

    def strict(self) -> Density:
        """The density with every site zero where it is not defined, also those never found so.

        For draws that are judged: the check costs little there, and nothing is left to chance.
        """
        other = copy.copy(self)
        other._runner = copy.copy(self._runner)
        other._runner.guarded = frozenset(self.structure.sites) - self.exempt
        return other

    @torch.no_grad()
    def outside(
        self, z: Mapping[str, Tensor], params: Mapping[str, Tensor] | None = None
    ) -> dict[Key, Tensor]:
        """Whether arguments or data leave their constraints, `[K]` by site and words."""

        def single(point: Values) -> dict[Key, Tensor]:
            return flags(self._with_all_states(point, params), self.exempt)

        return self._batched(single, z)

    def log_prob_and_grad(self, z: Tensor, *, jacobian: bool = True) -> tuple[Tensor, Tensor]:
        """Log density `[K]` and its gradient `[K, D]`, detached."""
        z = z.detach().requires_grad_()
        log_prob = self.log_prob(z, jacobian=jacobian)
        (grad,) = torch.autograd.grad(log_prob.sum(), z)
        return log_prob.detach(), grad

    @torch.no_grad()
    def constrain(
        self,
        z: Tensor | Mapping[str, Tensor],
        params: Mapping[str, Tensor] | None = None,
        data: Sequence[Tensor] | None = None,
    ) -> Values:
        """Latent and deterministic values `{site: [K, *batch, *event]}` at K points.

        Discrete latents are drawn, exactly, given the continuous ones, from torch's global random
        state: enter a `runtime.RandomStream` around it where the model has any. Of a streamed model
        they are the sites outside its data plate.
        """

        def single(point: Values) -> Values:
            states = self._drawn(point, params, data)
            visits = self._run(Replay(unconstrained=point, constrained=states), params, data)
            return {
                name: visit.value.long() if visit.has_states else visit.value.to(self.dtype)
                for name, visit in visits.items()
                if visit.kind in ("latent", "deterministic", "discrete") and name not in self.inside
            }

        return self._sampled(single, self._by_site(z))

    @torch.no_grad()
    def log_likelihood(
        self, z: Tensor | Mapping[str, Tensor], params: Mapping[str, Tensor] | None = None
    ) -> Values:
        """Log density of each observation, and of factors in plates, `{site: [K, *batch]}`, nats.

        Where an observation depends on discrete latents of its own plates, they are summed out. Where
        it depends on others (a global one, a chain outside of plates), they are drawn given all data,
        from torch's global random state, and held.
        """

        def single(point: Values) -> Values:
            visits = self._with_all_states(point, params)
            enumerated = self._enumerated(visits)
            observed = [visits[site.name] for site in self.structure.likelihood]
            if enumerated is None:
                return {v.name: v.log_prob() for v in observed}
            # Those that lie in other plates than the observation are drawn.
            states, _ = enumerated.draw()
            given = self._run(Replay(unconstrained=point, constrained=states), params)
            values = {}
            for v in observed:
                rows = enumerated.likelihood(v.name) if v.name in enumerated.factors else None
                values[v.name] = given[v.name].log_prob() if rows is None else scaled(rows, v.scale)
            return values

        return self._sampled(single, self._by_site(z))

    @torch.no_grad()
    def simulate(
        self,
        z: Tensor | Mapping[str, Tensor] | None,
        model: Model | None = None,
        params: Mapping[str, Tensor] | None = None,
        *,
        draws: int | None = None,
    ) -> Values:
        """Observed sites drawn anew: predictive draws at z, or from the prior where z is None.

        Uses torch's global random state; enter a `runtime.RandomStream` around it. Discrete latents
        are drawn given the continuous ones and the model's own data; on another model those in plates
        of another length are drawn given the continuous ones alone, since their rows are new.

        Args:
            z: K unconstrained points, or None for draws of the latents from their prior.
            model: The same model on other arguments; its own by default.
            params: See the class.
            draws: How many draws, where z is None.

        Returns:
            `{site: [K, *shape]}` of the latent, discrete, observed and deterministic sites.

        Raises:
            ModelError: If a prior cannot be sampled, or the model refuses the new arguments.
        """
        nowhere = {"": torch.zeros(draws or 1, device=self.device)}
        points = nowhere if z is None else dict(self._by_site(z))

        def single(point: Values) -> Values:
            drawn = {} if z is None else self._drawn(point, params)
            replay = Replay(
                unconstrained=point, constrained=drawn, simulate=True, sample_latents=True
            )
            visits = self._run(replay, params, model=model).values()
            return {
                v.name: v.value.long() if v.has_states else v.value
                for v in visits
                if v.kind != "factor"
            }

        try:
            return self._sampled(single, points)
        except ViError:
            raise
        except NotImplementedError as error:
            raise ModelError(f"a site cannot be sampled: {error}") from error
        except Exception as error:
            raise ModelError(f"the model raised {type(error).__name__}: {error}") from error

    @torch.no_grad()
    def unconstrain(self, init: Mapping[str, Any] | InitFunction) -> Tensor:
        """The flat point `[D]` of constrained values; sites that have none start at the origin.

        Args:
            init: Values by site, or a function of the site, as Pyro's ``init_to_*``, which may draw from
                torch's random state.

        Raises:
            ModelError: If a name is no latent site, or a value is outside its support or shape.
            OptionError: If the function raises, or gives what is no value.
        """
        require_latents(init, [site.name for site in self.latents])
        replay = Replay(init=function_of(init), constrained=self._example)
        with self._runner.isolated():
            return self._packed(self._unconstrained_of(self._run(replay)))

    @torch.no_grad()
    def unconstrained(self, values: Mapping[str, Tensor]) -> Tensor:
        """The flat points `[K, D]` of constrained values `{latent: [K, *batch, *event]}`.

        Not finite where a value lies on the boundary of its support.
        """

        def single(point: Values) -> Values:
            return self._unconstrained_of(self._run(Replay(constrained=self._example | point)))

        latents = {site.name: self.cast(values[site.name]) for site in self.latents}
        return self.block.pack(self._sampled(single, latents))

    def _unconstrained_of(self, visits: Mapping[str, Visit]) -> Values:
        found = {site.name: visits[site.name].unconstrained for site in self.latents}
        return {name: value for name, value in found.items() if value is not None}

    def observations(
        self, data: Model | Sequence[Tensor] | None = None, *, attached: bool = False
    ) -> Values:
        """Values of the observed sites.

        Args:
            data: The same model on other arguments, or tensors in the place of `self.data`; the
                model's own data by default.
            attached: Whether they are to be differentiable in these tensors.
        """
        if data is None:
            return self.observed
        model, tensors = (data, None) if isinstance(data, Model) else (None, data)
        with self._runner.isolated(), torch.set_grad_enabled(attached):
            visits = self._run(Replay(constrained=self._example), data=tensors, model=model)
        values = {v.name: v.value for v in visits.values() if v.kind == "observed"}
        return values if attached else {name: value.detach() for name, value in values.items()}

    def visits(
        self, z: Mapping[str, Tensor], index: Mapping[str, Tensor] | None = None
    ) -> tuple[dict[str, Visit], str]:
        """The sites that a run at the first of K points meets, and what ended it.

        Returns:
            Visits by site, and the name of the site behind the last one where the run raised.
        """
        replay = Replay(unconstrained={name: value[0] for name, value in z.items()})
        replay.constrained = {} if index else self._example
        with self._runner.isolated(), torch.no_grad():
            try:
                self._run(replay, index=index)
            except Exception:  # noqa: BLE001  the caller knows it, and asks where
                return replay.visits, next(
                    (name for name in self.structure.sites if name not in replay.visits), ""
                )
        return replay.visits, ""

    def differentiable_visits(self, z: Mapping[str, Tensor]) -> dict[str, Visit]:
        """The sites that a run at the first of K points meets, with their ties to z and parameters."""
        point = {name: value[0] for name, value in z.items()}
        with self._runner.isolated(), torch.enable_grad():
            return self._run(Replay(unconstrained=point, constrained=self._example))

    def holding(self, params: Mapping[str, Tensor]) -> Density:
        """The same density with these values of its learned parameters, which nothing trains."""
        density = copy.copy(self)
        density.params = {name: value.detach() for name, value in params.items()}
        return density

    def subset(self, index: Mapping[str, Tensor]) -> Density:
        """The density of the same model on some rows of data in memory, scaled to all of them.

        Given the globals its rows are those of the whole, N / B times as informative.
        """
        fn = self.model.fn

        sliced = {name: size for name, size in self._runner.sliced.items() if name in index}
        chosen = {name: rows for name, rows in index.items() if name not in sliced}
        at_hand = self.at_hand

        def some(*args: Any, **kwargs: Any) -> Any:
            with subsample_indices(chosen, at_hand=at_hand), ArgumentRows(sliced):
                return fn(*args, **kwargs)

        args, kwargs = self.arguments(rows_among(self.data, sliced, index))
        model = Model(some, *args, kwargs=kwargs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ModelWarning)  # they were said of all rows
            density = Density(
                model,
                dtype=self.dtype,
                device=self.device,
                drawn=self.drawn,
                init=self.initial(index),
            )
        density.params = self.params
        return density

    def transform(
        self, z: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Constrained value and log determinant of each latent at one unconstrained point.

        Runs the model on these arguments under whatever handlers are active, for a Pyro guide whose
        supports depend on other latents.
        """
        replay = Replay(unconstrained=z, constrained=self._example)
        with self.casting():
            visits = self._run(replay, model=self.model.with_args(*args, **kwargs))
        found = [visits[site.name] for site in self.latents]
        return {v.name: (v.value, v.log_det) for v in found if v.log_det is not None}

    @property
    def spread(self) -> float:
        """How far from its start the model was tried, in unconstrained space."""
        return self._runner.spread

    @property
    def sliced(self) -> Mapping[str, int]:
        """N of plates whose minibatches are rows of the arguments; see `slice_arguments`."""
        return self._runner.sliced

    def slice_arguments(self, plates: Mapping[str, int]) -> None:
        """Take minibatches of these plates as rows of the arguments that are as long as they, N each.

        That is for models that read no indices. `subsampling.require_subsamplable` tries it.
        """
        self._runner.sliced = dict(plates)

    def casting(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which operations of the model find what it closes over cast and at hand."""
        return self._runner.precision or contextlib.nullcontext()

    def each_run_anew(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """The model's function, for others to call in `casting`: no run sees what the last one wrote."""
        precision = self._runner.precision
        if precision is None:
            return fn

        def anew(*args: Any, **kwargs: Any) -> Any:
            precision.forget()
            return fn(*args, **kwargs)

        return anew

    def learned(
        self, params: Mapping[str, Tensor] | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """A context in which the user's modules hold these parameters instead of their own."""
        return self._runner.learned(self.params if params is None else params)

    def arguments(
        self, data: Sequence[Tensor] | None = None, model: Model | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The positional and keyword arguments: with these tensors, or those of another model."""
        return self._runner.arguments(data, model)

    # -- how the model is run -----------------------------------------------------------------

    def _run(
        self,
        replay: Replay,
        params: Mapping[str, Tensor] | None = None,
        data: Sequence[Tensor] | None = None,
        index: Mapping[str, Tensor] | None = None,
        model: Model | None = None,
    ) -> dict[str, Visit]:
        self._runner.run(replay, self.params if params is None else params, data, index, model)
        return replay.visits

    def _with_all_states(
        self,
        point: Values,
        params: Mapping[str, Tensor] | None = None,
        data: Sequence[Tensor] | None = None,
        index: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Visit]:
        """A run in which discrete latents hold all their values at once."""
        replay = Replay(unconstrained=point, enumerate=bool(self.discrete))
        return self._run(replay, params, data, index)

    def _enumerated(self, visits: Mapping[str, Visit]) -> Enumerated | None:
        """The sites of such a run that depend on discrete latents, where the model has any."""
        return Enumerated(visits, self._runner.nesting) if self.discrete else None

    def _drawn(
        self,
        point: Values,
        params: Mapping[str, Tensor] | None,
        data: Sequence[Tensor] | None = None,
    ) -> Values:
        """The discrete latents, drawn given the continuous ones and the data; `{}` where none."""
        if not self.discrete:
            return {}
        visits = self._with_all_states(point, params, data)
        return Enumerated(visits, self._runner.nesting).draw()[0]

    def _batched(
        self,
        single: Callable[[Values], Any],
        z: Mapping[str, Tensor],
        mode: Batching | None = None,
    ) -> Any:
        size = next(iter(z.values())).shape[0]
        with self._runner.isolated():
            # One point needs no vmap, and is what NUTS and mode searches ask for.
            return batched(single, z, mode or ("loop" if size == 1 else self.batching))

    def _sampled(self, single: Callable[[Values], Values], z: Mapping[str, Tensor]) -> Values:
        """As `_batched`, for functions that may draw: vmap has no rule for some samplers."""
        try:
            with warnings.catch_warnings(), VectorisedCauchy():
                warnings.filterwarnings("ignore", message="There is a performance drop")
                return self._batched(single, z)
        except ViError:
            raise
        except Exception as error:  # noqa: BLE001  whatever vmap cannot do, the loop may
            found = self._batched(single, z, "loop")
            self.give_up(f"Draws are made point by point in a Python loop: {in_words(error)}")
            return found

    def give_up(self, line: str) -> None:
        """Note what was tried and given up, once."""
        if line not in self.given_up:
            self.given_up.append(line)

    def _by_site(self, z: Tensor | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return self.block.unpack(z) if isinstance(z, Tensor) else z

    # -- whether it is right ------------------------------------------------------------------

    def _compared(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Log density and gradient, point by point, compared with Pyro's own trace of the model."""
        seen: list[Seen] = []
        try:
            with self.watched() as sizes:
                exact = self._exact(z, seen)
        except ViError:
            raise
        except Exception as error:
            if self.discrete:
                names = (site.name for site in self.discrete)
                raise ModelError(str(sum_problem(names, error=error))) from error
            if not isinstance(error, RuntimeError):
                raise
            said = told(error, self.model, self.structure.sites)
            raise ModelError(f"the log density cannot be evaluated: {said}") from error
        self.largest = 0 if sizes is None else sizes.largest
        bad = next(not_finite(self.model), None) if bool(exact[0].isnan().all()) else None
        if bad is not None:
            raise ModelError(
                f"the log density is NaN, and {bad}: drop the rows, or fill the values"
            )
        self._require_same_as_pyro(z, seen)
        if self._runner.precision and not self._runner.precision.met:
            self._runner.precision = None
        return exact

    @contextlib.contextmanager
    def watched(self) -> Iterator[Sizes | None]:
        """A watch on how many numbers evaluations make while discrete latents hold all their values.

        Raises:
            StatesError: On the way, if they are too many.
        """
        if not self.discrete:
            yield None
            return
        with Sizes(self.width, [site.name for site in self.discrete]) as sizes:
            yield sizes

    def _in_mode(self, mode: Batching, z: Tensor) -> tuple[Tensor, Tensor]:
        self.batching = mode
        return self.log_prob_and_grad(z)

    def _exact(self, z: Tensor, seen: list[Seen]) -> tuple[Tensor, Tensor]:
        """Log density and gradient, point by point, and what the runs met."""
        z = z.detach().requires_grad_()
        comparable = not self.discrete and self.drawn is None
        noted = seen if comparable else None
        log_prob = self.terms(self.block.unpack(z), seen=noted).total()
        (grad,) = torch.autograd.grad(log_prob.sum(), z)
        return log_prob.detach(), grad

    def _require_same_as_pyro(self, z: Tensor, seen: Sequence[Seen]) -> None:
        """Refuse a density that is not the one of Pyro's own trace."""
        points = self.block.unpack(z)
        points |= {s.name: hardened(points[s.name]) for s in self.latents if s.states}

        def at(k: int, low: torch.dtype | None = None) -> Seen:
            point = {name: value[k] for name, value in points.items()}
            with self._runner.isolated(), Rounded(low) if low else contextlib.nullcontext():
                return Seen.of(self._run(Replay(unconstrained=point, constrained=self._example)))

        met = seen or [at(k) for k in range(len(z))]
        oracle = Oracle(self._runner, self.structure.parameters, self.params)
        require_same_as_pyro(oracle, met, at)

    def slope_problem(self, z: Tensor, grad: Tensor) -> Problem | None:
        """A latent that is cut off from autograd; ``grad`` are its gradients at points `[K, D]`."""
        if self.dtype != torch.float64:
            return None  # float32 cannot tell
        step = 1e-5 * torch.randn_like(z).sign()
        with torch.no_grad():
            ahead, behind = self.log_prob(z + step), self.log_prob(z - step)
        return slope_problem(ahead, behind, (grad * step).sum(-1) / 1e-5, 1e-5)

    def sum_problem(self, z: Tensor) -> Problem | None:
        """A model that computes something else where discrete sites hold all their values at once.

        Its log joint at points `[K, D]`, unscaled, by elimination; and by the chain rule, log p(z) =
        log p(z, d) - log p(d | z) for any values d of the discrete sites. They are drawn, and p(z, d) is
        that of a plain run.
        """
        if not self.discrete:
            return None

        def single(point: Values) -> Tensor:
            enumerated = Enumerated(self._with_all_states(point), self._runner.nesting)
            states, log_q = enumerated.draw()
            # Before the next run, which writes anew into what a model closes over.
            total = enumerated.total()
            plain = self._run(Replay(unconstrained=point, constrained=states))
            return torch.stack([total, log_total(plain) - log_q])

        with torch.no_grad():
            pairs = self._batched(single, self.block.unpack(z), "loop")
        return sum_problem((site.name for site in self.discrete), pairs)

    def aimless_problem(self, z: Tensor) -> Problem | None:
        """Improper priors on latents that have no influence on anything else."""
        improper = [site.name for site in self.latents if site.improper]
        if not improper:
            return None
        # Further out too: what is cut off near the origin may not be there.
        _, grad = self.log_prob_and_grad(torch.cat([z, 10 * z]), jacobian=False)
        parts = self.block.unpack(grad)
        aimless = [name for name in improper if not bool((parts[name] != 0).any())]
        return aimless_problem(aimless) if aimless else None

    def _sites_that_leave(self) -> dict[str, str]:
        """What leaves its constraint at some of a few dozen points, far out too, in words by site."""
        each = max(1, min(_POINTS, _NUMBERS // (len(_RADII) * max(self.width, 1))))
        radii = torch.tensor(_RADII, dtype=torch.float64).repeat_interleave(
            1 if self.batching == "loop" else each
        )
        generator = torch.Generator().manual_seed(_SEED)
        normal = torch.randn(len(radii), self.dim, generator=generator, dtype=torch.float64)
        points = self.cast(radii[:, None] * normal)
        z = self.block.unpack(points if self.start is None else self.start + points)
        return dict(self._leaving_at(self.within(z)))

    def _leaving_at(self, z: Values) -> set[Key]:
        """What leaves its constraint at some of K points."""
        try:
            return {key for key, where in self.outside(z).items() if bool(where.any())}
        except ViError:
            raise
        except Exception:  # noqa: BLE001  a model may raise far out; the others are asked one by one
            points = len(next(iter(z.values())))
            if points == 1:
                return set()
            single = [{name: value[k : k + 1] for name, value in z.items()} for k in range(points)]
            return set().union(*map(self._leaving_at, single))


def _observed(visits: Mapping[str, Visit]) -> Values:
    return {v.name: v.value.detach() for v in visits.values() if v.kind == "observed"}
