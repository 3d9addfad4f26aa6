"""Where the tensors of a fit live: checked before any work, and told from the data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from pyro_vi_kit.core.errors import OptionError, first_line, told

Device = str | torch.device


def checked(device: Device | None) -> torch.device | None:
    """The device that ``device=`` names, its index filled in; None where it names none.

    Raises:
        OptionError: If torch knows no such device, or this machine has none.
    """
    if device is None:
        return None
    if not isinstance(device, str | torch.device):
        raise OptionError(f"device= must be 'cpu', 'cuda' or a torch.device, got {told(device)}")
    try:
        named = torch.device(device)
    except RuntimeError as error:
        raise OptionError(
            f"device={str(device)!r} is no device that torch knows: use 'cpu', 'cuda' or 'cuda:1'"
        ) from error
    if named.type == "meta":
        raise OptionError("device='meta' holds no numbers: use 'cpu' or 'cuda'")
    if named.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(
            f"device={str(device)!r}: torch finds no CUDA device (torch.cuda.is_available() is False). "
            "Install a build of torch with CUDA and its driver, or leave device= out to use the CPU"
        )
    try:
        # What a device can be used for shows in using it; this also wakes CUDA and its generators.
        return torch.empty(0, device=named).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise OptionError(
            f"device={str(device)!r} cannot be used on this machine ({first_line(error)}): "
            f"{_offered(named.type)}"
        ) from error


def device_of(arguments: Any) -> torch.device:
    """Where the tensors of a nest are: the first place beside the CPU; torch's default for none."""
    devices = [leaf.device for leaf in tree_flatten(arguments)[0] if isinstance(leaf, Tensor)]
    if not devices:
        return torch.empty(0).device
    return next((device for device in devices if device.type != "cpu"), devices[0])


def _offered(kind: str) -> str:
    count = torch.cuda.device_count() if kind == "cuda" else 0
    known = ", ".join(repr(f"cuda:{i}") for i in range(count))
    return f"use one of 'cpu', {known}" if known else "use 'cpu' or 'cuda'"
