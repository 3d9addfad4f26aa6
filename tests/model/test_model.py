"""`Model` holds a callable, its arguments and their names; errors carry the remedy."""

from __future__ import annotations

import dataclasses
import functools
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule

from pyro_vi_kit.core import errors
from pyro_vi_kit.model.model import Model


def normal(x, y=None, *more, scale=1.0):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(x)):
        return pyro.sample("y", dist.Normal(z * x, scale), obs=y)


class Module(PyroModule):
    def forward(self, x):
        return 2 * x


X, Y = torch.arange(3.0), torch.ones(3)


def test_defaults():
    model = Model(normal, X, Y)
    assert model.fn is normal
    assert model.args[0] is X
    assert model.args[1] is Y
    assert (model.kwargs, model.coords, model.dims, model.name) == ({}, {}, {}, "normal")


def test_call_without_arguments_runs_on_its_own_data():
    assert Model(normal, X, Y, kwargs={"scale": 2.0})() is Y


def test_call_with_arguments_runs_on_those_alone():
    model = Model(lambda *args, **kwargs: (args, kwargs), 1, 2, kwargs={"k": 3})
    assert model() == ((1, 2), {"k": 3})
    assert model(4) == ((4,), {})
    assert model(k=5) == ((), {"k": 5})


def test_call_is_visible_to_pyro_handlers():
    trace = pyro.poutine.trace(Model(normal, X, Y)).get_trace()
    assert {"z", "row", "y"} <= set(trace.nodes)
    assert trace.nodes["y"]["is_observed"]


def test_with_args_replaces_positional_and_merges_keyword_arguments():
    names = {"coords": {"row": ["a", "b", "c"]}, "dims": {"z": ["k"]}, "name": "mine"}
    model = Model(normal, X, Y, kwargs={"scale": 2.0, "other": 1}, **names)
    new = model.with_args(Y, scale=3.0)
    assert new.args == (Y,)
    assert new.kwargs == {"scale": 3.0, "other": 1}
    assert (new.fn, new.coords, new.dims, new.name) == (
        normal,
        model.coords,
        model.dims,
        "mine",
    )
    assert model.args[0] is X
    assert model.kwargs == {"scale": 2.0, "other": 1}


def test_is_frozen():
    model = Model(normal, X)
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.name = "other"  # pyright: ignore[reportAttributeAccessIssue]


def test_copies_what_it_is_given():
    kwargs, names = {"scale": 2.0}, ["a", "b", "c"]
    model = Model(normal, X, kwargs=kwargs, coords={"row": names})
    kwargs["scale"] = 0.0
    names.clear()
    assert model.kwargs == {"scale": 2.0}
    assert model.coords == {"row": ("a", "b", "c")}


@pytest.mark.parametrize("values", [["a", "b"], ("a", "b"), range(2), torch.arange(2)])
def test_names_become_tuples(values):
    coords = Model(normal, coords={"row": values}).coords
    assert coords["row"] == tuple(values)


@pytest.mark.parametrize("option", ["coords", "dims"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["row"], "must be a dict of sequences, got list"),
        ({"row": "abc"}, r"\['row'\] must be a sequence of names, got 'abc'"),
        ({"row": 3}, r"\['row'\] must be a sequence of names, got 3"),
    ],
)
def test_names_that_are_none(option, value, message):
    with pytest.raises(errors.ModelError, match=f"^{option}.*{message}"):
        Model(normal, X, **{option: value})


def test_fn_must_be_callable():
    with pytest.raises(errors.ModelError, match=r"got Tensor.*vi\.Model\(fn, x, y\)"):
        Model(X, Y)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("fn", "name"),
    [
        (normal, "normal"),
        (functools.partial(functools.partial(normal, X), Y), "normal"),
        (functools.partial(pyro.poutine.condition(normal, data={}), X), "normal"),
        (Module(), "Module"),
        (lambda: None, "<lambda>"),
    ],
)
def test_name_is_taken_from_the_callable(fn, name):
    assert Model(fn).name == name
    assert Model(fn, name="given").name == "given"


@pytest.mark.parametrize(
    ("fn", "count", "names"),
    [
        (normal, 0, ()),
        (normal, 2, ("x", "y")),
        (normal, 4, ("x", "y", "arg2", "arg3")),
        (functools.partial(normal, X), 1, ("y",)),
        (pyro.poutine.condition(normal, data={}), 2, ("x", "y")),
        (lambda *args: None, 2, ("arg0", "arg1")),
        (max, 2, ("arg0", "arg1")),  # a builtin without a signature
    ],
)
def test_argument_names(fn, count, names):
    assert Model(fn, *range(count)).argument_names == names


def test_models_are_equal_to_themselves_alone_and_hashable():
    model = Model(normal, X, Y, coords={"row": ["a", "b", "c"]})
    assert model != Model(normal, X.clone(), Y.clone())
    assert {model: 1}[model] == 1


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (errors.ModelError, ValueError),
        (errors.OptionError, ValueError),
        (errors.UnknownNameError, KeyError),
        (errors.FileError, OSError),
        (errors.MissingDependencyError, ImportError),
    ],
)
def test_errors_are_also_the_builtin_ones(error, builtin):
    assert issubclass(error, errors.ViError)
    assert issubclass(error, builtin)


@pytest.mark.parametrize(
    "error",
    [errors.ModelError, errors.OptionError, errors.FileError, errors.MissingDependencyError],
)
def test_errors_print_their_message_and_cross_processes(error):
    again = pickle.loads(pickle.dumps(error("site 'z': do this")))
    assert type(again) is error
    assert str(again) == "site 'z': do this"


def test_unknown_name_lists_the_choices_and_the_nearest():
    error = errors.UnknownNameError("guide", "ful_rank", {"mean_field", "full_rank"})
    assert str(error) == (
        "unknown guide 'ful_rank'. Did you mean 'full_rank'? Known guides: full_rank, mean_field."
    )
    assert isinstance(error, errors.OptionError)


def test_unknown_name_crosses_processes():
    error = errors.UnknownNameError("guide", "ful_rank", ["full_rank"])
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize("name", ["xyz", "", None, 3])
def test_unknown_name_guesses_nothing_when_nothing_is_near(name):
    text = str(errors.UnknownNameError("guide", name, ["delta"]))
    assert text == f"unknown guide {name!r}. Known guides: delta."
