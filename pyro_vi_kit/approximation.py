"""A trained guide as something to draw from and to weigh: over a Density, or by Pyro's traces."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from pyro import poutine
from torch import Tensor

from pyro_vi_kit.density import Density
from pyro_vi_kit.density.handlers import kind_of
from pyro_vi_kit.groups import in_chunks, width_of
from pyro_vi_kit.guides import Guide
from pyro_vi_kit.model import Model
from pyro_vi_kit.runtime import RandomStream, isolated, private_params

_CHUNK_NUMBERS = 4_000_000


class Draws(NamedTuple):
    """Draws from q.

    Attributes:
        values: Latent and deterministic values by site, `[S, *batch, *event]`.
        unconstrained: Unconstrained latent values by site; empty where the guide has none.
    """

    values: dict[str, Tensor]
    unconstrained: dict[str, Tensor]


class Weighed(NamedTuple):
    """log p(x, z) and log q(z) at draws from q, each `[S]`, float64, in nats."""

    log_p: Tensor
    log_q: Tensor


class Approximation(Protocol):
    """A trained guide."""

    @property
    def name(self) -> str:
        """The guide's name."""
        ...

    @property
    def cost(self) -> int:
        """Numbers that one draw makes in the model, roughly."""
        ...

    def draw(self, draws: int, seed: int) -> Draws:
        """Draws from q with every latent and deterministic site."""
        ...

    def weigh(self, draws: int, seed: int) -> Weighed:
        """The same draws as `draw` with that seed, with their log densities."""
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
        self.density: Density = guide.density
        self.params = {key: value.detach() for key, value in params.items()}
        self.cost = width_of(self.density)

    @torch.no_grad()
    def draw(self, draws: int, seed: int) -> Draws:
        z = self.unconstrained(draws, seed)
        values = in_chunks(lambda part: self.density.constrain(part, self._trainable()), z, self.cost)
        return Draws(values, z)

    @torch.no_grad()
    def unconstrained(self, draws: int, seed: int) -> dict[str, Tensor]:
        """Unconstrained draws by site, `[S, ...]`."""
        with RandomStream(seed):
            parts = [self.guide.draw(size).z for size in self._sizes(draws)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    @torch.no_grad()
    def weigh(self, draws: int, seed: int) -> Weighed:
        params = self._trainable()
        log_p, log_q = [], []
        with RandomStream(seed):
            for size in self._sizes(draws):
                draw = self.guide.draw(size)
                q = draw.shared + sum(rows.sum(-1) for rows in draw.local.values())
                terms = self.density.terms(draw.z, params, jacobian=not self.guide.point)
                log_p.append(terms.total())
                log_q.append(q)
        return Weighed(torch.cat(log_p).double(), torch.cat(log_q).double())

    def _sizes(self, draws: int) -> list[int]:
        chunk = max(1, _CHUNK_NUMBERS // max(self.cost, 1))
        return [min(chunk, draws - i) for i in range(0, draws, chunk)]

    def _trainable(self) -> dict[str, Tensor]:
        # pyro.module warns about parameters that ask for no gradient.
        return {
            name: value.detach().requires_grad_(value.is_floating_point())
            for name, value in self.params.items()
        }


class TraceApproximation:
    """Any Pyro guide, run by Pyro's own handlers.

    Args:
        model: The model.
        guide: A Pyro guide callable, trained.
        state: The private parameter store it was trained in.
        dtype: Default dtype of the fit.
    """

    def __init__(
        self, model: Model, guide: Callable[..., Any], state: dict[str, Any], dtype: torch.dtype
    ) -> None:
        self.model = model
        self.guide = guide
        self.state = state
        self.dtype = dtype
        self.name = getattr(guide, "__name__", type(guide).__name__)
        self.cost = 10_000

    def draw(self, draws: int, seed: int) -> Draws:
        pairs = self._traces(draws, seed)
        values: dict[str, list[Tensor]] = {}
        for model, _ in pairs:
            for name, node in model.nodes.items():
                if _is_sample(node) and kind_of(node) in ("latent", "discrete", "deterministic"):
                    values.setdefault(name, []).append(node["value"].detach())
        return Draws({name: torch.stack(parts) for name, parts in values.items()}, {})

    def weigh(self, draws: int, seed: int) -> Weighed:
        pairs = self._traces(draws, seed)
        log_p = torch.stack([torch.as_tensor(model.log_prob_sum()) for model, _ in pairs])
        log_q = torch.stack([torch.as_tensor(guide.log_prob_sum()) for _, guide in pairs])
        return Weighed(log_p.detach().double(), log_q.detach().double())

    def predict(self, model: Model, draws: int, seed: int) -> dict[str, Tensor]:
        """Observed sites drawn anew, `[S, ...]` by site."""
        values: dict[str, list[Tensor]] = {}
        with self._running(seed):
            for _ in range(draws):
                guide = poutine.trace(self.guide).get_trace(*self.model.args, **self.model.kwargs)
                replayed = poutine.replay(poutine.uncondition(model.fn), trace=guide)
                trace = poutine.trace(replayed).get_trace(*model.args, **model.kwargs)
                for name, node in trace.nodes.items():
                    # `uncondition` un-observes deterministic and factor sites as well.
                    infer = node["infer"] if _is_sample(node) else {}
                    if infer.get("was_observed") and not (
                        infer.get("_deterministic") or infer.get("is_auxiliary")
                    ):
                        values.setdefault(name, []).append(node["value"].detach())
        return {name: torch.stack(parts) for name, parts in values.items()}

    def _traces(self, draws: int, seed: int) -> list[tuple[poutine.Trace, poutine.Trace]]:
        args, kwargs = self.model.args, self.model.kwargs
        pairs = []
        with self._running(seed):
            for _ in range(draws):
                guide = poutine.trace(self.guide).get_trace(*args, **kwargs)
                replayed = poutine.replay(self.model.fn, trace=guide)
                pairs.append((poutine.trace(replayed).get_trace(*args, **kwargs), guide))
        return pairs

    @contextlib.contextmanager
    def _running(self, seed: int) -> Iterator[None]:
        with (
            RandomStream(seed),
            isolated(self.dtype),
            private_params(self.state),
            torch.no_grad(),
        ):
            yield


def _is_sample(node: Mapping[str, Any]) -> bool:
    return node["type"] == "sample" and type(node["fn"]).__name__ != "_Subsample"
