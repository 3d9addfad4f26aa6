"""A little of everything, in an interpreter that has the package installed: what works, as JSON.

    python smoke.py

Run by `benchmarks.versions` in fresh environments; imports nothing of benchmarks/. Every step is told by
itself, so that one that fails does not hide the others.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGES = (
    *("torch", "pyro-ppl", "numpy", "scipy", "pandas", "xarray", "arviz", "h5netcdf", "h5py"),
    *("matplotlib", "tqdm", "click", "joblib", "cloudpickle", "nutpie"),
)

MODEL_FILE = """
import pyro
import pyro.distributions as dist
import torch

import pyro_vi_kit as vi


def line(x, y):
    slope = pyro.sample("slope", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(x @ slope, scale), obs=y)


generator = torch.Generator().manual_seed(0)
x = torch.randn(40, 2, generator=generator)
y = x @ torch.tensor([1.0, -0.5]) + 0.5 * torch.randn(40, generator=generator)
MODEL = vi.Model(line, x, y)
"""


class Smoke:
    """The steps, each of which may need what an earlier one has made.

    Args:
        folder: Where files may be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "line.py"
        self.file.write_text(MODEL_FILE)
        self.made: dict[str, Any] = {}

    def fit(self) -> None:
        """A normal and a flow: a search, and captured steps; both find the slopes."""
        import pyro_vi_kit as vi
        from pyro_vi_kit.model.modelfile import load_model_file

        self.made["model"] = model = load_model_file(self.file)
        for guide in ("full_rank", "affine_coupling"):
            posterior = vi.fit(model, guide=guide, seed=0, progress=False, budget=60.0)
            means = posterior.sample(2000, seed=1)["slope"].mean(0)
            _require(abs(means[0] - 1.0) < 0.4 and abs(means[1] + 0.5) < 0.4, f"slopes {means}")
            verdict = posterior.verdict
            _require(verdict is not None and verdict.level == "good", f"verdict {verdict}")
            self.made[guide] = posterior
        posterior.summary()

    def nuts(self) -> None:
        """The same slopes, from chains that agree."""
        import pyro_vi_kit as vi

        tree = vi.nuts(self.made["model"], chains=2, draws=500, seed=0, progress=False)
        self.made["nuts"] = tree
        _require(tree.attrs["max_rhat"] < 1.05, f"R-hat {tree.attrs['max_rhat']}")
        found = float(tree["posterior"]["slope"].mean())
        expected = float(self.made["full_rank"].sample(4000, seed=1)["slope"].mean())
        _require(abs(found - expected) < 0.05, f"a mean of {found}, where the fit has {expected}")

    def to_arviz(self) -> None:
        """The groups of an export, which ArviZ itself can summarise."""
        import arviz

        tree = self.made["full_rank"].to_arviz()
        _require("log_likelihood" in [str(group).strip("/") for group in _groups(tree)], "groups")
        arviz.summary(tree)

    def save_and_load(self) -> None:
        """The same ELBO from a file, to the last digit."""
        import pyro_vi_kit as vi

        path = self.folder / "line.nc"
        self.made["full_rank"].save(path)
        again = vi.load(path, self.made["model"])
        _require(again.elbo == self.made["full_rank"].elbo, "another ELBO")

    def compare(self) -> None:
        """The table of both guides against the chains."""
        import pyro_vi_kit as vi

        fits = {name: self.made[name] for name in ("full_rank", "affine_coupling")}
        table = vi.compare(self.made["nuts"], fits)
        overall = table[table["parameter"] == "overall"]
        _require(max(map(abs, overall["mean_error"])) < 0.3, "errors")

    def command_line(self) -> None:
        """`vi-kit check` and `vi-kit fit`."""
        script = Path(sysconfig.get_path("scripts")) / "vi-kit"
        out = str(self.folder / "cli.nc")
        fit = ("fit", str(self.file), "--guide", "mean_field", "--seed", "0", "--out", out)
        for arguments in (("check", str(self.file)), fit):
            done = subprocess.run(
                [str(script), *arguments], capture_output=True, text=True, check=False
            )
            _require(done.returncode == 0, f"vi-kit {arguments[0]}: {done.stderr.strip()[-200:]}")
        _require(Path(out).exists(), "no file")


def _groups(tree: Any) -> list[Any]:
    groups: Any = tree.groups
    found: Any = groups() if callable(groups) else groups
    return list(found)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise RuntimeError(message)


def _outcome(step: Callable[[], None]) -> str:
    try:
        step()
    except Exception as error:  # noqa: BLE001  whatever it is, it is what is asked for
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}"
    return "ok"


def main() -> None:
    """Run all steps, and print one line of JSON."""
    warnings.simplefilter("ignore")
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PYRO_VI_KIT_CACHE"] = str(Path(folder) / "cache")
        smoke = Smoke(Path(folder))
        steps = (
            smoke.fit,
            smoke.nuts,
            smoke.to_arviz,
            smoke.save_and_load,
            smoke.compare,
            smoke.command_line,
        )
        outcomes = {step.__name__: _outcome(step) for step in steps}
    engine = smoke.made["nuts"].attrs["engine"] if "nuts" in smoke.made else ""
    found = {"versions": versions, "steps": outcomes, "nuts_engine": engine}
    print(json.dumps(found | {"python": sys.version.split()[0]}))


if __name__ == "__main__":
    main()
