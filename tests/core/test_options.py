"""Whatever is given to a public parameter, it works or is refused by an error of this package.

The parameters are read off the signatures, so that a new one is tried as soon as there is one.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vi_kit as vi
from pyro_vi_kit import plots
from pyro_vi_kit.core import runtime
from pyro_vi_kit.core.errors import ViError
from pyro_vi_kit.posterior import Posterior
from pyro_vi_kit.validation.calibrate import Calibration


class Unprintable:
    """An object whose repr raises."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


WRONG = {
    "None": None,
    "True": True,
    "text": "nonsense",
    "empty text": "",
    "text with NUL": "a\0b",
    "bytes": b"bytes",
    "nan": float("nan"),
    "inf": float("inf"),
    "minus one": -1,
    "zero": 0,
    "two and a half": 2.5,
    "2**70": 2**70,
    "10**400": 10**400,
    "10**15": 10**15,
    "complex": 1j,
    "object": object(),
    "unprintable": Unprintable(),
    "class": int,
    "list": [],
    "list of None": [None],
    "list of text": ["nonsense"],
    "nested list": [[1, "a"]],
    "dict": {},
    "dict of None": {"mu": None},
    "dict of text": {"mu": "a"},
    "dict of numbers": {1: 2},
    "set": {"a"},
    "tensor": torch.zeros(2, 3),
    "tensor of NaN": torch.tensor(float("nan")),
    "empty tensor": torch.zeros(0),
    "array": np.zeros(3),
    "array of objects": np.array([None, "a"], dtype=object),
    "NumPy integer": np.int64(-3),
    "function": lambda *args, **kwargs: 3,
    "raises": lambda *args, **kwargs: 1 / 0,
}


def normal(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def generative(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("n", 3):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def local(y):
    with pyro.plate("n", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def over_loader(rows):
    """A model over a loader that does not say how long it is."""
    loader = torch.utils.data.DataLoader(Unsized(), batch_size=2)
    return vi.Model(normal, loader, rows=rows)


class Unsized(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(Y)


Y = torch.tensor([1.0, 2.0, 4.0])


@functools.cache
def model() -> vi.Model:
    return vi.Model(normal, Y)


@functools.cache
def posterior() -> vi.Posterior:
    return vi.fit(model(), "mean_field", seed=0, progress=False)


@functools.cache
def amortized() -> vi.Posterior:
    return vi.fit(vi.Model(local, Y), "amortized", steps=20, seed=0, progress=False)


@functools.cache
def reference():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so few draws have not converged
        return vi.nuts(model(), chains=2, draws=20, tune=20, sampler="pyro", progress=False)


@functools.cache
def calibration() -> vi.Calibration:
    simple = vi.Model(generative, Y)
    return vi.calibrate(simple, "mean_field", simulations=20, draws=19, seed=0, jobs=1)


FIT = {"model": model, "guide": "mean_field", "steps": 3, "seed": 0, "progress": False}
NUTS = {"model": model, "chains": 1, "draws": 4, "tune": 10, "sampler": "pyro", "progress": False}
CALIBRATE = {
    "model": lambda: vi.Model(generative, Y),
    "guide": "mean_field",
    "simulations": 20,
    "draws": 19,
    "jobs": 1,
    "seed": 0,
}
# What is called, by name, with what it needs to be called at all (functions are called for their value).
# Required parameters without a value here get one of `WRONG` too.
FUNCTIONS = {
    "fit": (vi.fit, FIT),
    "nuts": (vi.nuts, NUTS),
    "check": (vi.check, {"model": model, "verbose": False}),
    "compare": (vi.compare, {"reference": reference, "posteriors": posterior, "draws": 10}),
    "calibrate": (vi.calibrate, CALIBRATE),
    "load": (vi.load, {"path": "there is none.nc", "model": model}),
    "guides.make": (vi.guides.make, {"guide": "mean_field", "model": model}),
    "guides.specify": (vi.guides.specify, {"guide": "mean_field"}),
    "guides.register": (vi.guides.register, {}),
    "objectives.register": (vi.objectives.register, {}),
    "objectives.make": (vi.objectives.make, {"objective": "elbo"}),
    "plots.losses": (plots.losses, {"posteriors": posterior}),
    "plots.marginals": (
        plots.marginals,
        {"reference": reference, "posteriors": posterior, "draws": 10},
    ),
    "plots.predictive": (plots.predictive, {"posterior": posterior, "draws": 10}),
    "plots.rank_ecdf": (plots.rank_ecdf, {"calibration": calibration}),
    "plots.coverage": (plots.coverage, {"calibration": calibration}),
    "plots.expected_coverage": (plots.expected_coverage, {"calibration": calibration}),
}
METHODS = {
    "attrs": {"seed": 0},
    "groups": {"draws": 5, "seed": 0},
    "save": {"path": "posterior.nc", "draws": 5},
    "to_arviz": {"draws": 5},
    "loo": {"draws": 100},
    "linear_response": {"draws": 64},
    "linear_response_summary": {"draws": 64},
    "evidence": {"draws": 100},
    "amortization_gap": {"draws": 10, "steps": 3},
    "refine": {"steps": 3},
}
# Made by the package, never by its users.
INTERNAL = {"Draw", "Guide", "GuideSpec", "Bound", "LogWeights", "Objective"}
BY_PACKAGE = {
    "drawn_of",
    "held_at_mean",
    "mean_of_globals",
    "require_choice",
    "per_datum",
    "tabulated",
    "evaluate",
    "surrogate",
}


def public(package) -> dict[str, object]:
    return {name: getattr(package, name) for name in package.__all__}


def specs() -> dict[str, type]:
    """Everything that is configured by its constructor."""
    parts = public(vi.guides) | public(vi.objectives) | {"Epochs": vi.Epochs}
    return {n: p for n, p in parts.items() if dataclasses.is_dataclass(p) and n not in INTERNAL}


def methods(cls: type) -> dict[str, object]:
    return {
        name: method
        for name, method in inspect.getmembers(cls, inspect.isfunction)
        if not name.startswith("_")
    }


def parameters(function) -> list[str]:
    """What can be given to a function, ``*`` for what any number of can be given."""
    fixed = inspect.signature(function).parameters.values()
    names = [p.name for p in fixed if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if any(p.kind == p.VAR_POSITIONAL for p in fixed):
        names.append("*")
    return [name for name in names if name != "self"]


def filled(given: dict[str, object]) -> dict[str, object]:
    """The arguments, with those made that are costly: what makes them has no parameters."""
    return {
        name: value() if inspect.isfunction(inspect.unwrap(value)) else value
        for name, value in given.items()
    }


def tried(function, given: dict[str, object], parameter: str) -> list[str]:
    """What went wrong otherwise than by an error of this package."""
    faults = []
    arguments = filled(given)
    wrong = dict(WRONG)
    if function is vi.fit and parameter == "guide":
        wrong = {name: value for name, value in WRONG.items() if not callable(value)}  # Pyro guides
    for name, value in wrong.items():
        args = ()
        kwargs = {**arguments, parameter: value}
        if parameter == "*":
            kwargs.pop("*")
            args = (value,)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                function(*args, **kwargs)
        except ViError as error:
            if not str(error) or len(str(error)) > 1500:
                faults.append(f"{name}: a message of {len(str(error))} characters")
        except Exception as error:  # noqa: BLE001  what this test is about
            faults.append(f"{name}: {type(error).__name__}: {error}"[:300])
    return faults


CALLS = [
    (f"{name}({parameter})", function, given, parameter)
    for name, (function, given) in FUNCTIONS.items()
    for parameter in parameters(function)
]
CALLS += [
    (f"{name}({parameter})", part, {}, parameter)
    for name, part in specs().items()
    for parameter in parameters(part)
]
CALLS.append(("Model(loader, rows)", over_loader, {}, "rows"))
CALLS += [
    (f"Model({parameter})", vi.Model, {"fn": lambda: normal}, parameter)
    for parameter in parameters(vi.Model)
    if parameter != "*"
]


@pytest.mark.parametrize(
    ("function", "given", "parameter"), [call[1:] for call in CALLS], ids=[c[0] for c in CALLS]
)
def test_a_wrong_value_is_refused(function, given, parameter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tried(function, given, parameter) == []


OF_POSTERIOR = [(name, p) for name, m in methods(Posterior).items() for p in parameters(m)]


@pytest.mark.parametrize(
    ("name", "parameter"), OF_POSTERIOR, ids=[f"{n}({p})" for n, p in OF_POSTERIOR]
)
@pytest.mark.parametrize("fitted", [posterior, amortized], ids=["mean_field", "amortized"])
def test_a_wrong_value_is_refused_by_a_posterior(fitted, name, parameter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    method = getattr(fitted(), name)
    few = {"draws": 10} if "draws" in parameters(method) else {}
    assert tried(method, few | METHODS.get(name, {}), parameter) == []


OF_CALIBRATION = [(name, p) for name, m in methods(Calibration).items() for p in parameters(m)]


@pytest.mark.parametrize(("name", "parameter"), OF_CALIBRATION)
def test_a_wrong_value_is_refused_by_a_calibration(name, parameter):
    assert tried(getattr(calibration(), name), {}, parameter) == []


def test_every_public_function_is_tried():
    tried_ = {name.rpartition(".")[2] for name in FUNCTIONS}
    for package in (vi, plots, vi.guides, vi.objectives):
        for name, part in public(package).items():
            if inspect.isfunction(part) and parameters(part) and name not in BY_PACKAGE:
                assert name in tried_, f"{package.__name__}.{name} is tried nowhere"


def test_more_draws_than_memory_holds(monkeypatch):
    monkeypatch.setattr(runtime, "_memory", lambda: 1e6)
    with pytest.raises(ViError, match=r"50,000 numbers take .* ask for fewer draws="):
        posterior().sample(50_000)
    assert len(posterior().sample(1000, seed=0)["mu"]) == 1000
