"""A shuffled order of any number of rows that takes no memory, and can be entered anywhere."""

from __future__ import annotations

import numpy as np
import torch

# Up to this many rows the order is drawn and held, 0.5 MB.
_HELD = 65_536
_ROUNDS = 4
_MASK = (1 << 64) - 1


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
            self._held = torch.randperm(rows, generator=generator).numpy()
            return
        self._held = None
        self._width = int(np.ceil(np.sqrt(rows)))
        self._height = -(-rows // self._width)
        self._keys = [np.uint64(mix(mixed, i)) for i in range(_ROUNDS)]

    def rows_at(self, start: int, stop: int) -> np.ndarray:
        """The rows at positions from ``start`` to before ``stop``, int64."""
        if self._held is not None:
            return self._held[start:stop]
        found = self._step(np.arange(start, stop, dtype=np.uint64))
        outside = found >= self.rows
        while outside.any():
            found[outside] = self._step(found[outside])
            outside = found >= self.rows
        return found.astype(np.int64)

    def _step(self, position: np.ndarray) -> np.ndarray:
        """Where the network sends positions of the grid, uint64."""
        width, height = np.uint64(self._width), np.uint64(self._height)
        row = position // width
        column = position - row * width
        for i, key in enumerate(self._keys):
            if i % 2 == 0:
                column = _shifted(column, row, key, width)
            else:
                row = _shifted(row, column, key, height)
        return row * width + column


def mix(seed: int, number: int) -> int:
    """64 bits in which every bit of both counts (SplitMix64, Steele, Lea & Flood 2014)."""
    z = (seed * 0x9E3779B97F4A7C15 + (number + 1) * 0xD1B54A32D192ED03) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _shifted(values: np.ndarray, by: np.ndarray, key: np.uint64, size: np.uint64) -> np.ndarray:
    """Numbers below ``size``, moved on around the circle by a hash of others; uint64 wraps."""
    z = by + key
    z *= np.uint64(0x9E3779B97F4A7C15)
    z ^= z >> np.uint64(32)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z >>= np.uint64(32)
    # 32 bits to a number below the size, by a product: a remainder takes as long as all the rest.
    z *= size
    z >>= np.uint64(32)
    z += values
    z -= size * (z >= size)
    return z
