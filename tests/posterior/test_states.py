"""Discrete numbers are judged by the probabilities of their states."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vi_kit as vi
from pyro_vi_kit.core.psis import psis
from pyro_vi_kit.posterior.diagnostics.shifts import Columns, by_chains, by_weights

S = 4000


def drawn(seed=0):
    rng = np.random.default_rng(seed)
    return np.stack(
        [rng.standard_normal(S), rng.integers(0, 2, S), rng.integers(0, 4, S), np.full(S, 3.0)], 1
    )


def test_each_state_has_a_column_and_one_of_two_is_enough():
    flat = drawn()
    columns = Columns(flat, np.array([False, True, True, True]))
    assert columns.labels(list("xabc")) == [
        "x",
        "a = 1",
        "b = 0",
        "b = 1",
        "b = 2",
        "b = 3",
        "c = 3",
    ]
    found = columns(flat)
    np.testing.assert_array_equal(found[:, 0], flat[:, 0])
    np.testing.assert_array_equal(found[:, 1], flat[:, 1])
    np.testing.assert_array_equal(found[:, 2:6].sum(1), np.ones(S))
    np.testing.assert_array_equal(
        columns.worst(np.array([0.0, 1.0, 0.1, 0.3, 0.7, 0.2, 0.0])), [0, 1, 4, 6]
    )


def test_many_states_are_a_number():
    flat = np.random.default_rng(0).poisson(30.0, (S, 1)).astype(float)
    columns = Columns(flat, np.array([True]))
    assert not columns.indicator.any()
    np.testing.assert_array_equal(columns(flat), flat)


def test_many_numbers_have_a_column_each():
    flat = np.random.default_rng(0).integers(0, 3, (50, 2000)).astype(float)
    columns = Columns(flat, np.ones(2000, dtype=bool))
    assert len(columns.number) == 2000


def test_moves_by_weights_are_those_of_the_probability():
    """q(z = 1) = 0.3 against p(z = 1) = 0.4: 0.1 in sds of sqrt(0.3 x 0.7), with an honest error."""
    found = []
    for seed in range(200):
        z = (np.random.default_rng(seed).random((S, 1)) < 0.3).astype(float)
        log_w = np.log(np.where(z[:, 0] == 1, 0.4 / 0.3, 0.6 / 0.7))
        shifts = by_weights(z, psis(log_w), np.array([True]))
        found.append((shifts.mean[0] * math.sqrt(0.21), shifts.mean_se[0] * math.sqrt(0.21)))
        assert shifts.sd[0] == shifts.sd_se[0] == 0.0
    moved, error = np.array(found).T
    assert abs(moved.mean() - 0.1) < 4 * moved.std() / math.sqrt(200)
    # An sd of 200 has a relative error of 5 %; smoothing takes noise away that the error counts.
    assert 0.8 < error.mean() / moved.std() < 4.0


def test_a_state_that_q_never_visits_moves_by_chains():
    plain = np.ones((S, 1))
    first = np.full((200, 1), -0.5 / 0.1) + 0.01 * np.random.default_rng(0).standard_normal(
        (200, 1)
    )
    shifts = by_chains(first, first**2, plain, np.array([True]))
    assert abs(shifts.mean[0] + 5.0) < 0.01


def coin(pull):
    side = pyro.sample("side", dist.Bernoulli(torch.tensor(0.2)))
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(level + 0.0 * side, 1.0), obs=torch.tensor(0.5))
    pyro.sample("seen", dist.Bernoulli(0.2 + pull * side), obs=torch.tensor(1.0))


@pytest.mark.parametrize(("held", "level"), [(0.08, "resample"), (0.38, "good")])
def test_a_fit_whose_inclusion_is_wrong_says_so(held, level):
    """Right is 0.2 x 0.5 / (0.2 x 0.5 + 0.8 x 0.2) = 0.385; the level's posterior is q's."""

    def guide(pull):
        pyro.sample("side", dist.Bernoulli(torch.tensor(held)))
        pyro.sample("level", dist.Normal(0.25, math.sqrt(0.5)))
        # Something to train.
        pyro.param("idle", torch.tensor(0.0))

    with pyro.get_param_store().scope():
        posterior = vi.fit(vi.Model(coin, 0.3), guide, seed=0, steps=2, progress=False)
        table, found = posterior.summary(), posterior.verdict
    assert found.sites == {"side": level, "level": "good"}
    assert table.loc["side", "verdict"] == level
    if level != "good":
        assert "the probability that side = 1" in str(found)
        moved = posterior.diagnose().loc["side", "mean_shift"] * math.sqrt(held * (1 - held))
        assert abs(moved - (0.385 - held)) < 0.06
