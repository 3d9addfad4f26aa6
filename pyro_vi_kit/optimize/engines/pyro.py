"""Steps of a literal `pyro.infer.SVI` with `Trace_ELBO` or `RenyiELBO` on the user's own model.

Runs whatever Pyro runs, and is the oracle that the other engines are tested against.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from math import isfinite
from typing import Any

import torch
from pyro import poutine
from pyro.infer import SVI, TraceEnum_ELBO
from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim import Adam

from pyro_vi_kit.core.device import device_of
from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.core.runtime import RandomStream, default_dtype, isolated, private_params, seed_of
from pyro_vi_kit.guides import Guide
from pyro_vi_kit.guides.user_guides import GuideSites, Marked, look_over, named
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.model.log_density.handlers import subsample_indices
from pyro_vi_kit.model.log_density.visits import sample_sites
from pyro_vi_kit.model.model import Model
from pyro_vi_kit.objectives import Elbo, Objective
from pyro_vi_kit.optimize.engines.base import Average, Window, all_finite, torch_optimizer
from pyro_vi_kit.optimize.engines.batches import BatchSource


class _GuardedOptim(PyroOptim):
    """A Pyro optimiser that leaves everything as it is when the loss or a gradient is not finite."""

    def __init__(self, constructor: Callable[..., Any], options: dict[str, Any]) -> None:
        super().__init__(constructor, options)
        self.skipped = 0
        self.rate: float | None = None
        self.loss = 0.0

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        params = list(params)
        gradients = [p.grad for p in params if p.grad is not None]
        if not isfinite(self.loss) or (gradients and not all_finite(gradients)):
            self.skipped += 1
            return
        if self.rate is not None:
            self.pt_optim_args = {"lr": self.rate}
            for optimizer in self.optim_objs.values():
                for group in optimizer.param_groups:
                    group["lr"] = self.rate
        super().__call__(params, *args, **kwargs)


def own_params(density: Density, state: dict[str, Any]) -> dict[str, Tensor]:
    """The model's learned parameters of a fit: those of its store, or copies of the user's."""
    return {
        name: state["params"].get(
            name, torch.nn.Parameter(value.detach().clone(), value.requires_grad)
        )
        for name, value in density.params.items()
    }


class PyroEngine:
    """Stock SVI in a parameter store of its own.

    Args:
        model: The user's model.
        guide: A guide of this package, or any Pyro guide callable. A guide object with parameters of
            its own is trained in place, as in stock Pyro.
        objective: The bound; its stock loss is used.
        seed: Of the noise.
        density: The model's Density where there is one: gives precision, and copies of the model's
            learned parameters, so that the user's modules are not trained in place.
        batches: Minibatches of the data plate; the full data when None.
        optimizer: Makes a torch optimiser from parameters; Adam when None.
        state: The parameter store to start from, as `ParamStoreDict.get_state` gives it.
        device: Where literals of model and guide land, if there is no Density; where the model's data
            are when None.

    Raises:
        OptionError: If `RenyiELBO` would give a wrong bound or gradient for this combination, or the
            model has discrete sites that a guide of this package does not hold.
    """

    def __init__(
        self,
        model: Model,
        guide: Callable[..., Any],
        objective: Objective,
        *,
        seed: int,
        density: Density | None = None,
        batches: BatchSource | None = None,
        optimizer: Callable[..., Any] | None = None,
        state: dict[str, Any] | None = None,
        device: torch.device | None = None,
    ) -> None:
        _require_no_discrete_sites(guide)
        self.model = model
        self.guide = guide
        self.objective = objective
        self.batches = batches
        self._density = density
        self._stream = RandomStream(seed, "steps")
        self._evaluation_seed = seed_of(seed, "looks")
        self._state: dict[str, Any] = state or {"params": {}, "constraints": {}}
        if density is None:
            self._dtype, self._fn, self._module_params = default_dtype(), model.fn, {}
            self.device = device or device_of((model.args, dict(model.kwargs)))
        else:
            self._dtype, self._fn = density.dtype, density.each_run_anew(model.fn)
            self._module_params = own_params(density, self._state)
            self.device = density.device
        self._own_rate = optimizer is not None
        self._optim = _GuardedOptim(Adam if optimizer is None else torch_optimizer(optimizer), {})
        self._loss, fn = objective.stock_loss(), self._fn
        self.sites = None if isinstance(guide, Guide) else self._looked_over(seed)
        if self.sites is not None and (self.sites.summed or self.sites.enumerated):
            self._loss, fn = self._enumerating(self.sites)
        self._svi: Any = SVI(
            fn, guide, self._optim, self._loss.loss, loss_and_grads=self._loss_and_grads
        )
        if objective.multi_sample:
            with self._running(RandomStream(seed, "first run")), self._casting():
                _require_valid_multi_sample(self._traces(), objective, batches)

    @property
    def name(self) -> str:
        """What the engine is called."""
        return "pyro"

    @property
    def particles(self) -> int:
        """K."""
        return self.objective.particles

    @property
    def skipped(self) -> int:
        """Steps whose gradient was not finite."""
        return self._optim.skipped

    @property
    def state(self) -> dict[str, Any]:
        """The private parameter store, as `ParamStoreDict.get_state` gives it."""
        return self._state

    @property
    def params(self) -> dict[str, Tensor]:
        """Unconstrained learned parameters of the model."""
        stored = self._state["params"]
        return {
            name: stored.get(name, value).detach() for name, value in self._module_params.items()
        }

    def parameters(self) -> dict[str, Tensor]:
        """What the private store holds, unconstrained, by Pyro's names."""
        return dict(self._state["params"])

    def run(self, steps: int, rate: float) -> Window:
        """So many calls of `SVI.step`; minus their losses, nats."""
        self._optim.rate = None if self._own_rate else rate
        args, kwargs = self._arguments()
        bounds, average = [], Average()
        for _ in range(steps):
            before = self.skipped
            with self._running(self._stream), self._rows():
                loss = self._svi.step(*args, **kwargs)
            bounds.append(float("nan") if self.skipped > before else -float(loss))
            average.add(self.parameters())
        return Window(torch.tensor(bounds, dtype=torch.float64), average.values)

    def evaluate(self, replicates: int) -> Tensor:
        """Minus `SVI.evaluate_loss`, `[replicates]`, nats, on the same noise at every call."""
        args, kwargs = self._arguments()
        rows = subsample_indices({}) if self.batches else contextlib.nullcontext()
        with self._running(RandomStream(self._evaluation_seed)), rows, self._casting():
            losses = [float(self._svi.evaluate_loss(*args, **kwargs)) for _ in range(replicates)]
        return -torch.tensor(losses, dtype=torch.float64)

    def _looked_over(self, seed: int) -> GuideSites:
        """What a guide of the user's does about the model's latents."""
        args, kwargs = self._arguments()
        name = getattr(self.guide, "__name__", type(self.guide).__name__)
        with self._running(RandomStream(seed, "first run")):
            return look_over(self.model.fn, self.guide, args, kwargs, name)

    def _enumerating(self, sites: GuideSites) -> tuple[TraceEnum_ELBO, Callable[..., Any]]:
        """Pyro's loss that sums discrete sites out, and the model with them marked.

        Raises:
            OptionError: If the objective is another than the ELBO.
        """
        if not isinstance(self.objective, Elbo):
            which = f"lacks the discrete latent(s) {named(sites.summed)}"
            if not sites.summed:
                which = f"marks its site(s) {named(sites.enumerated)} to be enumerated"
            raise OptionError(
                f"objective {self.objective.name!r} with a guide that {which}: Pyro sums discrete sites "
                "out in TraceEnum_ELBO alone. Use objective='elbo', or a guide of this package"
            )
        loss = TraceEnum_ELBO(
            num_particles=self.objective.particles, max_plate_nesting=sites.nesting
        )
        return loss, Marked(sites.summed)(self.model.fn)

    def _rows(self) -> contextlib.AbstractContextManager[None]:
        """Plates see the rows of the next minibatch."""
        if self.batches is None:
            return contextlib.nullcontext()
        return subsample_indices(self.batches.next().index)

    def _loss_and_grads(self, *args: Any, **kwargs: Any) -> float:
        # Not around the optimiser: what that writes into is its own.
        with self._casting():
            self._optim.loss = float(self._loss.loss_and_grads(*args, **kwargs))
        return self._optim.loss

    def _arguments(self) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        if self._density is not None:
            return self._density.arguments()
        return self.model.args, self.model.kwargs

    def _casting(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._density is None else self._density.casting()

    @contextlib.contextmanager
    def _running(self, stream: RandomStream) -> Iterator[None]:
        """Pyro's global state set up for this fit alone."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(stream)
            stack.enter_context(isolated(self._dtype, self.device))
            stack.enter_context(private_params(self._state))
            if self._density is not None:
                stack.enter_context(self._density.learned(self._module_params))
            # Such steps are skipped, counted and told of in the fit's status.
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "Encountered NaN")
            yield

    def _traces(self) -> tuple[poutine.Trace, poutine.Trace]:
        args, kwargs = self._arguments()
        guide = poutine.trace(self.guide).get_trace(*args, **kwargs)
        model = poutine.trace(poutine.replay(self._fn, trace=guide)).get_trace(*args, **kwargs)
        return model, guide


def _require_no_discrete_sites(guide: Callable[..., Any]) -> None:
    if isinstance(guide, Guide) and guide.density.discrete:
        raise OptionError(
            "engine='pyro' runs Trace_ELBO, which would draw the discrete site(s) "
            f"{', '.join(site.name for site in guide.density.discrete)} from their prior; leave "
            "engine= out to sum them out"
        )


def _require_valid_multi_sample(
    traces: tuple[poutine.Trace, poutine.Trace], objective: Objective, batches: BatchSource | None
) -> None:
    """Refuse what `RenyiELBO` gets wrong.

    It multiplies N / B into the log weights before the logsumexp, so a subsampled bound can exceed the
    evidence; its score-function gradient is biased at every K and zero at order 0; and it is a bound
    per datum only if one plate encloses every sample site of the model and of the guide.
    """
    model, guide = (list(sample_sites(trace).values()) for trace in traces)
    _require_all_rows(model, objective, batches)
    for node in guide:
        if not node["is_observed"] and not getattr(node["fn"], "has_rsample", False):
            raise OptionError(
                f"objective {objective.name!r} with the guide's site {node['name']!r}, which cannot "
                "be reparameterised: RenyiELBO's gradient is wrong there. Use objective='elbo', whose "
                "score-function gradient is unbiased, or a reparameterisable distribution."
            )
    _require_one_kind_of_bound(model, guide, objective)


def _require_all_rows(model: list[Any], objective: Objective, batches: BatchSource | None) -> None:
    frames = [f for node in model for f in node["cond_indep_stack"]]
    subsampled = {f.name for f in frames if f.full_size is not None and f.size != f.full_size}
    if batches is not None:
        subsampled = set(batches.plates[:1])
    if subsampled:
        raise OptionError(
            f"objective {objective.name!r} on minibatches of plate {min(subsampled)!r}: RenyiELBO "
            "scales inside the logsumexp and its bound exceeds the evidence. Use engine='eager', which "
            "scales afterwards, or objective='elbo', or the full data."
        )


def _require_one_kind_of_bound(model: list[Any], guide: list[Any], objective: Objective) -> None:
    """Refuse a bound that would be per row for a joint guide, or joint for a guide of rows."""
    enclosing = [_plates(node) for node in model if _counts(node)]
    everywhere = set.intersection(*enclosing) if enclosing else set()
    if any(everywhere - _plates(node) for node in guide if _counts(node)):
        raise OptionError(
            f"objective {objective.name!r}: plate {sorted(everywhere)[0]!r} encloses every site of the "
            "model, so RenyiELBO takes a bound per row, but the guide holds all rows in one site. Use "
            "engine='eager', or guide='amortized'."
        )
    shared_latents = [n["name"] for n in model if _counts(n) and not _plates(n)]
    if shared_latents and any(_plates(n) and _auxiliary(n) for n in guide):
        raise OptionError(
            f"objective {objective.name!r}: the guide is local to a plate but site "
            f"{shared_latents[0]!r} is outside it, so RenyiELBO would take the bound of all rows "
            "jointly. Use engine='eager', which takes it per datum."
        )


def _counts(node: Mapping[str, Any]) -> bool:
    """Whether a site contributes to the log weights."""
    return not node["infer"].get("_deterministic")


def _auxiliary(node: Mapping[str, Any]) -> bool:
    return bool(node["infer"].get("is_auxiliary"))


def _plates(node: Mapping[str, Any]) -> set[str]:
    return {frame.name for frame in node["cond_indep_stack"] if frame.vectorized}
