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
import pickle
import sys
import threading
import time
import warnings
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from pyro_vi_kit.capture.turns import SIDE_BY_SIDE
from pyro_vi_kit.core.errors import ModelError, ViError, first_line
from pyro_vi_kit.core.progress import Progress
from pyro_vi_kit.core.runtime import one_thread
from pyro_vi_kit.validation.calibrate.simulation import DataSets, Result, Simulation

# Seconds: what is known of the pace by then is enough, and starting processes costs about a third.
_LOOK, _WORTHWHILE = 3.0, 20.0
# So many failures in a row from the first are the model's or the guide's, and not the data's.
_FIRST = 5
_LARGEST_CHUNK = 10
# Seconds between two looks at whether the parent is there.
_WATCH = 0.2


@dataclass(eq=False)
class Run:
    """A calibration under way, or done.

    Attributes:
        simulation: What all simulations share.
        data_sets: N data sets and truths.
        progress: Told each one that is done.
        results: By number.
        jobs: Processes that worked on it.
        interrupted: Whether the user interrupted, so that some results are missing.
    """

    simulation: Simulation
    data_sets: DataSets
    progress: Progress
    results: dict[int, Result] = field(default_factory=dict)
    jobs: int = 1
    interrupted: bool = False

    @property
    def left(self) -> list[int]:
        """Numbers of those that are not done."""
        return [row for row in range(len(self.data_sets)) if row not in self.results]

    def all(self, jobs: int | None) -> None:
        """Do them all, or until the user interrupts.

        Args:
            jobs: Processes; None for as many as there are cores, once that is seen to pay.

        Raises:
            ModelError: If all of the first ones failed.
            OptionError: If the guide or an option cannot work on this model.
        """
        try:
            with one_thread():
                if jobs is None or jobs == 1:
                    self.in_turn(look=jobs is None)
                if self.left:
                    self.spread(_cores() if jobs is None else min(jobs, len(self.left)))
        except KeyboardInterrupt:
            self.interrupted = True

    def one(self, row: int) -> None:
        """Do one in this process."""
        self.add(row, self.simulation.run(self.data_sets, row))

    def in_turn(self, *, look: bool) -> None:
        """One after another; where they ``look``, until it is seen that processes would pay."""
        started = time.monotonic()
        for done, row in enumerate(self.left, start=1):
            self.one(row)
            elapsed = time.monotonic() - started
            to_come = elapsed / done * len(self.left)
            if look and elapsed > _LOOK and to_come > _WORTHWHILE and _cores() > 1:
                return

    def spread(self, jobs: int) -> None:
        """In processes of their own; in this one where that is not possible."""
        self.jobs = jobs
        problem = self._in_processes()
        if problem:
            warnings.warn(
                f"the fits are done one after another, since the model cannot be sent to other "
                f"processes: {problem}",
                UserWarning,
                stacklevel=6,
            )
            self.jobs = 1
            self.in_turn(look=False)

    def _in_processes(self) -> str:
        """Why that is not possible, where it is not."""
        import joblib

        left = self.left
        size = max(1, min(_LARGEST_CHUNK, len(left) // (4 * self.jobs)))
        chunks = [left[i : i + size] for i in range(0, len(left), size)]
        try:
            payload = _pickled(self.simulation)
            with joblib.parallel_config(backend="loky", n_jobs=self.jobs, inner_max_num_threads=1):
                parallel: Any = joblib.Parallel(
                    return_as="generator_unordered", pre_dispatch="n_jobs"
                )
                calls = (
                    joblib.delayed(_chunk)(os.getpid(), payload, self.data_sets.rows(rows))
                    for rows in chunks
                )
                for found in parallel(calls):
                    for row, result in found:
                        self.add(row, result)
        except ViError:
            raise
        except Exception as error:  # noqa: BLE001  a model that cannot be sent, a process that dies
            return f"{type(error).__name__}: {first_line(error)}"
        return ""

    def add(self, row: int, result: Result) -> None:
        """Take note of one that is done.

        Raises:
            ModelError: If all of the first ones failed.
        """
        self.results[row] = result
        errors = [found.error for found in self.results.values()]
        if len(errors) == min(_FIRST, len(self.data_sets)) and all(errors):
            raise ModelError(
                f"the first {len(errors)} fits to simulated data all failed ({errors[0]}): look at data "
                "drawn from the prior, which may be far from any that the model can be fitted to"
            )
        failed = sum(map(bool, errors))
        self.progress.step(words=f"{failed} failed" if failed else None)


def _chunk(parent: int, payload: bytes, data_sets: DataSets) -> list[tuple[int, Result]]:
    """Some simulations, in another process than the ``parent`` that asks for them."""
    _end_with(parent)
    os.environ[SIDE_BY_SIDE] = "1"
    simulation = _loaded(payload)
    with one_thread():
        numbers = enumerate(data_sets.numbers)
        return [(number, simulation.run(data_sets, row)) for row, number in numbers]


@functools.cache
def _end_with(parent: int) -> None:
    """Have this process end when the one that started it is gone, however and how early that ended."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent watch").start()


@functools.lru_cache(maxsize=1)
def _loaded(payload: bytes) -> Simulation:
    """What was sent; kept, since its recordings serve all that this process does."""
    return pickle.loads(payload)


def _cores() -> int:
    import joblib

    return joblib.cpu_count()


def _pickled(simulation: Simulation) -> bytes:
    """The simulation; what is of a module that others cannot import is sent whole, as ``__main__``'s."""
    import cloudpickle

    users = (simulation.simulated.model.fn, simulation.fitter, simulation.guide)
    with contextlib.ExitStack() as stack:
        for part in (*users, simulation.options["objective"]):
            module = sys.modules.get(getattr(part, "__module__", None) or type(part).__module__)
            if module is not None and not _importable(module):
                cloudpickle.register_pickle_by_value(module)
                stack.callback(cloudpickle.unregister_pickle_by_value, module)
        return cloudpickle.dumps(simulation)


def _importable(module: ModuleType) -> bool:
    top = module.__name__.partition(".")[0]
    found = importlib.machinery.PathFinder.find_spec(top)
    return top == "__main__" or top in sys.builtin_module_names or found is not None
