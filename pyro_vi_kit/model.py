"""A Pyro model as an object: the callable, its arguments, and the names of what they hold."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pyro_vi_kit.errors import ModelError


@dataclass(frozen=True, init=False, eq=False)
class Model:
    """A Pyro model together with the data it is conditioned on.

    Args:
        fn: Any Pyro callable: a function, a handler-wrapped function, a ``PyroModule``.
        *args: Positional arguments of ``fn``. Tensors among them (also inside lists, tuples and
            dicts) are the data.
        kwargs: Keyword arguments of ``fn``.
        coords: Names of what a dimension holds, ``{"school": ["A", "B", ...]}``. Dimensions are named
            after plates; ``dims`` names the others.
        dims: Names of a site's dimensions where plates do not say them,
            ``{"beta": ["coefficient"]}``: either its event dimensions or all of its dimensions.
        name: Shown in tables and files; taken from ``fn`` when not given.

    Raises:
        ModelError: If ``fn`` is not callable, or ``coords`` / ``dims`` are not mappings of sequences.
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    coords: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    dims: Mapping[str, Sequence[str]] = field(default_factory=dict)
    name: str = "model"

    def __init__(
        self,
        fn: Callable[..., Any],
        *args: Any,
        kwargs: Mapping[str, Any] | None = None,
        coords: Mapping[str, Sequence[Any]] | None = None,
        dims: Mapping[str, Sequence[str]] | None = None,
        name: str | None = None,
    ) -> None:
        if not callable(fn):
            raise ModelError(
                f"a model must be callable, got {type(fn).__name__}: pass the Pyro function itself, "
                "then its arguments, as in vi.Model(fn, x, y)"
            )
        set_field = functools.partial(object.__setattr__, self)
        set_field("fn", fn)
        set_field("args", args)
        set_field("kwargs", dict(kwargs or {}))
        set_field("coords", _names("coords", coords))
        set_field("dims", _names("dims", dims))
        set_field("name", name or _callable_name(fn))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the Pyro model; without arguments, on its own data."""
        if args or kwargs:
            return self.fn(*args, **kwargs)
        return self.fn(*self.args, **self.kwargs)

    def with_args(self, *args: Any, **kwargs: Any) -> Model:
        """The same model on other arguments; keyword arguments that are not given are kept."""
        return Model(
            self.fn,
            *args,
            kwargs={**self.kwargs, **kwargs},
            coords=self.coords,
            dims=self.dims,
            name=self.name,
        )

    @property
    def argument_names(self) -> tuple[str, ...]:
        """The name of each positional argument, from the signature where it can be read."""
        try:
            parameters = inspect.signature(self.fn).parameters.values()
        except (TypeError, ValueError):
            parameters = ()
        positional = [
            p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        return tuple(
            positional[i] if i < len(positional) else f"arg{i}" for i in range(len(self.args))
        )


def _names(option: str, mapping: Mapping[str, Sequence[Any]] | None) -> dict[str, tuple[Any, ...]]:
    """Copy a mapping of sequences, or say which entry is not one."""
    if mapping is None:
        return {}
    if not isinstance(mapping, Mapping):
        raise ModelError(f"{option}= must be a dict of sequences, got {type(mapping).__name__}")
    for key, values in mapping.items():
        if isinstance(values, str) or not hasattr(values, "__iter__"):
            raise ModelError(f"{option}[{key!r}] must be a sequence of names, got {values!r}")
    return {str(key): tuple(values) for key, values in mapping.items()}


def _callable_name(fn: Callable[..., Any]) -> str:
    """A readable name: of the function, of what a partial or handler wraps, or of the class."""
    fn = inspect.unwrap(fn)
    while isinstance(fn, functools.partial):
        fn = inspect.unwrap(fn.func)
    return getattr(fn, "__name__", None) or type(fn).__name__
