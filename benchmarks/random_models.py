"""Random models: the density against a plain Pyro trace, captured and C against eager, and files.

    python -m benchmarks.random_models [--count 1000] [--first 0] [--every 10]

Each model is drawn from its seed. In float64 its log density has to be that of `pyro.poutine.trace` to
1e-8, at three points; its discrete sites are summed up by brute force. Replays of a recording are
compared on every model, C and a fit that is saved and loaded again on every tenth. Prints what
disagrees; exits 1 if anything does.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

import pyro_vi_kit as vi
from benchmarks.lib.grammar import A, Grammar, Program
from pyro_vi_kit.model.gradients import Gradients
from pyro_vi_kit.model.log_density import Density

TOLERANCE = 1e-8
POINTS = 3
EVERY = 10


class _Values(Messenger):
    """Gives latents their values, and a subsampled plate its rows."""

    def __init__(self, values: Mapping[str, Tensor], rows: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values, self.rows = values, rows

    def _pyro_sample(self, msg: Any) -> None:
        given = self.rows if isinstance(msg["fn"], _Subsample) else self.values
        if msg["name"] in given and not msg["is_observed"]:
            msg["value"], msg["done"] = given[msg["name"]], True


def in_pyro(program: Program, values: Mapping[str, Tensor], rows: Mapping[str, Tensor]) -> float:
    """The log joint of Pyro's own trace, all in double; discrete sites summed out by brute force."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with pyro.validation_enabled(False):
            return float(torch.logsumexp(torch.stack(list(_joints(program, values, rows))), 0))
    finally:
        torch.set_default_dtype(before)


def _joints(
    program: Program, values: Mapping[str, Tensor], rows: Mapping[str, Tensor]
) -> Iterator[Tensor]:
    data = {
        name: value.double() if value.is_floating_point() else value
        for name, value in program.data.items()
    }

    def joint(states: Mapping[str, Tensor]) -> tuple[Tensor, Any]:
        model = _Values({**values, **states}, rows)(program.run)
        trace = poutine.trace(model).get_trace(data, double=True)
        return torch.as_tensor(trace.log_prob_sum()), trace

    total, trace = joint({})
    discrete = {
        statement.name: trace.nodes[statement.name]
        for statement in program.statements
        if statement.kind == "discrete"
    }
    if not discrete:
        yield total
        return
    cells = {
        name: itertools.product(
            node["fn"].enumerate_support(expand=False).flatten().tolist(),
            repeat=node["value"].numel(),
        )
        for name, node in discrete.items()
    }
    for states in itertools.product(*cells.values()):
        given = {
            name: torch.tensor(cell).to(discrete[name]["value"]).view(discrete[name]["value"].shape)
            for name, cell in zip(cells, states, strict=True)
        }
        yield joint(given)[0]


def compared(program: Program, thorough: bool, recorded: bool = True) -> str:
    """What disagrees about one model; nothing where all agrees.

    Args:
        program: The model.
        thorough: Whether to compare C, and a fit with its file, too.
        recorded: Whether to compare replays of a recording.
    """
    model = vi.Model(program.model, program.data)
    density = Density(model)
    generator = torch.Generator().manual_seed(program.seed)
    z = 0.7 * torch.randn(POINTS, density.dim, generator=generator, dtype=torch.float64)
    problem = _density_problem(program, density, z)
    if recorded and not problem:
        problem = _recording_problem(density, z, thorough)
    return problem or (_file_problem(model, program.seed) if thorough else "")


def _density_problem(program: Program, density: Density, z: Tensor) -> str:
    index, sites = {}, density.block.unpack(z)
    if program.subsampled:
        order = torch.Generator().manual_seed(program.seed)
        rows = torch.randperm(program.sizes[A], generator=order)[: program.subsampled[A]]
        index = {A: rows}
        for site in density.latents:
            if any(plate.name == A for plate in site.plates):
                axis = 1 + len(site.batch_shape) - 1
                sites[site.name] = sites[site.name].index_select(axis, rows)
    found = density.terms(sites, index=index, jacobian=False).total()
    for k in range(POINTS):
        visits, _ = density.visits({n: v[k : k + 1] for n, v in sites.items()}, index)
        values = {site.name: visits[site.name].value for site in density.latents}
        expected = in_pyro(program, values, index) + _idle(density, sites, visits, k)
        if not _close(float(found[k]), expected):
            return f"log density {float(found[k])!r}, in Pyro's trace {expected!r}"
    return ""


def _idle(
    density: Density, sites: Mapping[str, Tensor], visits: Mapping[str, Any], k: int
) -> float:
    """The standard normal that an `obs_mask` latent has where the row was observed."""
    total = 0.0
    for site in density.latents:
        mask = visits[site.name].mask
        if site.name.endswith("_unobserved") and isinstance(mask, Tensor):
            z = sites[site.name][k]
            idle = -0.5 * z.square() - 0.5 * np.log(2 * np.pi)
            # Scaled like a Jacobian, with the rows of its plates.
            scale = math.prod((f.full_size or f.size) / f.size for f in visits[site.name].frames)
            total += float(torch.where(mask, 0.0, idle).sum() * scale)
    return total


def _recording_problem(density: Density, z: Tensor, in_c: bool) -> str:
    gradients = Gradients(density, patience=0)
    for points in (z, z[:1]) if in_c else (z,):
        expected = density.log_prob_and_grad(points)
        for a, b in zip(gradients(points), expected, strict=True):
            if not torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True):
                return f"a replay of the recording ({gradients.how(len(points))}) differs"
    if not in_c or not gradients.to_c(10**7, z[0].numpy()):
        return ""
    for point in z:
        value, gradient = gradients.at(point.numpy())
        expected = density.log_prob_and_grad(point.unsqueeze(0))
        if not _close(value, float(expected[0])) or not np.allclose(
            gradient, expected[1][0].numpy(), rtol=1e-7, atol=1e-7
        ):
            return f"in C {value!r}, eager {float(expected[0])!r}"
    return ""


def _file_problem(model: vi.Model, seed: int) -> str:
    posterior = vi.fit(model, "mean_field", seed=seed, budget=2.0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "posterior.nc"
        posterior.save(path)
        loaded = vi.load(path, model)
    one, other = posterior.sample(20, seed=1), loaded.sample(20, seed=1)
    for name, draws in one.items():
        if not np.array_equal(draws, other[name], equal_nan=draws.dtype.kind == "f"):
            return f"draws of {name!r} differ after save and load"
    return ""


def _close(found: float, expected: float) -> bool:
    if not np.isfinite(expected):
        return found == expected or (np.isnan(found) and np.isnan(expected))
    return abs(found - expected) <= TOLERANCE * max(1.0, abs(expected))


def problem_of(seed: int, thorough: bool, recorded: bool = True) -> str:
    """What is wrong with the model of a seed, and its statements; nothing where all is right."""
    program = Grammar(seed).program()
    try:
        problem = compared(program, thorough, recorded)
    except Exception as error:  # noqa: BLE001  whatever is raised about a sound model is a finding
        problem = f"{type(error).__name__}: {error}"
    return f"{problem}\n{program}" if problem else ""


def main(arguments: list[str] | None = None) -> int:
    """Compare as many models as asked for; the exit code says whether all agree."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--every", type=int, default=EVERY, help="of these, C and files")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    began, found = time.perf_counter(), 0
    for seed in range(options.first, options.first + options.count):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            problem = problem_of(seed, seed % options.every == 0)
        if problem:
            found += 1
            print(f"DISAGREES: {problem}\n", flush=True)
        if (seed + 1 - options.first) % 50 == 0:
            print(f"{seed + 1 - options.first} models so far", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - began
    print(f"{options.count} models, {found} disagree, {seconds:.0f} s")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
