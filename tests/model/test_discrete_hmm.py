"""A hidden Markov model of Pyro's whose parameters do not change in time says that it has length 1."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vi_kit as vi
from pyro_vi_kit.core.errors import ModelError, OptionError

Y = torch.tensor([0.0, 3.0, 0.0, 0.0])
INITIAL = torch.tensor([0.7, 0.3])


def series(duration):
    def model(y):
        p = pyro.sample("p", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
        seen = dist.Normal(torch.tensor([0.0, 3.0]), 1.0)
        hmm = dist.DiscreteHMM(INITIAL.log(), p.log(), seen, duration=duration)
        pyro.sample("y", hmm, obs=y)

    return vi.fit(vi.Model(model, Y), "full_rank", seed=0, progress=False)


def test_a_series_of_known_length_is_drawn_anew():
    posterior = series(len(Y))
    draws = posterior.predict(draws=4000, seed=0)["y"]
    assert draws.shape == (4000, 4)
    # Behind the first transition: P(state 1) = E[p] of the initial state, by the posterior's draws.
    p = posterior.sample(4000, seed=1)["p"].mean(0)
    expected = 3.0 * float(INITIAL.double().numpy() @ p[:, 1])
    # An sd of at most sqrt(1 + 2.25), and q's draws have errors too.
    assert abs(draws[:, 1].mean() - expected) < 4 * 1.8 / 4000**0.5 + 0.05
    assert len(posterior.check_predictive()) > 0
    assert posterior.to_arviz(10)["observed_data"]["y"].shape == (4,)
    with pytest.raises(OptionError, match="'y' is one observation as a whole"):
        posterior.loo()


def test_one_of_no_length_is_named():
    posterior = series(None)
    for ask in (posterior.predict, posterior.check_predictive):
        with pytest.raises(ModelError, match=r"'y' cannot be drawn.*duration="):
            ask()
    with pytest.raises(OptionError, match="one observation as a whole"):
        posterior.loo()
