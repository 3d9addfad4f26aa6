"""What every test shares: determinism, a clean Pyro, and the reference posteriors."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pyro
import pytest
import torch
from pyro.poutine.runtime import _PYRO_STACK

from pyro_vi_kit import guides, objectives

ROOT = Path(__file__).parents[1]

# Sums in another order give other last bits; one thread keeps them in one order.
torch.set_num_threads(1)
# No compiler beside the tests, and no libraries in the user's cache; what needs them says so.
os.environ["PYRO_VI_KIT_COMPILE"] = "off"
# A shell's background jobs ignore Ctrl-C, and so would all that they start: some tests press it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def clean_param_store() -> Iterator[None]:
    """Fail a test that leaves parameters in Pyro's global store, and clear them for the next one.

    A test that runs stock Pyro does so in ``with pyro.get_param_store().scope():``.
    """
    store = pyro.get_param_store()
    before = set(store.keys())
    yield
    left = sorted(set(store.keys()) ^ before)
    store.clear()
    assert not left, f"Pyro's param store was changed: {left}. Run in get_param_store().scope()."


def world() -> dict[str, object]:
    """What a fit borrows of torch and Pyro, and has to give back."""
    checks = (pyro.distributions, pyro.infer, pyro.poutine)
    return {
        "default dtype": torch.get_default_dtype(),
        "validation": [module.is_validation_enabled() for module in checks],
        "Distribution.__init__": torch.distributions.Distribution.__init__,
        "torch.broadcast_shapes": torch.broadcast_shapes,
        "handlers": len(_PYRO_STACK),
    }


@pytest.fixture(autouse=True)
def own_registries() -> Iterator[None]:
    """Take away what a test has registered: a page's example, or a user's file."""
    before = [(each, dict(each._parts)) for each in (guides.REGISTRY, objectives.REGISTRY)]
    yield
    for each, parts in before:
        each._parts = parts  # type: ignore[assignment]


@pytest.fixture(autouse=True)
def unchanged_world() -> Iterator[None]:
    """Fail a test after which torch or Pyro are not as they were, and mend them for the next one."""
    before = world()
    yield
    after = world()
    torch.set_default_dtype(before["default dtype"])  # type: ignore[arg-type]
    pyro.enable_validation(before["validation"] == [True] * 3)
    torch.broadcast_shapes = before["torch.broadcast_shapes"]  # type: ignore[assignment]
    del _PYRO_STACK[:]
    assert after == before


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for compiled graphs, and compilers allowed."""
    monkeypatch.setenv("PYRO_VI_KIT_CACHE", str(tmp_path))
    monkeypatch.delenv("PYRO_VI_KIT_COMPILE", raising=False)
    return tmp_path


@pytest.fixture
def float64() -> Iterator[None]:
    """Literals and new tensors in double precision, for one test."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def own_param_store() -> Iterator[None]:
    """A parameter store that a test may fill: stock SVI does."""
    with pyro.get_param_store().scope():
        yield


@pytest.fixture(scope="session")
def posteriordb() -> Callable[[str], Path]:
    """``posteriordb(name)``: the folder of a reference posterior; skips where it is not at hand."""
    default = ROOT.parent / "shared" / "posteriordb"
    root = Path(os.environ.get("PYRO_VI_KIT_POSTERIORDB", default))

    def folder(name: str) -> Path:
        if not root.is_dir():
            pytest.skip(f"no reference posteriors at {root}; set PYRO_VI_KIT_POSTERIORDB")
        if not (root / name).is_dir():
            pytest.skip(f"no reference posterior {name!r} in {root}")
        return root / name

    return folder
