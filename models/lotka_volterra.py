"""Predator and prey (Lotka 1925, Volterra 1926): two populations that chase each other.

Data: 20 yearly counts of both, simulated with NumPy's ``default_rng(6)``: prey grow by 0.55 and are
eaten at 0.028, predators die at 0.84 and grow at 0.026; the counts have log-normal errors of 0.15.

What is hard: a differential equation inside the likelihood, solved by Runge-Kutta steps in a Python loop
(several thousand operations with their gradient); the rates correlate strongly, and starts far away are
numerically hopeless.
"""

import numpy as np
import pyro
import pyro.distributions as dist
import torch

import pyro_vi_kit as vi

STEPS = 2  # a year


def slope(log_state, growth, eaten):
    """Of the logs of prey and predators, `[..., 2]`."""
    return growth + eaten * log_state.exp().flip(-1)


def solve(log_start, growth, eaten, years):
    """Logs of both populations at the years behind the first, `[..., years, 2]`."""
    h, state, states = 1.0 / STEPS, log_start, []
    for step in range(years * STEPS):
        k1 = slope(state, growth, eaten)
        k2 = slope(state + h / 2 * k1, growth, eaten)
        k3 = slope(state + h / 2 * k2, growth, eaten)
        k4 = slope(state + h * k3, growth, eaten)
        state = state + h / 6 * (k1 + 2 * (k2 + k3) + k4)
        if step % STEPS == STEPS - 1:
            states.append(state)
    return torch.stack(states, -2)


def lotka_volterra(years, y=None):
    birth = pyro.sample("birth", dist.LogNormal(-0.7, 0.4))
    eaten = pyro.sample("eaten", dist.LogNormal(-3.5, 0.5))
    death = pyro.sample("death", dist.LogNormal(-0.2, 0.4))
    feed = pyro.sample("feed", dist.LogNormal(-3.5, 0.5))
    start = pyro.sample("start", dist.Normal(torch.full((2,), 3.0), 1.0).to_event(1))
    error = dist.LogNormal(torch.full((2,), -1.5), 0.5)
    sigma = pyro.sample("sigma", error.to_event(1))
    growth, effect = torch.stack([birth, -death], -1), torch.stack([-eaten, feed], -1)
    logs = solve(start, growth, effect, years)
    counts = dist.LogNormal(logs, sigma.unsqueeze(-2))
    return pyro.sample("y", counts.to_event(2), obs=y)


def simulate(years=20, seed=6):
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        exact = solve(
            torch.tensor([30.0, 6.0], dtype=torch.float64).log(),
            torch.tensor([0.55, -0.84], dtype=torch.float64),
            torch.tensor([-0.028, 0.026], dtype=torch.float64),
            years,
        )
    noisy = np.exp(exact.numpy() + 0.15 * rng.normal(size=(years, 2)))
    return torch.tensor(noisy, dtype=torch.get_default_dtype())


Y = simulate()

MODEL = vi.Model(
    lotka_volterra,
    len(Y),
    Y,
    dims={"y": ["year", "species"], "start": ["species"], "sigma": ["species"]},
    coords={"species": ["prey", "predator"]},
)
