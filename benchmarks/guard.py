"""What the comparison with Pyro's own trace costs when a density is made, on a small model.

    python -m benchmarks.guard [--model eight_schools] [--repeats 50]

Densities are made with the comparison and without it, in turns; prints the medians of processor time.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from unittest import mock

import torch

from pyro_vi_kit.model.log_density import Density, density
from pyro_vi_kit.model.model import Model

# Milliseconds that it may cost on eight schools.
ALLOWED = 30.0


def _milliseconds(model: Model) -> float:
    # Of the processor, on one thread: other programs do not count.
    began = time.process_time()
    Density(model)
    return 1e3 * (time.process_time() - began)


def measured(model: Model, repeats: int) -> tuple[float, float]:
    """Median milliseconds of making a density, with the comparison and without."""
    _milliseconds(model)  # imports
    with_it, without = [], []
    for _ in range(repeats):
        with_it.append(_milliseconds(model))
        with mock.patch.object(density, "require_same_as_pyro", return_value=None):
            without.append(_milliseconds(model))
    return statistics.median(with_it), statistics.median(without)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; the exit code says whether it costs no more than it may."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="eight_schools")
    parser.add_argument("--repeats", type=int, default=50)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model = importlib.import_module(f"models.{options.model}").MODEL
    with_it, without = measured(model, options.repeats)
    cost = with_it - without
    print(f"{options.model}: {with_it:.1f} ms with, {without:.1f} ms without: {cost:.1f} ms")
    return 0 if cost <= ALLOWED else 1


if __name__ == "__main__":
    sys.exit(main())
