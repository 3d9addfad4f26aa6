"""nutpie on a density in C: chains run without Python's lock, and call an address.

nutpie has this for PyMC's compiled models alone, in classes that it does not document. Where they are
not as they were when this was written, nutpie gets the density through Python, as any version takes it.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from pyro_vi_kit.capture import CDensity
from pyro_vi_kit.sampling.target import Target

# The name of the one variable: the flat unconstrained point.
VARIABLE = "z"
# The release whose functions are called with the C signatures of `capture/in_c/density.py`.
_RELEASE = "0.16."
_SIGNATURES = {
    "LogpFunc": "(ptr, user_data_ptr, keep_alive)",
    "ExpandFunc": "(dim, expanded_dim, ptr, user_data_ptr, keep_alive)",
    "PyMcModel": (
        "(density, expand, variables, dim, dim_sizes, coords, init_func, transform_adapter)"
    ),
}


def model(nutpie: ModuleType, target: Target, start: Callable[[int], np.ndarray]) -> Any:
    """The target as a model of nutpie's, or None where it is not in C or nutpie is of another form.

    Args:
        nutpie: The package.
        target: What to sample.
        start: Starting points `[D]` by seed.
    """
    density = target.gradients.in_c
    if density is None or not _as_known(nutpie):
        return None
    try:
        made = _model(nutpie, target.density.dim, density, start)
        made._make_model(None)
    except (AttributeError, TypeError, ValueError):
        return None
    return made


def _as_known(nutpie: ModuleType) -> bool:
    """Whether nutpie's own classes are those that this module knows."""
    rust = getattr(nutpie, "_lib", None)
    signatures = {
        name: getattr(getattr(rust, name, None), "__text_signature__", None) for name in _SIGNATURES
    }
    release = str(getattr(nutpie, "__version__", ""))
    return release.startswith(_RELEASE) and signatures == _SIGNATURES


def _model(
    nutpie: ModuleType, dim: int, density: CDensity, start: Callable[[int], np.ndarray]
) -> Any:
    """An object of a subclass of nutpie's, which can be had where nutpie is."""
    rust = nutpie._lib

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

        def _make_sampler(
            self, settings: Any, init_mean: Any, cores: int, progress_type: Any, store: Any
        ) -> Any:
            made = self._make_model(init_mean)
            return rust.PySampler.from_pymc(settings, cores, made, progress_type, store)

    return Addressed(dims={})
