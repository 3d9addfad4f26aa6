"""A Pyro guide of the user's, weighed by Pyro's own traces of guide and model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.infer import infer_discrete
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyro_vi_kit.core.errors import ModelError, in_words
from pyro_vi_kit.core.export import Group
from pyro_vi_kit.core.runtime import RandomStream, isolated, private_params, validation
from pyro_vi_kit.core.stopping import model_errors
from pyro_vi_kit.guides.user_guides import GuideSites, Marked
from pyro_vi_kit.model.groups import by_observation, data_groups, prior_groups, sampled
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.model.log_density.handlers import subsample_indices
from pyro_vi_kit.model.log_density.problems import made_unchecked
from pyro_vi_kit.model.log_density.runner import placed
from pyro_vi_kit.model.log_density.visits import Key, Visit, flags, kind_of, sample_sites
from pyro_vi_kit.model.model import Model
from pyro_vi_kit.posterior.approximation.base import (
    PRIOR_DRAWS,
    Weighed,
    chosen_of,
    on_cpu,
    pool_of,
)

# The model's trace and the guide's.
Pair = tuple[poutine.Trace, poutine.Trace]


@dataclass(frozen=True, eq=False)
class TrainedGuide:
    """A Pyro guide and what it runs in.

    Attributes:
        model: The model.
        guide: The callable, trained.
        sites: What it does about the model's latents.
        state: The private parameter store it was trained in.
        params: Unconstrained learned parameters of the model, by name, where it has a Density.
        dtype: Default dtype of the fit.
        density: The model's Density, where it has one.
        device: Where the guide and the model's arguments are.
    """

    model: Model
    guide: Callable[..., Any]
    sites: GuideSites
    state: dict[str, Any]
    params: Mapping[str, Tensor]
    dtype: torch.dtype
    density: Density | None
    device: torch.device

    @property
    def name(self) -> str:
        """What the guide is called."""
        return getattr(self.guide, "__name__", type(self.guide).__name__)

    @property
    def point(self) -> bool:
        """Whether it holds a latent at one value, or has none: then q has no density.

        Where all latents are discrete and summed out, what is learned are parameters alone.
        """
        return bool(self.sites.points) or self.sites.latents == len(self.sites.summed)

    def arguments(self) -> tuple[Sequence[Any], Mapping[str, Any]]:
        """Positional and keyword arguments of guide and model."""
        if self.density is not None:
            return self.density.arguments()
        return self.model.args, self.model.kwargs

    @contextlib.contextmanager
    def running(self, seed: int, purpose: str = "draws") -> Iterator[None]:
        """Pyro's global state as in training, all rows of every plate, random numbers of their own."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(RandomStream(seed, purpose))
            stack.enter_context(isolated(self.dtype, self.device))
            stack.enter_context(private_params(self.state))
            stack.enter_context(torch.no_grad())
            # A minibatch has another log density at every draw; one that is at hand has not.
            at_hand = frozenset() if self.density is None else self.density.at_hand
            stack.enter_context(subsample_indices({}, at_hand=at_hand))
            if self.density is not None:
                stack.enter_context(self.density.casting())
                stack.enter_context(self.density.learned(self.params))
            yield

    def guide_trace(self) -> poutine.Trace:
        """One run of the guide; inside `running`."""
        args, kwargs = self.arguments()
        return poutine.trace(self.guide).get_trace(*args, **kwargs)

    def model_trace(self, guide: poutine.Trace, fn: Callable[..., Any]) -> poutine.Trace:
        """One run of a model function on what the guide drew; inside `running`."""
        args, kwargs = self.arguments()
        return poutine.trace(poutine.replay(fn, trace=guide)).get_trace(*args, **kwargs)

    def parameters(self) -> dict[str, Tensor]:
        """Learned parameters of the model, constrained, by name."""
        with self.running(0, "parameters"):
            met = self.model_trace(self.guide_trace(), self.model.fn)
        nodes: dict[str, Any] = dict(met.nodes)
        found = {n: node["value"] for n, node in nodes.items() if node["type"] == "param"}
        return {name: value.detach().clone() for name, value in found.items() if value is not None}


class TraceApproximation:
    """Any Pyro guide that has all latents of the model, or is a point estimate, run by Pyro's handlers.

    Args:
        trained: The guide, and what it was trained in.
    """

    def __init__(self, trained: TrainedGuide) -> None:
        self.trained = trained
        self.guide = trained.guide
        self.state = trained.state
        self.dtype = trained.dtype
        self.device = trained.device
        self.density = trained.density
        self.name = trained.name
        self.point = trained.point
        self.points = trained.sites.points
        self.given_up = [] if self.density is None else self.density.given_up
        # A trace takes milliseconds whatever the model's size, so draws are counted as dear.
        self.cost = 200_000

    @model_errors
    def draw(self, draws: int, seed: int) -> dict[str, Tensor]:
        """See `Approximation.draw`."""
        return self._values(self._traces(draws, seed, self._given_all()))

    @model_errors
    def weigh(self, draws: int, seed: int) -> Weighed:
        """See `Approximation.weigh`."""
        return self._log_probs(self._traces(draws, seed))

    @model_errors
    def draw_and_weigh(self, draws: int, seed: int) -> tuple[dict[str, Tensor], Weighed]:
        """See `Approximation.draw_and_weigh`."""
        pairs = self._traces(draws, seed)
        return self._values(pairs), self._log_probs(pairs)

    @model_errors
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
        values: list[dict[str, Tensor]] = []
        model = placed(model, self.device)
        chosen = self._resampled(draws, seed) if corrected else None
        with self.trained.running(seed):
            for i in range(draws):
                guide = self.trained.guide_trace() if chosen is None else chosen[i]
                with _DrawObserved():
                    replayed = poutine.replay(model.fn, trace=guide)
                    trace = poutine.trace(replayed).get_trace(*model.args, **model.kwargs)
                values.append(
                    {
                        name: node["value"]
                        for name, node in sample_sites(trace).items()
                        if name not in guide.nodes and kind_of(node) != "factor"
                    }
                )
        return self._stacked(values)

    @model_errors
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
        names = [site.name for site in self.density.structure.likelihood]
        nodes: list[Any] = [model.nodes for model, _ in pairs]
        values = self._stacked([{name: node[name]["log_prob"] for name in names} for node in nodes])
        return by_observation(self.density, values, 1), weighed

    @model_errors
    def groups(self, draws: int, seed: int) -> dict[str, Group]:
        """See `Approximation.groups`."""
        values = self.draw(draws, seed)
        if self.density is None:
            arrays = {name: value.cpu().numpy()[None] for name, value in values.items()}
            return {"posterior": Group(arrays)} if arrays else {}
        groups = {"posterior": sampled(self.density, values, 1)}
        groups |= prior_groups(self.density, min(PRIOR_DRAWS, draws), seed=seed)
        return groups | data_groups(self.density)

    def parameters(self) -> dict[str, Tensor]:
        """See `Approximation.parameters`."""
        return self.trained.parameters()

    def _given_all(self) -> Callable[..., Any] | None:
        """The model with the discrete latents that the guide lacks drawn given the data, if any are."""
        if not self.trained.sites.summed:
            return None
        marked = Marked(self.trained.sites.summed)(self.trained.model.fn)
        return infer_discrete(marked, first_available_dim=-1 - self.trained.sites.nesting)

    def _resampled(self, draws: int, seed: int) -> list[poutine.Trace]:
        """Traces of the guide chosen by their importance weights."""
        pairs = self._traces(pool_of(draws), seed)
        return [pairs[i][1] for i in chosen_of(self._log_probs(pairs), draws, seed)]

    def _log_probs(self, pairs: Sequence[Pair]) -> Weighed:
        """The log densities of traces; the model's is zero where a distribution is not defined."""
        exempt = self._exempt()
        log_p = [
            -torch.inf if left(model, exempt) else torch.as_tensor(model.log_prob_sum()).item()
            for model, _ in pairs
        ]
        log_q = torch.stack([torch.as_tensor(guide.log_prob_sum()) for _, guide in pairs])
        return Weighed(torch.tensor(log_p, dtype=torch.float64), on_cpu(log_q))

    def _exempt(self) -> frozenset[str] | None:
        """Sites made with ``validate_args=False``; None where no run under validation tells them."""
        if self.density is not None:
            return self.density.exempt
        try:
            with self.trained.running(0, "first run"), validation(True):
                trace = self.trained.model_trace(self.trained.guide_trace(), self.trained.model.fn)
        except Exception as error:  # noqa: BLE001  its own draws may be what validation refuses
            self._give_up(
                f"Draws are not checked against the domains of distributions: {in_words(error)}"
            )
            return None
        return frozenset(n for n, node in sample_sites(trace).items() if made_unchecked(node["fn"]))

    def _values(self, pairs: Sequence[Pair]) -> dict[str, Tensor]:
        kinds = ("latent", "discrete", "deterministic")
        return self._stacked(
            [
                {
                    n: node["value"]
                    for n, node in sample_sites(model).items()
                    if kind_of(node) in kinds
                }
                for model, _ in pairs
            ]
        )

    def _stacked(self, draws: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """`[S, ...]` of each site that all draws have in one shape; the others are told in a note.

        A guide may branch: a site that some draws lack has no value there.
        """
        found: dict[str, Tensor] = {}
        for name in dict.fromkeys(name for draw in draws for name in draw):
            values = [draw[name] for draw in draws if name in draw]
            if len(values) == len(draws) and len({value.shape for value in values}) == 1:
                found[name] = torch.stack(values).detach()
                continue
            self._give_up(
                f"Site {name!r} is not in every draw, or not in one shape: it is left out of draws "
                "and exports, and weighed in the ELBO."
            )
        return found

    def _give_up(self, line: str) -> None:
        """As `Density.give_up`; a model that Pyro alone can run has no Density."""
        if line not in self.given_up:
            self.given_up.append(line)

    def _traces(self, draws: int, seed: int, fn: Callable[..., Any] | None = None) -> list[Pair]:
        if fn is None:
            fn = self.trained.model.fn
            fn = fn if self.density is None else self.density.each_run_anew(fn)
        pairs = []
        with self.trained.running(seed):
            for _ in range(draws):
                guide = self.trained.guide_trace()
                pairs.append((self.trained.model_trace(guide, fn), guide))
        return pairs


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


class _DrawObserved(Messenger):
    """Draws what was observed. Unlike `poutine.uncondition` it leaves alone what only looks observed.

    A deterministic or factor site is an observed one to Pyro.
    """

    def _pyro_sample(self, msg: Any) -> None:
        if not isinstance(msg["fn"], _Subsample) and kind_of(msg) == "observed":
            msg["is_observed"] = False
            msg["value"] = None
