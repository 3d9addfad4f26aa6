"""A Pyro guide of the user's with what it was trained in: parameters, precision, arguments."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_vi_kit.core.runtime import RandomStream, isolated, private_params
from pyro_vi_kit.guides.user_guides import GuideSites
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.model.log_density.handlers import subsample_indices
from pyro_vi_kit.model.model import Model


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
