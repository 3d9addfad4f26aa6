"""NUTS by nutpie: the chains are written in Rust and call back for the log density.

Where the density is compiled to C they call it at its address, without Python's lock. nutpie has this
for PyMC's compiled models alone, in classes that it does not document. They are used only where a
release is one of those that this was written for, its signatures are what they were, and its chains go
where those of nutpie's public interface go, to the last digit; that is looked at once. All others get
the density through Python.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from pyro_vi_kit.capture import CDensity
from pyro_vi_kit.core.errors import MissingDependencyError, ModelError, first_line
from pyro_vi_kit.core.export import datasets, import_arviz
from pyro_vi_kit.core.progress import Progress
from pyro_vi_kit.validation.nuts.target import Draws, Plan, Target

_POLL_SECONDS = 0.1

# ArviZ's name of each statistic, and the names that nutpie has had for it.
_STATS = {
    "lp": ("logp", "lp"),
    "diverging": ("diverging",),
    "energy": ("energy",),
    "energy_error": ("energy_error",),
    "tree_depth": ("depth", "tree_depth"),
    "reached_max_treedepth": ("maxdepth_reached", "reached_max_treedepth"),
    "n_steps": ("n_steps",),
    "acceptance_rate": ("mean_tree_accept", "acceptance_rate"),
    "step_size": ("step_size",),
    "step_size_bar": ("step_size_bar",),
}

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


def import_nutpie() -> ModuleType:
    """The ``nutpie`` package.

    Raises:
        MissingDependencyError: If it is not installed.
    """
    import_arviz()  # nutpie imports it too, and would let its announcement through
    try:
        import nutpie
    except ImportError as error:
        raise MissingDependencyError(
            "sampler='nutpie' needs nutpie: pip install 'pyro_vi_kit[nuts]', or use "
            "sampler='pyro', which is slower"
        ) from error
    return nutpie


def sample(target: Target, plan: Plan, progress: Progress) -> Draws:
    """Run nutpie's chains in its threads, from this thread.

    Raises:
        ModelError: If the model raised, or no chain could start.
        KeyboardInterrupt: As soon as the chains have stopped, if there is next to no draw of them.
    """
    nutpie = import_nutpie()
    sampler = nutpie.sample(
        _model(nutpie, target, _starts(target)),
        chains=plan.chains,
        draws=plan.draws,
        tune=plan.tune,
        seed=plan.seed,
        cores=plan.cores,
        target_accept=plan.target_accept,
        # On correlated posteriors a third of the gradients; on others no more than without.
        low_rank_modified_mass_matrix=True,
        save_warmup=False,
        progress_bar=False,
        blocking=False,
    )
    try:
        return _draws(_wait(sampler, target, progress))
    except KeyboardInterrupt:
        target.stop()
        found = _so_far(sampler)
        if found is None:
            raise
        return found
    except BaseException:
        target.stop()
        sampler.cancel()
        raise


def _draws(tree: Any) -> Draws:
    groups = datasets(tree)
    return Draws(groups["posterior"][VARIABLE].to_numpy(), _stats(groups["sample_stats"]))


def _so_far(sampler: Any) -> Draws | None:
    """What chains have come to that are stopped now; None where that is too little, or not told."""
    try:
        return _draws(sampler.abort()).rectangle()
    except Exception:  # noqa: BLE001  nutpie has no draws yet, or is of a release that does not give them
        return None


def _starts(target: Target) -> Callable[[int], np.ndarray]:
    """Starting points by seed, for threads of nutpie's, which must not be shown an exception."""

    def start(seed: int) -> np.ndarray:
        try:
            return target.start(seed)
        except ModelError as error:
            # `Target.check` tells the thread that waits.
            target.error = target.error or error
            target.stop()
            return np.zeros(target.density.dim)

    return start


def _wait(sampler: Any, target: Target, progress: Progress) -> Any:
    """Wait for the chains, showing how far they are; returns nutpie's ArviZ object."""
    shown = 0
    while True:
        try:
            tree = sampler.wait(timeout=_POLL_SECONDS)
        except TimeoutError:
            target.check()
        except Exception as error:
            target.check()
            raise ModelError(f"nutpie could not sample the model: {first_line(error)}") from error
        else:
            target.check()
            return tree
        for _ in range(target.draws - shown):
            progress.step()
        shown = target.draws


def _stats(dataset: Any) -> dict[str, np.ndarray]:
    """The statistics of nutpie's that ArviZ has a name for, `[chains, draws]` each."""
    stats = {}
    for name, aliases in _STATS.items():
        found = next((alias for alias in aliases if alias in dataset), None)
        if found is not None:
            values = dataset[found].to_numpy()
            stats[name] = values.astype(np.int64) if values.dtype.kind == "u" else values
    return stats


# -- the density as a model of nutpie's -------------------------------------------------------


def impossible(nutpie: ModuleType, dim: int, density: CDensity) -> str:
    """Why this nutpie is not given addresses, tried with a density in C; empty where it is."""
    if id(nutpie) not in _found:
        _found[id(nutpie)] = _unknown(nutpie) or _differs(nutpie, dim, density)
    return _found[id(nutpie)]


def by_address(nutpie: ModuleType, dim: int, density: CDensity, start: Start) -> Any:
    """A density in C as a model of a nutpie that takes addresses; ``start`` gives points by seed."""
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
    """A density `[D]` to value and gradient as a model of nutpie's public interface, told each draw."""

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


def _model(nutpie: ModuleType, target: Target, start: Start) -> Any:
    """The target as a model of nutpie's: by its address where it is in C and that works.

    It is told where it is in C and Python is called all the same.
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
