"""What densities of one model on different data have in common beside the model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_vi_kit.core.runtime import LOCK


@dataclass(frozen=True, eq=False)
class Recordings:
    """Recordings that serve all data of the same shapes, each made once.

    Attributes:
        data: The data that recordings are made on. They are the same whoever asks first, and so are the
            recordings' last digits.
    """

    data: Sequence[Tensor]
    _made: dict[Hashable, Any] = field(default_factory=dict)

    def points(self, count: int, dim: int) -> Tensor:
        """Unconstrained points `[count, dim]` to record at, the same at every call, on the CPU."""
        generator = torch.Generator().manual_seed(20264)
        return 0.3 * torch.randn(count, dim, generator=generator, dtype=torch.float64, device="cpu")

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What is kept under a key; made where there is nothing yet."""
        with LOCK:
            if key not in self._made:
                self._made[key] = make()
            return self._made[key]
