"""Catch each model where an example first hands it to inference, and keep that inference short."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pyro import get_param_store, infer
from pyro.infer.abstract_infer import TracePosterior
from pyro.infer.autoguide import AutoGuide
from pyro.infer.elbo import ELBO
from pyro.infer.mcmc import util
from pyro.poutine.trace_messenger import TraceHandler

_STEPS = 2  # of an SVI; later ones repeat the loss
_DRAWS = 4  # of an MCMC


@dataclass(frozen=True)
class Found:
    """A model as an example runs it.

    Attributes:
        model: The callable.
        guide: The guide it is trained with, None under MCMC or in prior predictive draws.
        args: Positional arguments.
        kwargs: Keyword arguments.
        loss: What trains it, for the table.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any] | None
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    loss: str


@dataclass
class Hooks:
    """Replaces the methods of Pyro that run inference.

    Args:
        sink: Called with each new pair of a model and a guide, after Pyro itself has run it once.
    """

    sink: Callable[[Found], None]
    _seen: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    _depth: int = 0

    def install(self) -> None:
        """For the rest of the process."""
        infer.SVI.step = self._step(infer.SVI.step)
        infer.MCMC.__init__ = _short(infer.MCMC.__init__)
        infer.MCMC.run = self._run(infer.MCMC.run)
        infer.NUTS.__init__ = _shallow(infer.NUTS.__init__)
        util.initialize_model = self._initialize(util.initialize_model)
        infer.Predictive.forward = self._predict(infer.Predictive.forward)
        TracePosterior.run = self._posterior(TracePosterior.run)
        for loss in {ELBO, *_below(ELBO)}:
            if "_get_traces" in vars(loss):
                loss._get_traces = self._traces(loss._get_traces)

    @contextlib.contextmanager
    def _outermost(self, found: Found | None) -> Iterator[None]:
        """Run Pyro's own method, and hand over what was found when it has gone well."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
        if self._depth or found is None:
            return
        key = (code_of(found.model), code_of(found.guide) if found.guide else None)
        if key not in self._seen:
            self._seen[key] = found  # kept alive, so that no other takes its address
            self._depth += 1  # what a model infers inside of itself is no find
            self.sink(found)
            self._depth -= 1

    def _step(self, original: Any) -> Any:
        @functools.wraps(original)
        def step(svi: Any, *args: Any, **kwargs: Any) -> Any:
            svi.steps_seen = getattr(svi, "steps_seen", 0) + 1
            if svi.steps_seen > _STEPS and len(get_param_store()):  # which some clear in between
                return svi.last_loss
            loss = type(getattr(svi.loss, "__self__", svi.loss)).__name__
            with self._outermost(Found(svi.model, svi.guide, args, kwargs, loss)):
                svi.last_loss = original(svi, *args, **kwargs)
            return svi.last_loss

        return step

    def _traces(self, original: Any) -> Any:
        @functools.wraps(original)
        def traces(loss: Any, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
            with self._outermost(Found(model, guide, args, kwargs, type(loss).__name__)):
                yield from original(loss, model, guide, args, kwargs)

        return traces

    def _run(self, original: Any) -> Any:
        @functools.wraps(original)
        def run(mcmc: Any, *args: Any, **kwargs: Any) -> Any:
            model = getattr(mcmc.kernel, "model", None)
            found = Found(model, None, args, kwargs, "MCMC") if model is not None else None
            with self._outermost(found):
                return original(mcmc, *args, **kwargs)

        return run

    def _initialize(self, original: Any) -> Any:
        @functools.wraps(original)
        def initialize(model: Any, *args: Any, **options: Any) -> Any:
            given = options.get("model_args", args[0] if args else ())
            named = options.get("model_kwargs") or {}
            with self._outermost(Found(model, None, given, named, "potential_fn")):
                return original(model, *args, **options)

        return initialize

    def _predict(self, original: Any) -> Any:
        @functools.wraps(original)
        def forward(predictive: Any, *args: Any, **kwargs: Any) -> Any:
            prior = predictive.guide is None and not predictive.posterior_samples
            found = Found(predictive.model, None, args, kwargs, "Predictive") if prior else None
            with self._outermost(found):
                return original(predictive, *args, **kwargs)

        return forward

    def _posterior(self, original: Any) -> Any:
        @functools.wraps(original)
        def run(posterior: Any, *args: Any, **kwargs: Any) -> Any:
            model = getattr(posterior, "model", None)
            name = type(posterior).__name__
            found = Found(model, None, args, kwargs, name) if model is not None else None
            with self._outermost(found):
                return original(posterior, *args, **kwargs)

        return run


def code_of(fn: Any) -> Any:
    """What tells one model or guide from another: the code of a function, the class of an object."""
    fn = innermost(fn)
    return getattr(fn, "__code__", None) or (type(fn), code_of(fn.model) if _wraps(fn) else None)


def innermost(fn: Any) -> Any:
    """The function inside of methods, partials, handlers and decorators."""
    while True:
        inner = getattr(fn, "__wrapped__", None) or getattr(fn, "__func__", None)
        if isinstance(fn, TraceHandler):
            inner = fn.fn
        elif isinstance(fn, functools.partial):
            handled = getattr(fn.func, "__name__", "") == "_context_wrap"  # a handler, a function
            inner = fn.args[1] if handled else fn.func
        if inner is None:
            return fn
        fn = inner


def name_of(fn: Any) -> str:
    """A name for the table."""
    fn = innermost(fn)
    return getattr(fn, "__qualname__", None) or type(fn).__name__


def _wraps(fn: Any) -> bool:
    return isinstance(fn, AutoGuide) and callable(getattr(fn, "model", None))


def _below(cls: type) -> Iterator[type]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _below(sub)


def _shallow(original: Any) -> Any:
    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{**kwargs, "max_tree_depth": 3})

    return init


def _short(original: Any) -> Any:
    @functools.wraps(original)
    def init(self: Any, kernel: Any, *args: Any, **kwargs: Any) -> None:
        first = kwargs.get("initial_params")
        if first is not None and kwargs.get("num_chains", 1) > 1:
            kwargs["initial_params"] = {name: value[:1] for name, value in first.items()}
        short = {"num_samples": _DRAWS, "warmup_steps": _DRAWS, "num_chains": 1}
        original(self, kernel, *args[2:], **{**kwargs, **short})

    return init
