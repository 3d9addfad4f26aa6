"""A Pyro model as an object: the callable, its arguments, and the names of what they hold."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pyro_vi_kit.core.errors import ModelError, OptionError, told
from pyro_vi_kit.core.options import checks, mapping, optional, text

if TYPE_CHECKING:
    from pyro_vi_kit.model.data import Stream

Update = Callable[..., Any]
"""The optimal factor of one latent given the others: ``update(q, *args, **kwargs)``; see `Model`."""


@dataclass(frozen=True, init=False, eq=False)
class Model:
    """A Pyro model together with the data it is conditioned on.

    Args:
        fn: Any Pyro callable: a function, a handler-wrapped function, a ``PyroModule``.
        *args: Positional arguments of ``fn``. Tensors among them (also inside lists, tuples and
            dicts) are the data. Or one `torch.utils.data.Dataset` or `DataLoader`, whose data never
            are in memory at once: ``fn`` is then called with a batch, a tuple as positional arguments
            and a dict as keyword arguments. It declares a plate as long as the batch,
            ``pyro.plate("row", len(x))``, which is scaled to all rows.
        kwargs: Keyword arguments of ``fn``.
        coords: Names of what a dimension holds, ``{"school": ["A", "B", ...]}``. Dimensions are named
            after plates; ``dims`` names the others.
        dims: Names of a site's dimensions where plates do not say them,
            ``{"beta": ["coefficient"]}``: either its event dimensions or all of its dimensions.
        name: Shown in tables and files; taken from ``fn`` when not given.
        rows: Number of all rows, for a loader that cannot say it.
        updates: For ``vi.fit(method="cavi")``, by latent, ``{"beta": update}``:
            ``update(q, *args, **kwargs)`` is given the present factors ``q``, a Pyro distribution over
            the constrained value of each latent, and ``fn``'s arguments, and gives the optimal factor
            of its own latent: ``exp(E[log p(latent | the rest)])`` up to its constant. A `Normal` for a
            real latent, `Gamma` for a positive one, `Beta`, `Dirichlet` or `VonMises`, in the latent's
            shape. The numbers of a vector have factors of their own, and the update may sweep over
            them, each given those before it: it starts from ``q[latent].mean`` and gives one factorised
            distribution over the vector.

    Attributes:
        stream: The data that are read a batch at a time; None where they are arguments. ``args`` and
            ``kwargs`` then hold an example of a batch, read when they are first asked for.

    Raises:
        OptionError: If ``kwargs`` is no dict or ``name`` no text.
        ModelError: If ``fn`` is not callable, ``coords`` / ``dims`` are not mappings of sequences,
            ``updates`` not one of callables, or a dataset cannot be streamed.
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    coords: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    dims: Mapping[str, Sequence[str]] = field(default_factory=dict)
    name: str = "model"
    stream: Stream | None = None
    updates: Mapping[str, Update] = field(default_factory=dict)

    @checks(kwargs=optional(mapping), name=optional(text))
    def __init__(
        self,
        fn: Callable[..., Any],
        *args: Any,
        kwargs: Mapping[str, Any] | None = None,
        coords: Mapping[str, Sequence[Any]] | None = None,
        dims: Mapping[str, Sequence[str]] | None = None,
        name: str | None = None,
        rows: int | None = None,
        updates: Mapping[str, Update] | None = None,
    ) -> None:
        if not callable(fn):
            raise ModelError(
                f"a model must be callable, got {type(fn).__name__}: pass the Pyro function itself, "
                "then its arguments, as in vi.Model(fn, x, y)"
            )
        set_field = functools.partial(object.__setattr__, self)
        set_field("fn", fn)
        stream = _stream(args, rows)
        set_field("stream", stream)
        if stream is None:
            set_field("args", args)
            set_field("kwargs", dict(kwargs or {}))
        else:
            set_field("_constants", dict(kwargs or {}))
        set_field("coords", _names("coords", coords))
        set_field("dims", _names("dims", dims))
        set_field("name", name or _callable_name(fn))
        set_field("updates", _updates(updates))

    def __getattr__(self, name: str) -> Any:
        """The arguments of a streamed model, read when they are first asked for."""
        stream = self.__dict__.get("stream")
        if name not in ("args", "kwargs") or stream is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        args, kwargs = stream.example()
        constants = self.__dict__["_constants"]
        twice = sorted(set(kwargs) & set(constants))
        if twice:
            raise ModelError(
                f"{twice[0]!r} is given by kwargs= and by each batch: leave it out of one of them"
            )
        object.__setattr__(self, "args", args)
        # The batch's tensors first: they are what steps replace.
        object.__setattr__(self, "kwargs", kwargs | constants)
        return self.__dict__[name]

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
            updates=self.updates,
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


def a_model(option: str, value: Any) -> Model:
    """A rule of `options.checks`: a `Model`."""
    if isinstance(value, Model):
        return value
    remedy = "wrap the Pyro function and its arguments, vi.Model(fn, x, y)"
    if isinstance(getattr(value, "model", None), Model):
        remedy = f"pass the model that it is of, {type(value).__name__.lower()}.model"
    raise OptionError(f"{option} must be a vi.Model, got {type(value).__name__}: {remedy}")


def _stream(args: tuple[Any, ...], rows: int | None) -> Stream | None:
    """The stream that the positional arguments are, if they are one.

    Raises:
        ModelError: If there are other positional arguments beside a dataset or loader.
    """
    # Where nobody has loaded it, no argument is of its classes, and torch need not be loaded.
    data = sys.modules.get("torch.utils.data")
    streams = [] if data is None else [isinstance(a, data.Dataset | data.DataLoader) for a in args]
    if not any(streams):
        if rows is not None:
            raise ModelError("rows= is for a DataLoader as the only positional argument")
        return None
    if len(args) > 1:
        raise ModelError(
            "a dataset or loader must be the only positional argument: it gives what changes from row "
            "to row, and what does not is given by kwargs={...}"
        )
    from pyro_vi_kit.model.data import Stream

    return Stream(next(iter(args)), rows)


def _names(option: str, mapping: Mapping[str, Sequence[Any]] | None) -> dict[str, tuple[Any, ...]]:
    """Copy a mapping of sequences, or say which entry is not one."""
    if mapping is None:
        return {}
    if not isinstance(mapping, Mapping):
        raise ModelError(f"{option}= must be a dict of sequences, got {type(mapping).__name__}")
    for key, values in mapping.items():
        if isinstance(values, str) or not hasattr(values, "__iter__"):
            raise ModelError(f"{option}[{key!r}] must be a sequence of names, got {told(values)}")
    return {str(key): tuple(values) for key, values in mapping.items()}


def _updates(mapping: Mapping[str, Update] | None) -> dict[str, Update]:
    """Copy the updates, or say which is none."""
    if mapping is None:
        return {}
    if not isinstance(mapping, Mapping):
        raise ModelError(
            f"updates= must be a dict of functions by latent, got {type(mapping).__name__}"
        )
    for site, update in mapping.items():
        if not callable(update):
            raise ModelError(
                f"updates[{site!r}] must be a function update(q, *args), got {type(update).__name__}"
            )
    return dict(mapping)


def _callable_name(fn: Callable[..., Any]) -> str:
    """A readable name: of the function, of what a partial or handler wraps, or of the class."""
    fn = inspect.unwrap(fn)
    while isinstance(fn, functools.partial):
        fn = inspect.unwrap(fn.func)
    return getattr(fn, "__name__", None) or type(fn).__name__
