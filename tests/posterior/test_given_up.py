"""What was tried and given up is in the posterior's status, one line each, and in all that shows it."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vi_kit as vi
from pyro_vi_kit.core.contracts import Status
from pyro_vi_kit.core.errors import ModelError, in_words
from pyro_vi_kit.model.log_density import Density

Y = torch.tensor([0.5, 1.0, 4.0])


class Armed:
    """A model with a funnel, whose verdict asks chains, that can be told to raise once."""

    def __init__(self):
        self.raises: Any = None

    def __call__(self, y):
        raises, self.raises = self.raises, None
        if raises is not None:
            raises()
        log_sd = pyro.sample("log_sd", dist.Normal(0.0, 2.0))
        with pyro.plate("n", len(y)):
            x = pyro.sample("x", dist.Normal(0.0, log_sd.exp()))
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def raising(error):
    def now():
        raise error

    return now


def too_large():
    torch.empty(2**50, dtype=torch.float64)


def fitted():
    """A posterior that has been weighed, and its model."""
    armed = Armed()
    posterior = vi.fit(vi.Model(armed, Y), "mean_field", seed=0)
    assert posterior.khat is not None
    assert not posterior.status.notes
    return posterior, armed


@pytest.mark.parametrize(
    ("raises", "words"),
    [
        (raising(RuntimeError("boom\nand more")), "Short chains were given up: RuntimeError: boom"),
        (raising(IndexError("row 9")), "Short chains were given up: IndexError: row 9"),
        (
            raising(MemoryError("no room")),
            "Short chains were given up: out of memory (MemoryError: no room)",
        ),
        (too_large, "Short chains were given up: out of memory (RuntimeError: "),
    ],
)
def test_chains_that_were_given_up_are_told_of(raises, words):
    posterior, armed = fitted()
    armed.raises = raises
    assert posterior.verdict is not None
    (note,) = posterior.status.notes
    assert note.startswith(words)
    assert f"  note     {note}" in repr(posterior).splitlines()


def test_chains_that_run_leave_no_note():
    posterior, _ = fitted()
    assert "chains" in str(posterior.verdict)
    assert posterior.status.notes == ()


def test_other_errors_of_the_model_are_raised():
    posterior, armed = fitted()
    armed.raises = raising(ValueError("not my data"))
    with pytest.raises(ModelError, match="ValueError: not my data"):
        _ = posterior.verdict


def branching(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu, 1.0 if mu > 0 else 2.0), obs=y)


def test_a_loop_over_points_says_why(tmp_path):
    model = vi.Model(branching, torch.tensor(0.4))
    posterior = vi.fit(model, "delta", seed=0)
    (note,) = posterior.status.notes
    assert note.startswith("The density is evaluated point by point in a Python loop: ")
    assert "vmap" in note
    assert note in repr(posterior)
    attrs = posterior.to_arviz(10).attrs
    assert note in attrs["notes"].splitlines()
    saved = posterior.save(tmp_path / "fit.nc")
    assert note in vi.load(saved, model).status.notes


def test_a_model_of_other_numbers_all_at_once_says_so():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        wrapped = torch._C._functorch.is_batchedtensor(mu)  # type: ignore[attr-defined]
        pyro.sample("y", dist.Normal(mu, 2.0 if wrapped else 1.0), obs=y)

    (note,) = Density(vi.Model(model, torch.tensor(0.4))).given_up
    assert note.startswith("The density is evaluated point by point in a Python loop: ")
    assert note.endswith("all points at once, the model gives other numbers")


def test_groups_that_an_export_lacks_are_told_of():
    class Unsampled(dist.Normal):
        def sample(self, *args, **kwargs):
            raise NotImplementedError("no sampler")

        rsample = sample

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", Unsampled(mu, 1.0), obs=y)

    posterior = vi.fit(vi.Model(model, torch.tensor(0.4)), "mean_field", seed=0)
    notes = posterior.to_arviz(10).attrs["notes"].splitlines()
    assert any(note.startswith("No posterior_predictive group: ") for note in notes)
    assert any(note.startswith("No prior groups: ") for note in notes)


def test_notes_are_kept_once():
    status = Status(True, "converged", "Set.").noting("a", "", "b").noting("a")
    assert status.notes == ("a", "b")


def test_what_was_raised_in_one_line():
    assert in_words(ValueError("one\ntwo")) == "ValueError: one"
    assert in_words(MemoryError()) == "out of memory (MemoryError)"
    with pytest.raises(RuntimeError) as told:
        too_large()
    assert in_words(told.value).startswith("out of memory (RuntimeError: ")


def test_a_site_that_only_some_draws_have_is_weighed_and_told_of():
    """Half of the draws have it. Under q equal to the prior the ELBO is the likelihood, -log(2 pi)/2."""

    def model() -> None:
        if pyro.sample("m", dist.Normal(0.0, 1.0)) > 0:
            pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))

    def guide() -> None:
        if pyro.sample("m", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0)) > 0:
            pyro.sample("scale", dist.LogNormal(0.0, 1.0))

    posterior = vi.fit(vi.Model(model), guide, engine="pyro", steps=20, seed=0, progress=False)
    # Twenty steps of a rate of 0.05 at most leave loc within 1 of 0, where KL(q | prior) is loc^2 / 2.
    assert posterior.elbo is not None
    assert posterior.elbo_se is not None
    off = posterior.elbo + 0.5 * math.log(2.0 * math.pi)
    assert -0.5 - 4.0 * posterior.elbo_se <= off <= 4.0 * posterior.elbo_se
    assert set(posterior.sample(50)) == {"m"}
    assert any("structure changes" in note for note in posterior.status.notes)
    assert any("'scale' is not in every draw" in note for note in posterior.status.notes)
