"""Encoders: from a datum's observations to the numbers of its distribution."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.guides.local.heads import Head, NormalHead


class Standardised(nn.Module):
    """An MLP on inputs brought to mean 0 and sd 1; both constants are saved with it.

    Args:
        inputs: The data the constants are taken from, `[N, F]`.
        hidden: Widths of the hidden layers.
        initial: What it gives at first, about: the last layer's biases, `[p]`.
        extra: Further inputs that are taken as they are, such as draws of the globals.
    """

    def __init__(
        self, inputs: Tensor, hidden: Sequence[int], initial: Tensor, extra: int = 0
    ) -> None:
        super().__init__()
        sd, mean = torch.std_mean(inputs, 0, correction=0)
        self.mean: Tensor
        self.sd: Tensor
        self.register_buffer("mean", torch.cat([mean, mean.new_zeros(extra)]))
        # A constant column says nothing; dividing by its sd would blow up rounding noise.
        sd = torch.where(sd > 1e-8, sd, torch.ones_like(sd))
        self.register_buffer("sd", torch.cat([sd, sd.new_ones(extra)]))
        widths = [inputs.shape[-1] + extra, *hidden]
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), nn.SiLU()]
        last = nn.Linear(widths[-1], len(initial))
        with torch.no_grad():
            last.weight.mul_(0.1)
            last.bias.copy_(initial)
        self.layers = nn.Sequential(*layers, last)

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs `[..., p]` of inputs `[..., F]`."""
        return self.layers((inputs - self.mean) / self.sd)


class Custom(nn.Module):
    """A copy of the user's encoder, whose pair of means and sds is taken as numbers of normals.

    Args:
        encoder: From `[B, F]` to `[B, p]`, or to a pair `[B, d]` (means, sds) for independent normals.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder)

    def forward(self, inputs: Tensor) -> Tensor:
        """Numbers `[..., p]` of inputs `[..., F]`."""
        # Users' modules may know batches of one dim only.
        output = self.encoder(inputs.reshape(-1, inputs.shape[-1]))
        if isinstance(output, tuple):
            loc, scale = output
            output = torch.cat([loc, scale.log()], -1)
        return output.reshape(*inputs.shape[:-1], output.shape[-1])


def custom_encoder(encoder: nn.Module, inputs: Tensor, head: Head) -> Custom:
    """The user's encoder in the inputs' dtype, tried on two rows.

    Args:
        encoder: The user's module.
        inputs: What it will see, `[N, F]`.
        head: What reads its output.

    Raises:
        OptionError: If it raises, or its output has the wrong shape.
    """
    made = Custom(encoder).to(inputs.device, inputs.dtype)
    rows, dim = min(2, len(inputs)), head.dim
    shape = (rows, inputs.shape[-1])
    try:
        with torch.no_grad():
            output = made.encoder(inputs[:rows])
    except Exception as error:
        raise OptionError(
            f"the encoder raised {type(error).__name__} on an input of shape {shape} (rows, "
            f"flattened observations): {error}"
        ) from error
    parts = output if isinstance(output, tuple) else (output,)
    pair = isinstance(output, tuple)
    normal = isinstance(head, NormalHead)
    expected = (rows, dim if pair else head.size)
    if any(tuple(p.shape) != expected for p in parts) or len(parts) > 2 or (pair and not normal):
        wanted = f"it must give one tensor ({rows}, {head.size})"
        wanted += (
            f" of means and log sds, or a pair of ({rows}, {dim}) of means and sds"
            if normal
            else f": the numbers of {type(head).__name__} for {dim} latents a datum"
        )
        raise OptionError(
            f"the encoder gave {[tuple(part.shape) for part in parts]} on {rows} rows; {wanted}"
        )
    return made
