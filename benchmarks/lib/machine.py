"""Where numbers were measured: machine and versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

PACKAGES = (
    "pyro_vi_kit",
    "torch",
    "pyro-ppl",
    "numpyro",
    "jax",
    "nutpie",
    "arviz",
    "numpy",
)


def version(package: str) -> str | None:
    """An installed package's version."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def numpyro_missing() -> str | None:
    """Why NumPyro cannot be measured, or None where it can."""
    if version("numpyro") and version("jax"):
        return None
    return "NumPyro is not installed, so it is left out: pip install 'pyro_vi_kit[bench]'"


def describe() -> str:
    """The machine, its load now and the versions, as Markdown."""
    known = [f"{name} {version(name)}" for name in PACKAGES if version(name)]
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return "\n".join(
        [
            f"- {_processor()}, {os.cpu_count()} cores; {platform.system()} {platform.release()}",
            f"- Python {platform.python_version()}; {', '.join(known)}",
            f"- load averages when this was written: {load} (1 would be this benchmark alone)",
        ]
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
