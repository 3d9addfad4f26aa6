"""What a first fit in a fresh process has to load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SLOW = (
    "xarray",
    "pandas",
    "arviz",
    "sympy",
    "torch._dynamo",
    "scipy.stats",
    "matplotlib",
    "nutpie",
)


def test_a_fit_loads_nothing_slow():
    code = (
        "import sys\n"
        "import pyro_vi_kit as vi\n"
        "from models.eight_schools import MODEL\n"
        "for guide in ('mean_field', 'full_rank'):\n"
        "    vi.fit(MODEL, guide=guide, progress=False).sample(10)\n"
        f"print([name for name in {SLOW!r} if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_shapes_broadcast_as_torch_has_them():
    import pytest
    import torch

    from pyro_vi_kit.core.runtime import isolated

    cases = [((3,), (2, 1)), ((), (4,)), ((1, 1), (5, 1, 2)), (3, (2, 3)), ((0,), (1,)), ()]
    expected = [torch.broadcast_shapes(*case) for case in cases]
    outer = torch.broadcast_shapes
    with isolated(torch.float64):
        assert [torch.broadcast_shapes(*case) for case in cases] == expected
        for wrong in [((2,), (3,)), ((2, 3), (3, 2))]:
            with pytest.raises(RuntimeError, match="broadcast"):
                torch.broadcast_shapes(*wrong)
    assert torch.broadcast_shapes is outer
