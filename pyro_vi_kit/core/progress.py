"""Progress of long work, on stderr: rate, bound and time left."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

# Work of less than this, in seconds, is not worth a bar.
_DELAY = 0.5
_COUNT = "{desc}: {n_fmt} evaluations [{elapsed}, {rate_fmt}{postfix}]"
# Most fits stop before their largest number of steps.
_BAR = "{desc}: {n_fmt} steps [{elapsed}, at most {remaining} left, {rate_fmt}{postfix}]"
# Where it is known how much there is to do.
_KNOWN = "{desc}: {n_fmt} of {total_fmt} {unit} [{elapsed}, {remaining} left{postfix}]"


class Progress:
    """A progress bar that knows the bound.

    Args:
        label: What is being done.
        total: Steps at the most; the time left is an upper bound where work may stop early.
        enabled: Show it; None shows it on a terminal only.
        unit: What ``total`` counts, where all of them will be done.
    """

    def __init__(
        self,
        label: str,
        total: int | None = None,
        enabled: bool | None = None,
        *,
        unit: str | None = None,
    ) -> None:
        self._bar: Any = None
        if sys.stderr.isatty() if enabled is None else enabled:
            from tqdm import tqdm

            self._bar = tqdm(
                desc=label,
                total=total,
                leave=False,
                file=sys.stderr,
                delay=_DELAY,
                unit=unit or "it",
                bar_format=_KNOWN if unit else _COUNT if total is None else _BAR,
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def step(self, bound: float | None = None, steps: int = 1, words: str | None = None) -> None:
        """So many more steps are done; ``bound`` in nats, or ``words`` in its place."""
        if self._bar is None:
            return
        if words is None and bound is not None:
            words = f"bound {bound:.2f} nats"
        if words is not None:
            self._bar.set_postfix_str(words, refresh=False)
        self._bar.update(steps)

    def line(self, text: str) -> None:
        """A line that stays, where a bar would leave nothing behind: in a log, not on a terminal."""
        if self._bar is not None and not sys.stderr.isatty():
            self._bar.write(text, file=sys.stderr)
