"""A shuffled order of any number of rows that takes no memory, and can be entered anywhere."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch

# Up to this many rows the order is drawn and held, 0.5 MB.
_HELD = 65_536
_ROUNDS = 4
_MASK = (1 << 64) - 1


class _Kind(NamedTuple):
    """Unsigned integers of one width, and two odd constants to hash with."""

    number: Any
    bits: int
    one: int
    other: int


_SMALL = _Kind(np.uint32, 32, 0x9E3779B1, 0x85EBCA6B)
_LARGE = _Kind(np.uint64, 64, 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9)


class Order:
    """A permutation of N rows: the same for the same seed and epoch.

    A held permutation of many rows would take as much memory as a column of the data. Theirs is a
    generalised Feistel network (Black & Rogaway 2002): positions are pairs in a grid of about
    sqrt(N) x sqrt(N), and each round shifts one coordinate by a hash of the other, which can be
    undone, and so is one to one. The few positions of the grid beyond N walk on until they are inside.

    Args:
        rows: N.
        seed: Of the order.
        epoch: Another one for each.
    """

    def __init__(self, rows: int, seed: int, epoch: int) -> None:
        self.rows = rows
        mixed = mix(seed, epoch)
        if rows <= _HELD:
            generator = torch.Generator().manual_seed(mixed >> 1)
            self._held = torch.randperm(rows, generator=generator, device="cpu").numpy()
            return
        self._held = None
        # 32-bit numbers take half the time; the grid's sides then fit into 16 bits.
        self._kind = _SMALL if rows < 2**31 else _LARGE
        number = self._kind.number
        self._width = number(math.isqrt(rows - 1) + 1)
        self._height = number(-(-rows // int(self._width)))
        self._keys = [number(mix(mixed, i) % 2**self._kind.bits) for i in range(_ROUNDS)]

    def rows_at(self, start: int, stop: int) -> np.ndarray:
        """The rows at positions from ``start`` to before ``stop``, int64."""
        if self._held is not None:
            return self._held[start:stop]
        found = self._step(np.arange(start, stop, dtype=self._kind.number))
        if int(found.max()) >= self.rows:
            outside = found >= self.rows
            while outside.any():
                found[outside] = self._step(found[outside])
                outside = found >= self.rows
        return found.astype(np.int64)

    def _step(self, position: np.ndarray) -> np.ndarray:
        """Where the network sends positions of the grid."""
        row = position // self._width
        column = position - row * self._width
        for i, key in enumerate(self._keys):
            if i % 2 == 0:
                column = self._shifted(column, row, key, self._width)
            else:
                row = self._shifted(row, column, key, self._height)
        return row * self._width + column

    def _shifted(self, values: np.ndarray, by: np.ndarray, key: Any, size: Any) -> np.ndarray:
        """Numbers below ``size``, moved on around the circle by a hash of others; integers wrap."""
        number, bits, one, other = self._kind
        half = number(bits // 2)
        z = by + key
        z *= number(one)
        z ^= z >> half
        z *= number(other)
        z >>= half
        # To a number below the size by a product: a remainder takes as long as all the rest.
        z *= size
        z >>= half
        z += values
        z -= size * (z >= size)
        return z


def mix(seed: int, number: int) -> int:
    """64 bits in which every bit of both counts (SplitMix64, Steele, Lea & Flood 2014)."""
    z = (seed * 0x9E3779B97F4A7C15 + (number + 1) * 0xD1B54A32D192ED03) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
