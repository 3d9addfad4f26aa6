"""Many fits in one process: what a fit builds goes with it."""

from __future__ import annotations

import gc
import sys
import weakref

import pytest
import torch

from benchmarks import memory
from pyro_vi_kit.capture import replay
from pyro_vi_kit.capture.in_c import CFunction, library
from pyro_vi_kit.capture.recorder import record


def long(x: torch.Tensor) -> list[torch.Tensor]:
    for _ in range(150):
        x = (x.exp() + 1.0).log()
    return [x]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what a process holds now")
def test_a_replay_goes_when_nothing_needs_it():
    """300 operations are 4 MB in TorchScript's own register, which keeps them; here they go."""
    x = torch.ones(3, dtype=torch.float64)
    graph = record(long, [x])
    held = []
    for _ in range(15):
        script = replay.script(replay.python(graph), [x])
        torch.testing.assert_close(script(x)[0], long(x)[0], rtol=0, atol=0)
        del script
        gc.collect()
        held.append(memory.resident_mib())
    assert held[-1] - held[4] < 10.0, held


@pytest.mark.skipif(library.compiler() is None, reason="there is no C compiler")
def test_compiled_code_goes_when_nothing_needs_it(cache, monkeypatch):
    closed = []
    monkeypatch.setattr(library, "_unload", closed.append)
    x = torch.ones(3, dtype=torch.float64)
    function = CFunction(record(lambda x: [x.exp()], [x]), [x])
    gone = weakref.ref(function)
    handle = function._library._handle
    assert function(x)[0][0].item() == pytest.approx(2.718281828)
    del function
    assert gone() is None
    assert closed == [handle]


def test_growth_is_from_the_end_of_the_warm_up():
    rows = [{"fits": 20, "MiB": 100.0}, {"fits": 30, "MiB": 400.0}, {"fits": 60, "MiB": 410.0}]
    assert memory.growth(rows) == pytest.approx(0.025)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what a process holds now")
def test_memory_stays_where_it_is_over_many_fits(capsys):
    assert memory.main(["--fits", "60"]) == 0, capsys.readouterr().out
