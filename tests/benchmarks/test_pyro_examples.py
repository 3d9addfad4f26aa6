"""The script behind docs/PYRO_EXAMPLES.md, on a checkout of three small sources."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.pyro_examples import table

ROOT = Path(__file__).parents[2]

SCRIPT = """
import argparse
import pandas as pd
import torch
import pyro
import pyro.distributions as dist
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal


def model(x, y):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)


if __name__ == "__main__":
    words = argparse.ArgumentParser()
    words.add_argument("--steps", type=int)
    steps = words.parse_args().steps
    frame = pd.read_csv("https://somewhere.invalid/rugged_data.csv").dropna()
    x, y = torch.tensor(frame[["rugged", "rgdppc_2000"]].values.T, dtype=torch.float)
    svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(steps):
        svi.step(x, y.log())
"""

CELLS = [
    "%matplotlib inline\n",
    "import torch, pyro\nimport pyro.distributions as dist\nfrom pyro.infer import MCMC, NUTS\n",
    "def branching():\n"
    "    if pyro.sample('u', dist.Normal(0., 1.)) > 0:\n"
    "        pyro.sample('v', dist.Normal(0., 1.))\n",
    "pyro.set_rng_seed(0)\nMCMC(NUTS(branching), num_samples=100).run()\n",
]

FAILS = 'raise RuntimeError("as it is written")\nif __name__ == "__main__":\n    pass\n'


@pytest.fixture
def checkout(tmp_path):
    examples, tutorial = tmp_path / "examples", tmp_path / "tutorial" / "source"
    examples.mkdir()
    tutorial.mkdir(parents=True)
    (tmp_path / "tests").mkdir()
    listed = "CPU_EXAMPLES = ['line.py --steps=1000000']\n"
    (tmp_path / "tests" / "test_examples.py").write_text(listed)
    (examples / "line.py").write_text(SCRIPT)
    (examples / "fails.py").write_text(FAILS)
    cells = [{"cell_type": "code", "source": [cell]} for cell in CELLS]
    (tutorial / "branches.ipynb").write_text(json.dumps({"cells": cells}))
    return tmp_path


def run(pyro, out, *options):
    command = [sys.executable, "-m", "benchmarks.pyro_examples", f"--pyro={pyro}", f"--out={out}"]
    done = subprocess.run(
        [*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_models_are_caught_compared_and_judged(checkout, tmp_path):
    out, page = tmp_path / "out", tmp_path / "table.md"
    told = run(checkout, out, "--ways=check,density,own guide", f"--table={page}")
    found = [row for path in sorted(out.glob("*.jsonl")) for row in table.rows(path)]
    outcomes = {(row["source"], row["way"]): row["outcome"] for row in found}
    line = "examples/line.py --steps=1000000"  # a million steps: all but the first are left out
    assert {outcomes[line, way] for way in ("check", "density", "own guide")} == {"works"}
    assert outcomes["tutorial/branches", "density"] == "refused"
    assert outcomes["examples/fails.py", "source"] == "ended"
    text = page.read_text()
    assert "| `branching` |" in text
    assert "right: stochastic control flow" in text
    assert "as it is written" in text
    assert told.count("\n") == 3
    # Which is what --resume leaves out.
    assert all(map(table.is_complete, out.glob("*.jsonl")))


def test_a_wrong_density_is_told(monkeypatch):
    import pyro
    import pyro.distributions as dist

    import pyro_vi_kit as vi
    from benchmarks.pyro_examples import judge
    from pyro_vi_kit.model.log_density import Density

    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("k", dist.Bernoulli(0.3))

    true = Density.log_prob
    assert judge._density(vi.Model(model))[0] == "works"
    monkeypatch.setattr(Density, "log_prob", lambda *a, **k: true(*a, **k) + 0.1)
    outcome, detail = judge._density(vi.Model(model))
    assert outcome == "wrong"
    assert "by Pyro's own trace" in detail


def test_what_crashes_or_hangs_is_a_finding():
    from benchmarks.pyro_examples.collect import _forked

    def crash():
        os.kill(os.getpid(), signal.SIGKILL)

    def hang():
        while True:
            pass

    assert _forked(lambda: ("works", "well"), 30.0) == ("works", "well")
    assert _forked(crash, 30.0) == ("crash", "signal 9")
    assert _forked(hang, 0.2)[0] == "not ended"


@pytest.mark.slow
def test_a_real_checkout(tmp_path):
    pyro = os.environ.get("PYRO_VI_KIT_PYRO")
    if not pyro:
        pytest.skip("PYRO_VI_KIT_PYRO names no checkout of Pyro")
    run(pyro, tmp_path, "--only=eight_schools", "--ways=check,density")
    found = [row for path in tmp_path.glob("*.jsonl") for row in table.rows(path)]
    assert {row["outcome"] for row in found} == {"works", "ran"}
