"""A trained guide as something to draw from and to weigh: over a Density, or by Pyro's traces."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyro_vi_kit.density import Density
from pyro_vi_kit.density.guarding import Key, flags
from pyro_vi_kit.density.handlers import Visit, kind_of, sample_sites
from pyro_vi_kit.density.runner import placed
from pyro_vi_kit.density.usable import is_unchecked
from pyro_vi_kit.errors import ModelError
from pyro_vi_kit.export import Group
from pyro_vi_kit.groups import (
    GIVEN_DRAWS,
    by_observation,
    data_groups,
    in_chunks,
    log_likelihood,
    model_groups,
    prior_groups,
    sampled,
    shares_outside,
    width_of,
)
from pyro_vi_kit.guides import Guide
from pyro_vi_kit.guides.streamed import joined_draws, weigh_all
from pyro_vi_kit.model import Model
from pyro_vi_kit.psis import psis, resample
from pyro_vi_kit.runtime import RandomStream, isolated, private_params, require_memory, seed_of

# The model's trace and the guide's.
Pair = tuple[poutine.Trace, poutine.Trace]

_CHUNK_NUMBERS = 4_000_000
# Draws in the prior groups of an export, and no more than of the posterior.
_PRIOR_DRAWS = 500


class Weighed(NamedTuple):
    """log p(x, z) and log q(z) at draws from q, each `[S]`, float64, on the CPU, in nats."""

    log_p: Tensor
    log_q: Tensor


class Approximation(Protocol):
    """A trained guide.

    Attributes:
        name: The guide's name.
        point: Whether it is a point estimate, which has no density.
        dtype: Its precision.
        cost: Numbers that one draw makes in the model, roughly.
    """

    name: str
    point: bool
    dtype: torch.dtype
    cost: int

    def draw(self, draws: int, seed: int) -> dict[str, Tensor]:
        """Draws from q of every latent and deterministic site, `{site: [S, *batch, *event]}`.

        Discrete sites are drawn given the continuous ones and the data.
        """
        ...

    def weigh(self, draws: int, seed: int) -> Weighed:
        """The log densities of what `draw` gives with that seed."""
        ...

    def draw_and_weigh(self, draws: int, seed: int) -> tuple[dict[str, Tensor], Weighed]:
        """What `draw` and `weigh` give with that seed, drawn once."""
        ...

    def outside(self, draws: int, seed: int) -> dict[str, float]:
        """Which share of draws leaves the domain of a distribution, by site and what does, in words."""
        ...

    def predict(
        self, model: Model, draws: int, seed: int, *, corrected: bool = False
    ) -> dict[str, Tensor]:
        """Observed and deterministic sites drawn anew, on a model's own or other arguments.

        ``corrected`` starts from draws chosen by Pareto-smoothed importance resampling.
        """
        ...

    def log_likelihood(self, draws: int, seed: int) -> tuple[Group, Weighed]:
        """The log density of each observation at draws from q, and the draws' log densities."""
        ...

    def groups(self, draws: int, seed: int) -> dict[str, Group]:
        """The groups of an ArviZ object that follow from draws, data and the model."""
        ...

    def parameters(self) -> dict[str, Tensor]:
        """Learned parameters of the model, constrained, by name."""
        ...


class GuideApproximation:
    """A guide of this package.

    Args:
        name: Its registry name.
        guide: It, trained.
        params: Unconstrained learned parameters of the model.
    """

    def __init__(self, name: str, guide: Guide, params: Mapping[str, Tensor]) -> None:
        self.name = name
        self.guide = guide
        self.point = guide.point
        self.density: Density = guide.density
        self.dtype = guide.density.dtype
        self.params = {k: self.density.cast(v.detach()).clone() for k, v in params.items()}
        _on_their_own(guide)
        self._width = width_of(self.density)
        self.cost = self._width
        if self.density.streamed is not None and self.density.model.stream is not None:
            self.cost = self.density.streamed.rows * self.density.model.stream.numbers

    def draw(self, draws: int, seed: int) -> dict[str, Tensor]:
        """See `Approximation.draw`."""
        return self.constrained(self.unconstrained(draws, seed), seed)

    @torch.no_grad()
    def unconstrained(self, draws: int, seed: int) -> dict[str, Tensor]:
        """Unconstrained draws by site, `[S, ...]`."""
        with RandomStream(seed, "draws"), isolated(self.dtype, self.density.device):
            return _joined([self.guide.draw(size).z for size in self._sizes(draws)])

    def weigh(self, draws: int, seed: int) -> Weighed:
        """See `Approximation.weigh`."""
        return self._weighed(draws, seed)[1]

    def draw_and_weigh(self, draws: int, seed: int) -> tuple[dict[str, Tensor], Weighed]:
        """See `Approximation.draw_and_weigh`."""
        z, weighed = self._weighed(draws, seed)
        return self.constrained(z, seed), weighed

    @torch.no_grad()
    def _weighed(self, draws: int, seed: int) -> tuple[dict[str, Tensor], Weighed]:
        """Unconstrained draws by site, as `unconstrained` gives them, and their log densities."""
        if self.density.streamed is not None:
            return self._weighed_on_stream(draws, seed)
        parts, log_p, log_q = [], [], []
        density = self.density.strict()
        with RandomStream(seed, "draws"), isolated(self.dtype, self.density.device):
            for size in self._sizes(draws):
                draw = self.guide.draw(size)
                terms = density.terms(draw.z, self.params, jacobian=not self.guide.point)
                parts.append(draw.z)
                log_p.append(terms.total())
                log_q.append(draw.shared + sum(rows.sum(-1) for rows in draw.local.values()))
        return _joined(parts), Weighed(_told(torch.cat(log_p)), _told(torch.cat(log_q)))

    def _weighed_on_stream(self, draws: int, seed: int) -> tuple[dict[str, Tensor], Weighed]:
        """The same, in one pass over all batches for all draws."""
        with RandomStream(seed, "draws"), isolated(self.dtype, self.density.device):
            draw = joined_draws([self.guide.draw(size) for size in self._sizes(draws)])
            log_p, log_q = weigh_all(self.guide, draw, self.params, self.density.batches())
        return draw.z, Weighed(_told(log_p), _told(log_q))

    def outside(self, draws: int, seed: int) -> dict[str, float]:
        """See `Approximation.outside`."""
        if self.density.streamed is not None:
            return {}  # no batch of the data speaks for all
        z = self.unconstrained(draws, seed)
        with RandomStream(seed, "draws"):
            return shares_outside(self.density, z, self.params)

    def constrained(self, z: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
        """Latent, discrete and deterministic sites at unconstrained values `[S, ...]`."""
        # Discrete sites are drawn given z, as `groups` draws them.
        with RandomStream(seed, GIVEN_DRAWS):
            return in_chunks(lambda part: self.density.constrain(part, self.params), z, self._width)

    def predict(
        self, model: Model, draws: int, seed: int, *, corrected: bool = False
    ) -> dict[str, Tensor]:
        """See `Approximation.predict`."""
        made = sum(value.numel() for value in self.density.observed.values())
        require_memory(draws * made, "ask for fewer draws=")
        if corrected:
            pool, weighed = self._weighed(_pool(draws), seed)
            chosen = torch.as_tensor(_chosen(weighed, draws, seed), device=self.density.device)
            z = {name: value[chosen] for name, value in pool.items()}
        else:
            z = self.unconstrained(draws, seed)
        with RandomStream(seed, GIVEN_DRAWS):
            values = in_chunks(
                lambda part: self.density.simulate(part, model, self.params), z, self._width
            )
        latent = {site.name for site in (*self.density.latents, *self.density.discrete)}
        return {name: value for name, value in values.items() if name not in latent}

    def log_likelihood(self, draws: int, seed: int) -> tuple[Group, Weighed]:
        """See `Approximation.log_likelihood`."""
        z, weighed = self._weighed(draws, seed)
        found = log_likelihood(self.density, z, params=self.params, seed=seed)
        return found, weighed

    @torch.no_grad()
    def row_terms(self, draws: int, seed: int, plate: str) -> tuple[Tensor, Weighed]:
        """All that the log joint has for each row of a plate, `[S, N]`, and the draws' log densities."""
        z, weighed = self._weighed(draws, seed)

        def rows(part: dict[str, Tensor]) -> dict[str, Tensor]:
            return {plate: self.density.terms(part, self.params).local[plate]}

        return _told(in_chunks(rows, z, self._width)[plate]), weighed

    def groups(self, draws: int, seed: int) -> dict[str, Group]:
        """See `Approximation.groups`."""
        z = self.unconstrained(draws, seed)
        return model_groups(
            self.density, z, params=self.params, seed=seed, prior_draws=min(_PRIOR_DRAWS, draws)
        )

    def parameters(self) -> dict[str, Tensor]:
        """See `Approximation.parameters`."""
        known = self.density.structure.parameters
        return {
            name: torch.distributions.transform_to(known[name].constraint)(value)
            for name, value in self.params.items()
        }

    def moved_to(self, model: Model) -> GuideApproximation:
        """The same trained guide on other data of the same model."""
        own = self.density
        density = Density(
            model,
            dtype=own.dtype,
            device=own.device,
            drawn=own.drawn,
            init=own.initial(own.structure.plates),
        )
        return GuideApproximation(self.name, self.guide.moved_to(density), self.params)

    def _sizes(self, draws: int) -> list[int]:
        require_memory(draws * self.density.dim, "ask for fewer draws=")
        chunk = max(1, _CHUNK_NUMBERS // max(self._width, 1))
        return [min(chunk, draws - i) for i in range(0, draws, chunk)]


def _joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _on_their_own(guide: Guide) -> None:
    """Give parameters that are views of one vector, as training has them, memory of their own.

    Sums round by how memory is aligned: a guide that is read from a file would else differ in the last
    bit from the one that was saved.
    """
    for parameter in guide.parameters():
        if parameter.untyped_storage().nbytes() > parameter.numel() * parameter.element_size():
            parameter.data = parameter.data.clone()


class _DrawObserved(Messenger):
    """Draws what was observed. Unlike `poutine.uncondition` it leaves alone what only looks observed.

    A deterministic or factor site is an observed one to Pyro.
    """

    def _pyro_sample(self, msg: Any) -> None:
        if not isinstance(msg["fn"], _Subsample) and kind_of(msg) == "observed":
            msg["is_observed"] = False
            msg["value"] = None


class TraceApproximation:
    """Any Pyro guide, run by Pyro's own handlers.

    Args:
        model: The model.
        guide: A Pyro guide callable, trained.
        state: The private parameter store it was trained in.
        dtype: Default dtype of the fit.
        density: The model's Density, where it has one: names the dims of what is exported.
        device: Where the guide and the model's arguments are.
    """

    def __init__(
        self,
        model: Model,
        guide: Callable[..., Any],
        state: dict[str, Any],
        dtype: torch.dtype,
        density: Density | None,
        device: torch.device,
    ) -> None:
        self.model = model
        self.device = device
        self.guide = guide
        self.state = state
        self.dtype = dtype
        self.density = density
        self.name = getattr(guide, "__name__", type(guide).__name__)
        self.point = False
        # A trace takes milliseconds whatever the model's size, so draws are counted as dear.
        self.cost = 200_000

    def draw(self, draws: int, seed: int) -> dict[str, Tensor]:
        """See `Approximation.draw`."""
        return _values(self._traces(draws, seed))

    def weigh(self, draws: int, seed: int) -> Weighed:
        """See `Approximation.weigh`."""
        return self._log_probs(self._traces(draws, seed))

    def draw_and_weigh(self, draws: int, seed: int) -> tuple[dict[str, Tensor], Weighed]:
        """See `Approximation.draw_and_weigh`."""
        pairs = self._traces(draws, seed)
        return _values(pairs), self._log_probs(pairs)

    def outside(self, draws: int, seed: int) -> dict[str, float]:
        """See `Approximation.outside`."""
        exempt = self._exempt()
        shares: dict[str, float] = {}
        for model, _ in self._traces(draws, seed):
            for site, what in left(model, exempt):
                words = f"site {site!r}: {what}"
                shares[words] = shares.get(words, 0.0) + 1.0 / draws
        return shares

    def predict(
        self, model: Model, draws: int, seed: int, *, corrected: bool = False
    ) -> dict[str, Tensor]:
        """See `Approximation.predict`."""
        values: dict[str, list[Tensor]] = {}
        model = placed(model, self.device)
        chosen = self._resampled(draws, seed) if corrected else None
        with self._running(seed):
            for i in range(draws):
                guide = self._guide_trace() if chosen is None else chosen[i]
                with _DrawObserved():
                    replayed = poutine.replay(model.fn, trace=guide)
                    trace = poutine.trace(replayed).get_trace(*model.args, **model.kwargs)
                for name, node in sample_sites(trace).items():
                    if name not in guide.nodes and kind_of(node) != "factor":
                        values.setdefault(name, []).append(node["value"].detach())
        return {name: torch.stack(parts) for name, parts in values.items()}

    def log_likelihood(self, draws: int, seed: int) -> tuple[Group, Weighed]:
        """See `Approximation.log_likelihood`.

        Raises:
            ModelError: If the model has no Density, which knows the plates.
        """
        if self.density is None:
            raise ModelError(
                "the plates of this model are not known, since it has no batched density: "
                "vi.check(model) says what stands in the way"
            )
        pairs = self._traces(draws, seed)
        for model, _ in pairs:
            model.compute_log_prob()
        weighed = self._log_probs(pairs)
        values: dict[str, list[Tensor]] = {}
        for site in self.density.structure.likelihood:
            for model, _ in pairs:
                visit: Any = model.nodes[site.name]
                values.setdefault(site.name, []).append(visit["log_prob"].detach())
        stacked = {name: torch.stack(parts) for name, parts in values.items()}
        return by_observation(self.density, stacked, 1), weighed

    def groups(self, draws: int, seed: int) -> dict[str, Group]:
        """See `Approximation.groups`."""
        values = self.draw(draws, seed)
        if self.density is None:
            arrays = {name: value.cpu().numpy()[None] for name, value in values.items()}
            return {"posterior": Group(arrays)}
        groups = {"posterior": sampled(self.density, values, 1)}
        groups |= prior_groups(self.density, min(_PRIOR_DRAWS, draws), seed=seed)
        return groups | data_groups(self.density)

    def parameters(self) -> dict[str, Tensor]:
        """See `Approximation.parameters`."""
        return {}

    def _guide_trace(self) -> poutine.Trace:
        return poutine.trace(self.guide).get_trace(*self.model.args, **self.model.kwargs)

    def _resampled(self, draws: int, seed: int) -> list[poutine.Trace]:
        """Traces of the guide chosen by their importance weights."""
        pairs = self._traces(_pool(draws), seed)
        return [pairs[i][1] for i in _chosen(self._log_probs(pairs), draws, seed)]

    def _log_probs(self, pairs: Sequence[Pair]) -> Weighed:
        """The log densities of traces; the model's is zero where a distribution is not defined."""
        exempt = self._exempt()
        log_p = [
            -torch.inf if left(model, exempt) else torch.as_tensor(model.log_prob_sum()).item()
            for model, _ in pairs
        ]
        log_q = torch.stack([torch.as_tensor(guide.log_prob_sum()) for _, guide in pairs])
        return Weighed(torch.tensor(log_p, dtype=torch.float64), _told(log_q))

    def _exempt(self) -> frozenset[str] | None:
        """Sites made with ``validate_args=False``; None where no run under validation tells them."""
        if self.density is not None:
            return self.density.exempt
        try:
            with self._running(0), pyro.validation_enabled(True):
                replayed = poutine.replay(self.model.fn, trace=self._guide_trace())
                trace = poutine.trace(replayed).get_trace(*self.model.args, **self.model.kwargs)
        except Exception:  # noqa: BLE001  its own draws may be what validation refuses
            return None
        return frozenset(n for n, node in sample_sites(trace).items() if is_unchecked(node["fn"]))

    def _traces(self, draws: int, seed: int) -> list[Pair]:
        args, kwargs = self.model.args, self.model.kwargs
        fn = self.model.fn if self.density is None else self.density.each_run_anew(self.model.fn)
        pairs = []
        with self._running(seed):
            for _ in range(draws):
                guide = self._guide_trace()
                replayed = poutine.replay(fn, trace=guide)
                pairs.append((poutine.trace(replayed).get_trace(*args, **kwargs), guide))
        return pairs

    @contextlib.contextmanager
    def _running(self, seed: int) -> Iterator[None]:
        with (
            RandomStream(seed, "draws"),
            isolated(self.dtype, self.device),
            contextlib.nullcontext() if self.density is None else self.density.casting(),
            private_params(self.state),
            torch.no_grad(),
        ):
            yield


def left(trace: poutine.Trace, exempt: frozenset[str] | None) -> list[Key]:
    """What leaves its constraint in one trace of a model: nothing where nobody knows what may.

    Args:
        trace: It.
        exempt: Sites made with ``validate_args=False``.
    """
    if exempt is None:
        return []
    visits = {
        name: Visit(name, kind_of(node), node["fn"], node["value"], (), 1.0, node["mask"])
        for name, node in sample_sites(trace).items()
    }
    return [key for key, found in flags(visits, exempt).items() if bool(found)]


def _values(pairs: Sequence[Pair]) -> dict[str, Tensor]:
    values: dict[str, list[Tensor]] = {}
    for model, _ in pairs:
        for name, node in sample_sites(model).items():
            if kind_of(node) in ("latent", "discrete", "deterministic"):
                values.setdefault(name, []).append(node["value"].detach())
    return {name: torch.stack(parts) for name, parts in values.items()}


def _pool(draws: int) -> int:
    """From how many draws of q so many are chosen by their weights."""
    return max(4000, 10 * draws)


def _chosen(weighed: Weighed, draws: int, seed: int) -> np.ndarray:
    """Indices `[draws]` of draws chosen by Pareto-smoothed importance resampling.

    One that model or guide refuses has weight zero.
    """
    log_w = (weighed.log_p - weighed.log_q).numpy()
    usable = np.where(np.isnan(log_w) | np.isposinf(log_w), -np.inf, log_w)
    return resample(
        psis(usable).log_weights, draws, np.random.default_rng(seed_of(seed, "resampling"))
    )


def _told(log_density: Tensor) -> Tensor:
    """A log density as it is handed out: detached, float64, on the CPU."""
    return log_density.detach().double().cpu()
