"""Parameters that modules hold: whose they are, and others in their place."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping

import pyro
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_vi_kit.core.runtime import if_forked


def owner_of_param() -> tuple[nn.Module | None, str]:
    """The submodule and attribute behind the param message under way, read off the call stack.

    Pyro's param messages carry a name and a tensor, not the module whose attribute the tensor is.
    The module's forward pass reads that attribute: setting the message's value changes nothing.
    """
    frame = sys._getframe(1)
    for _ in range(60):
        if frame is None:
            break
        if frame.f_code is pyro.module.__code__:
            module, path = frame.f_locals["nn_module"], frame.f_locals["param_name"]
            return _resolve(module, path)
        if frame.f_code is PyroModule.__getattr__.__code__:
            module, attribute = frame.f_locals["self"], frame.f_locals["name"]
            if attribute in module.__dict__.get("_pyro_params", {}):
                attribute += "_unconstrained"
            if attribute in module._parameters:
                return module, attribute
        frame = frame.f_back
    return None, ""


def _resolve(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The submodule that holds the parameter ``path``, and the parameter's name in it."""
    *parents, attribute = path.split(".")
    for parent in parents:
        # Not getattr: a PyroModule answers attribute access with param statements.
        module = module._modules[parent]  # type: ignore[assignment]
    return module, attribute


@contextlib.contextmanager
def swapped_parameters(swaps: Mapping[tuple[nn.Module, str], Tensor]) -> Iterator[None]:
    """Put these tensors in the place of modules' parameters, and the user's own back on exit."""
    outer = {(module, name): module._parameters[name] for module, name in swaps}

    def give_back() -> None:
        for (module, name), tensor in outer.items():
            module._parameters[name] = tensor

    with if_forked(give_back):
        for (module, name), tensor in swaps.items():
            module._parameters[name] = tensor  # type: ignore[assignment]
        try:
            yield
        finally:
            give_back()
