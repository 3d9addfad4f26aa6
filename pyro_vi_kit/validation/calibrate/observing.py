"""Simulated data in the place of a model's own: in its arguments, or else at its observed sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.model.log_density.handlers import kind_of
from pyro_vi_kit.model.model import Model
from pyro_vi_kit.validation.calibrate.one_use import require_one_use

Values = Mapping[str, Tensor]

_ARGUMENT = "simulated_data"


class Given:
    """A model whose observed sites have the values of one more keyword argument.

    Args:
        fn: The model.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        self.__name__ = getattr(fn, "__name__", type(fn).__name__)

    def __call__(self, *args: Any, simulated_data: Values, **kwargs: Any) -> Any:
        """Run the model."""
        with _Observe(simulated_data):
            return self.fn(*args, **kwargs)


class _Observe(Messenger):
    """Sets observed sites. It is inside of what reads them, and outside of what the model does."""

    def __init__(self, values: Values) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if not isinstance(msg["fn"], _Subsample) and kind_of(msg) == "observed":
            msg["value"] = self.values[msg["name"]]


class Observing:
    """Puts data into a model.

    Args:
        density: The model.

    Attributes:
        by_argument: Whether the data are arguments of the model, so that it needs no handler.
        example: The model on its own data, as `with_values` gives it.

    Raises:
        ModelError: If the model uses its data elsewhere than at its observed sites.
    """

    def __init__(self, density: Density) -> None:
        self.model = density.model
        leaves, _ = self._flat()
        self._places = _places(density, leaves)
        self.by_argument = False
        given = Density(
            self.with_values(density.observed), dtype=density.dtype, device=density.device
        )
        require_one_use(density, given, leaves, self._places)
        self.by_argument = self._is_by_argument(density)
        self.example = self.with_values(density.observed)

    def with_values(self, values: Values) -> Model:
        """The model on these values of its observed sites, `{site: [*batch, *event]}`."""
        leaves, spec = self._flat()
        for name, position in self._places.items():
            leaves[position] = values[name].to(leaves[position])
        args, kwargs = tree_unflatten(leaves, spec)
        if self.by_argument:
            return self.model.with_args(*args, **kwargs)
        return Model(
            Given(self.model.fn),
            *args,
            kwargs={**kwargs, _ARGUMENT: dict(values)},
            coords=self.model.coords,
            dims=self.model.dims,
            name=self.model.name,
        )

    def _flat(self) -> tuple[list[Any], Any]:
        """The model's arguments as a list, and what makes them of it; not kept, to be sent elsewhere."""
        return tree_flatten((self.model.args, dict(self.model.kwargs)))

    def _is_by_argument(self, density: Density) -> bool:
        """Whether the sites observe what their arguments hold, also where these hold other values."""
        if set(self._places) != set(density.observed):
            return False
        args, kwargs = self._moved()
        model = self.model.with_args(*args, **kwargs)
        try:
            found = density.observations(model)
        except Exception:  # noqa: BLE001  whatever a model does with such data, the handler will do
            return False
        leaves = tree_flatten((model.args, dict(model.kwargs)))[0]
        return all(
            torch.equal(found[name], density.cast(leaves[position]).to(found[name]))
            for name, position in self._places.items()
        )

    def _moved(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with each observed site's values in the opposite order."""
        leaves, spec = self._flat()
        for position in self._places.values():
            leaves[position] = leaves[position].flatten().flip(0).reshape(leaves[position].shape)
        return tree_unflatten(leaves, spec)


def _places(density: Density, leaves: list[Any]) -> dict[str, int]:
    """The argument that each observed site's values are, where there is one."""
    places: dict[str, int] = {}
    for name, value in density.observed.items():
        for position, leaf in enumerate(leaves):
            if (
                isinstance(leaf, Tensor)
                and position not in places.values()
                and leaf.shape == value.shape
                and torch.equal(density.cast(leaf).to(value), value)
            ):
                places[name] = position
                break
    return places
