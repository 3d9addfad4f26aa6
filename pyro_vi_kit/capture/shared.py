"""One recording for many data sets: what depends on data alone is computed once for each of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pyro_vi_kit.capture.graph import Graph
from pyro_vi_kit.capture.hoist import hoisted
from pyro_vi_kit.capture.program import Function, Program, same
from pyro_vi_kit.capture.recorder import CaptureError, record
from pyro_vi_kit.core.runtime import LOCK, RandomStream

Held = Sequence[Tensor]


class SharedProgram:
    """A captured function whose held inputs may be exchanged for others of the same shapes.

    It is never compiled: which call is the first compiled one would depend on the clock, and so would
    the last digits of everything behind it.

    Args:
        function: From changing inputs, then held ones, to a sequence of tensors.
        inputs: An example of the changing inputs.
        held: Held inputs to record on.
        checks: Other changing inputs, each with other held ones: the recording has to agree there.

    Raises:
        CaptureError: If the function cannot be recorded, or a replay differs: where Python looks at held
            tensors, for one.
    """

    def __init__(
        self,
        function: Function,
        inputs: Sequence[Tensor],
        held: Held,
        checks: Iterable[tuple[Sequence[Tensor], Held]],
    ) -> None:
        with LOCK, torch.enable_grad():
            with RandomStream(0):
                self._whole: Graph = record(function, [*inputs, *held])
            self._changing, self._count = len(inputs), len(held)
            late, rest = hoisted(self._whole, len(inputs), held)
            self._rest = late.inputs[len(inputs) : len(inputs) + len(rest)]
            kept = set(map(id, late.nodes))
            self._early = [node for node in self._whole.nodes if id(node) not in kept]
            with RandomStream(0), torch.no_grad():
                example = [*inputs, *rest, *late.draw_noise()]
                self._program = Program(late, example, compiles=False)
            for seed, (other, data) in enumerate(checks, start=1):
                self._require_agreement(function, other, data, seed)

    @property
    def how(self) -> str:
        """What replays it: see `Program.how`."""
        return self._program.how

    @property
    def note(self) -> str:
        """See `Program.note`."""
        return self._program.note

    def expect(self, calls: int, inputs: Sequence[Tensor]) -> bool:
        """See `Program.expect`: no compiler is at work on it."""
        return self._program.expect(calls, inputs)

    def stop(self) -> None:
        """See `Program.stop`: there is nothing to stop."""

    def holding(self, held: Held) -> list[Tensor]:
        """What `__call__` takes behind the changing inputs for these held ones."""
        names = self._whole.inputs[self._changing : self._changing + self._count]
        known = dict(zip(names, held, strict=True)) | self._whole.constants
        with torch.no_grad():
            for node in self._early:
                result = node.run(known)
                known.update(zip(node.outputs, result if node.many else [result], strict=True))
        return [known[name] for name in self._rest]

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor]:
        """The function's results at changing inputs, and at what `holding` gave."""
        return self._program(*tensors)

    def _require_agreement(
        self, function: Function, inputs: Sequence[Tensor], held: Held, seed: int
    ) -> None:
        with RandomStream(seed):
            expected = function(*inputs, *held)
        with RandomStream(seed), torch.no_grad():
            found = self(*inputs, *self.holding(held))
        if not all(same(a, b) for a, b in zip(expected, found, strict=True)):
            raise CaptureError("a replay of the recording on other data differs from the model")
