"""Item response (two-parameter logistic): which of 12 questions do 60 pupils answer?

Data: simulated with NumPy's ``default_rng(4)``: abilities N(0, 1), difficulties N(0, 1), discriminations
LogNormal(0, 0.4).

What is hard: 84 latents that only meet in products, ability times discrimination. Pupils who answer all
or nothing leave their ability to the prior.
"""

import numpy as np
import pyro
import pyro.distributions as dist
import torch

import pyro_vi_kit as vi


def item_response(pupils, items, y=None):
    standard = dist.Normal(torch.zeros(items), 1.0)
    difficulty = pyro.sample("difficulty", standard.to_event(1))
    discrimination = pyro.sample(
        "discrimination", dist.LogNormal(torch.zeros(items), 0.5).to_event(1)
    )
    with pyro.plate("pupil", pupils):
        ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
        logits = discrimination * (ability.unsqueeze(-1) - difficulty)
        return pyro.sample("y", dist.Bernoulli(logits=logits).to_event(1), obs=y)


def simulate(pupils=60, items=12, seed=4):
    rng = np.random.default_rng(seed)
    ability, difficulty = rng.normal(size=(pupils, 1)), rng.normal(size=items)
    discrimination = np.exp(0.4 * rng.normal(size=items))
    chance = 1.0 / (1.0 + np.exp(-discrimination * (ability - difficulty)))
    return torch.tensor(rng.random((pupils, items)) < chance, dtype=torch.get_default_dtype())


Y = simulate()

MODEL = vi.Model(
    item_response,
    *Y.shape,
    Y,
    dims={site: ["item"] for site in ("difficulty", "discrimination", "y")},
)
