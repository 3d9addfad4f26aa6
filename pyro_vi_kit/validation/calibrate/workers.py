"""The simulations of a calibration, one after another or spread over processes.

Threads would share Python's lock, which a fit of a small model holds most of the time. A process costs
some seconds of imports, so it is started only where more than these are left to do. What a simulation
gives depends on its number alone, and so on neither.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from torch import Tensor

from pyro_vi_kit.capture.turns import SIDE_BY_SIDE
from pyro_vi_kit.core.errors import ModelError, ViError, first_line
from pyro_vi_kit.core.progress import Progress
from pyro_vi_kit.core.runtime import one_thread
from pyro_vi_kit.validation.calibrate.simulating import Simulations
from pyro_vi_kit.validation.calibrate.trial import Result, Trial

# Seconds: what is known of the pace by then is enough, and starting processes costs about a third.
_LOOK, _WORTHWHILE = 3.0, 20.0
# So many failures in a row from the first are the model's or the guide's, and not the data's.
_FIRST = 5
_LARGEST_CHUNK = 10
# Seconds between two looks at whether the parent is there.
_WATCH = 0.2


class _Run:
    """A calibration under way.

    Args:
        trial: What all simulations share.
        simulations: N data sets and truths.
        references: Points to measure distances from, `[N, D]`.
        progress: Told each one that is done.
    """

    def __init__(
        self, trial: Trial, simulations: Simulations, references: Tensor, progress: Progress
    ) -> None:
        self.trial = trial
        self.simulations = simulations
        self.references = references
        self.progress = progress
        self.results: dict[int, Result] = {}

    @property
    def left(self) -> list[int]:
        """Numbers of those that are not done."""
        return [i for i in range(len(self.simulations)) if i not in self.results]

    def here(self, number: int) -> None:
        """Do one in this process."""
        reference = self.references[number]
        self.add(number, self.trial.run(number, self.simulations, number, reference))

    def add(self, number: int, result: Result) -> None:
        """Take note of one that is done.

        Raises:
            ModelError: If all of the first ones failed.
        """
        self.results[number] = result
        errors = [found.error for found in self.results.values()]
        if len(errors) == min(_FIRST, len(self.simulations)) and all(errors):
            raise ModelError(
                f"the first {len(errors)} fits to simulated data all failed ({errors[0]}): look at data "
                "drawn from the prior, which may be far from any that the model can be fitted to"
            )
        failed = sum(map(bool, errors))
        self.progress.step(words=f"{failed} failed" if failed else None)


def run_all(
    trial: Trial,
    simulations: Simulations,
    references: Tensor,
    jobs: int | None,
    progress: Progress,
) -> tuple[list[Result | None], int, bool]:
    """The result of each simulation, the number of processes, and whether the user interrupted.

    The results that were to come then are None.

    Args:
        trial: What all simulations share.
        simulations: N data sets and truths.
        references: Points to measure distances from, `[N, D]`.
        jobs: Processes; None for as many as there are cores, once that is seen to pay.
        progress: Told each one that is done.

    Raises:
        ModelError: If all of the first ones failed.
        OptionError: If the guide or an option cannot work on this model.
    """
    run = _Run(trial, simulations, references, progress)
    used, interrupted = 1, False
    try:
        with one_thread():
            used = _all(run, jobs)
    except KeyboardInterrupt:
        interrupted = True
    return [run.results.get(i) for i in range(len(simulations))], used, interrupted


def _all(run: _Run, jobs: int | None) -> int:
    """Do those that are left; in how many processes."""
    if jobs is None or jobs == 1:
        _in_turn(run, look=jobs is None)
    if not run.left:
        return 1
    used = _cores() if jobs is None else min(jobs, len(run.left))
    problem = _spread(run, used)
    if problem:
        warnings.warn(
            f"the fits are done one after another, since the model cannot be sent to other processes: "
            f"{problem}",
            UserWarning,
            stacklevel=6,
        )
        _in_turn(run, look=False)
        return 1
    return used


def _in_turn(run: _Run, *, look: bool) -> None:
    """One after another; where they ``look``, until it is seen that processes would pay."""
    started = time.monotonic()
    for done, number in enumerate(run.left, start=1):
        run.here(number)
        elapsed = time.monotonic() - started
        if look and elapsed > _LOOK:
            to_come = elapsed / done * len(run.left)
            if to_come > _WORTHWHILE and _cores() > 1:
                return


def _spread(run: _Run, jobs: int) -> str:
    """In processes of their own; why that is not possible, where it is not."""
    import cloudpickle
    import joblib

    try:
        with _by_value(_module_of(run.trial), cloudpickle):
            payload = cloudpickle.dumps(run.trial)
    except Exception as error:  # noqa: BLE001  whatever an object says when it is pickled
        return f"{type(error).__name__}: {first_line(error)}"
    left = run.left
    size = max(1, min(_LARGEST_CHUNK, len(left) // (4 * jobs)))
    chunks = [left[i : i + size] for i in range(0, len(left), size)]
    calls = (
        joblib.delayed(_chunk)(
            os.getpid(),
            payload,
            numbers,
            run.simulations.rows(numbers),
            run.references[numbers].clone(),
        )
        for numbers in chunks
    )
    try:
        with joblib.parallel_config(backend="loky", n_jobs=jobs, inner_max_num_threads=1):
            parallel: Any = joblib.Parallel(return_as="generator_unordered", pre_dispatch="n_jobs")
            for found in parallel(calls):
                for number, result in found:
                    run.add(number, result)
    except ViError:
        raise
    except Exception as error:  # noqa: BLE001  a model that does not arrive, a process that dies
        return f"{type(error).__name__}: {first_line(error)}"
    return ""


def _chunk(
    parent: int,
    payload: bytes,
    numbers: list[int],
    simulations: Simulations,
    references: Tensor,
) -> list[tuple[int, Result]]:
    """Some simulations, in another process than the ``parent`` that asks for them."""
    _end_with(parent)
    os.environ[SIDE_BY_SIDE] = "1"
    trial = _loaded(payload)
    with one_thread():
        return [
            (number, trial.run(number, simulations, row, references[row]))
            for row, number in enumerate(numbers)
        ]


@functools.cache
def _end_with(parent: int) -> None:
    """Have this process end when the one that started it is gone, however and how early that ended."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent watch").start()


@functools.lru_cache(maxsize=1)
def _loaded(payload: bytes) -> Trial:
    """What was sent; kept, since its recordings serve all that this process does."""
    import pickle

    return pickle.loads(payload)


def _cores() -> int:
    import joblib

    return joblib.cpu_count()


def _module_of(trial: Trial) -> ModuleType | None:
    """The module of the model, or of the fitter's, that another process could not import."""
    fn: Any = trial.observing.model.fn if trial.fitter is None else trial.fitter
    for candidate in (trial.observing.model.fn, fn):
        name = getattr(candidate, "__module__", None) or type(candidate).__module__
        top = name.partition(".")[0]
        found = importlib.machinery.PathFinder.find_spec(top)
        if name != "__main__" and found is None and top not in sys.builtin_module_names:
            return sys.modules.get(name)
    return None


@contextlib.contextmanager
def _by_value(module: ModuleType | None, cloudpickle: Any) -> Iterator[None]:
    """Have a module's functions sent whole, as those of ``__main__`` are."""
    if module is None:
        yield
        return
    cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        cloudpickle.unregister_pickle_by_value(module)
