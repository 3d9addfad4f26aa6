"""nutpie on a density in C: chains run without Python's lock, and call an address.

nutpie has this for PyMC's compiled models alone, in classes that it does not document. They are used
only where a release is one of those that this was written for, its signatures are what they were, and
its chains go where those of nutpie's public interface go, to the last digit; that is looked at once. All
others get the density through Python.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from pyro_vi_kit.capture import CDensity
from pyro_vi_kit.core.errors import first_line
from pyro_vi_kit.core.export import datasets
from pyro_vi_kit.validation.nuts.target import Target

# The name of the one variable: the flat unconstrained point.
VARIABLE = "z"
# Releases whose functions are called with the C signatures of `capture/in_c/density.py`, which Python
# cannot ask for.
_RELEASES = tuple(f"0.16.{number}" for number in range(12))
_SIGNATURES = {
    "LogpFunc": "(ptr, user_data_ptr, keep_alive)",
    "ExpandFunc": "(dim, expanded_dim, ptr, user_data_ptr, keep_alive)",
    "PyMcModel": (
        "(density, expand, variables, dim, dim_sizes, coords, init_func, transform_adapter)"
    ),
}
_PROBE = {"chains": 1, "draws": 10, "tune": 30, "seed": 0, "cores": 1, "progress_bar": False}

Start = Callable[[int], np.ndarray]
# What looking came to, by the package that was looked at.
_found: dict[int, str] = {}


def impossible(nutpie: ModuleType, dim: int, density: CDensity) -> str:
    """Why this nutpie is not given addresses; empty where it is.

    Args:
        nutpie: The package.
        dim: Of the unconstrained space.
        density: A density there to try it with.
    """
    if id(nutpie) not in _found:
        _found[id(nutpie)] = _unknown(nutpie) or _differs(nutpie, dim, density)
    return _found[id(nutpie)]


def by_address(nutpie: ModuleType, dim: int, density: CDensity, start: Start) -> Any:
    """A density in C as a model of nutpie's.

    Args:
        nutpie: The package, one that takes addresses.
        dim: Of the unconstrained space.
        density: What to sample.
        start: Starting points `[D]` by seed.
    """
    rust = nutpie._lib

    # An object of a subclass of nutpie's, which can be had where nutpie is.
    class Addressed(nutpie.compiled_pyfunc.CompiledModel):
        @property
        def n_dim(self) -> int:
            return dim

        @property
        def shapes(self) -> dict[str, tuple[int, ...]]:
            return {VARIABLE: (dim,)}

        @property
        def coords(self) -> dict[str, Any]:
            return {}

        def _make_model(self, init_mean: Any) -> Any:
            # The last argument keeps the density alive for as long as Rust may call it.
            state = density.state_address
            logp = rust.LogpFunc(density.log_density, state, density)
            expand = rust.ExpandFunc(dim, dim, density.keep_draw, state, density)
            sizes: dict[str, int] = {}  # to which nutpie adds the dimensions of the variable
            variables = rust.PyVariable.new_variables([VARIABLE], ["float64"], [(dim,)], sizes, {})
            return rust.PyMcModel(logp, expand, variables, dim, sizes, {}, start, None)

        def _make_sampler(self, settings: Any, init_mean: Any, cores: int, *others: Any) -> Any:
            # What follows differs between releases, and is handed on as it comes.
            made = self._make_model(init_mean)
            return rust.PySampler.from_pymc(settings, cores, made, *others)

    return Addressed(dims={})


def through_python(
    nutpie: ModuleType, dim: int, logp: Callable[..., Any], start: Start, drawn: Callable[[], None]
) -> Any:
    """A density as a model of nutpie's by its public interface.

    Args:
        nutpie: The package.
        dim: Of the unconstrained space.
        logp: From a point `[D]` to its log density and gradient.
        start: Starting points `[D]` by seed.
        drawn: Told each draw.
    """

    def expand(point: np.ndarray) -> dict[str, np.ndarray]:
        drawn()
        return {VARIABLE: point}

    # As nutpie's documentation has it: the submodule comes with the package.
    return nutpie.compiled_pyfunc.from_pyfunc(
        ndim=dim,
        make_logp_fn=lambda: logp,
        make_expand_fn=lambda seed1, seed2, chain: expand,
        expanded_dtypes=[np.dtype("float64")],
        expanded_shapes=[(dim,)],
        expanded_names=[VARIABLE],
        make_initial_point_fn=start,
    )


def model(nutpie: ModuleType, target: Target, start: Start) -> Any:
    """The target as a model of nutpie's: by its address where it is in C and that works.

    Args:
        nutpie: The package.
        target: What to sample. It is told where it is in C and Python is called all the same.
        start: Starting points `[D]` by seed.
    """
    dim, density = target.density.dim, target.gradients.in_c
    if density is not None:
        reason = impossible(nutpie, dim, density)
        if not reason:
            return by_address(nutpie, dim, density, start)
        target.note = f"called through Python: {reason}"

    def drawn() -> None:
        target.counted += 1

    return through_python(nutpie, dim, target, start, drawn)


def _unknown(nutpie: ModuleType) -> str:
    """In what nutpie's own classes are not those that this module knows."""
    release = str(getattr(nutpie, "__version__", "?"))
    if release not in _RELEASES:
        return f"nutpie {release} is none of {_RELEASES[0]} to {_RELEASES[-1]}"
    rust = getattr(nutpie, "_lib", None)
    signatures = {
        name: getattr(getattr(rust, name, None), "__text_signature__", None) for name in _SIGNATURES
    }
    if signatures != _SIGNATURES:
        return f"nutpie {release} has other classes"
    # Made from an address as from Python functions: the sampler's own arguments are the same.
    sampler = getattr(rust, "PySampler", None)
    made = [
        getattr(getattr(sampler, name, None), "__text_signature__", None)
        for name in ("from_pymc", "from_pyfunc")
    ]
    own = getattr(nutpie.compiled_pyfunc, "PyFuncModel", None)
    arguments = list(inspect.signature(own._make_sampler).parameters)[3:] if own else []
    wanted = f"(settings, {', '.join(arguments).replace('cores, ', 'cores, model, ', 1)})"
    if made != [wanted, wanted]:
        return f"nutpie {release} makes samplers otherwise"
    return ""


def _differs(nutpie: ModuleType, dim: int, density: CDensity) -> str:
    """In what chains at an address are not those of the public interface, on a standard normal."""
    normal = density.stopped()

    def start(seed: int) -> np.ndarray:
        return np.linspace(0.5, 1.5, dim)  # newer releases do not start where a slope is zero

    def logp(x: np.ndarray) -> tuple[float, np.ndarray]:
        return normal.at(x)

    try:
        known = through_python(nutpie, dim, logp, start, lambda: None)
        ways = (by_address(nutpie, dim, normal, start), known)
        trees = [datasets(nutpie.sample(way, **_PROBE)) for way in ways]
    except Exception as error:  # noqa: BLE001  whatever it is, there is another way
        return f"nutpie {nutpie.__version__}: {type(error).__name__}: {first_line(error)}"
    one, other = (tree["posterior"][VARIABLE].to_numpy() for tree in trees)
    if not np.array_equal(one, other):
        return f"nutpie {nutpie.__version__} draws otherwise at an address"
    return ""
