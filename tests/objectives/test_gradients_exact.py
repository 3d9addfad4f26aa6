"""Every estimator of every objective against brute force: mean gradients by quadrature, K = 2."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vi_kit as vi
from pyro_vi_kit import guides, objectives
from pyro_vi_kit.core.contracts import Batch
from pyro_vi_kit.objectives import REGISTRY, Annealed, Beta, ChiSquare, Renyi
from pyro_vi_kit.objectives.estimators import surrogate

pytestmark = pytest.mark.usefixtures("float64", "own_param_store")

Y, NOISE = 0.8, 0.7
LOC, LOG_SCALE = 0.3, math.log(0.9)
ROWS, REPEATS = 2000, 12
UPDATES = 30.0
# One of each name, and the corners of those with options.
EACH = [
    *(objectives.make(name, particles=2) for name in REGISTRY),
    Renyi(alpha=2.0, particles=2),
    Renyi(alpha=-0.5, particles=2),
    Renyi(alpha=-math.inf, particles=2),
    ChiSquare(n=1.5, particles=2),
    Beta(beta=0.5, particles=2),
    Annealed(particles=2, schedule="cosine", first=0.2, steps=100),
]
# Mixtures alone have strata: tests/objectives/test_stratified.py.
PAIRS = [(o, name) for o in EACH for name in o.estimators if name != "stratified"]
each_pair = pytest.mark.parametrize(
    ("objective", "estimator"), PAIRS, ids=[f"{o!r}-{name}" for o, name in PAIRS]
)


def log_joint(z, likelihood=1.0):
    """z ~ N(0, 1), Y ~ N(z, NOISE): written out."""
    gap = (Y - z) / NOISE
    half = 0.5 * math.log(2.0 * math.pi)
    return -0.5 * z**2 - half + likelihood * (-0.5 * gap**2 - math.log(NOISE) - half)


def log_q(z, loc, log_scale):
    return -0.5 * ((z - loc) / log_scale.exp()) ** 2 - log_scale - 0.5 * math.log(2.0 * math.pi)


def exact_gradient(objective):
    """The gradient that the papers define, upwards, by the trapezoid rule over (e1, e2): `[2]`.

    Of expected bounds by differentiating the integral; of upper bounds E[sum_k v_k grad log q(z_k)] as
    it stands, with draws held fixed.
    """
    loc = torch.tensor(LOC, requires_grad=True)
    log_scale = torch.tensor(LOG_SCALE, requires_grad=True)
    grid = torch.linspace(-8.0, 8.0, 1201)
    mass = torch.exp(-0.5 * grid**2)
    mass = mass / mass.sum()
    e = torch.stack(torch.meshgrid(grid, grid, indexing="ij"))
    weight = mass[:, None] * mass
    z = loc + log_scale.exp() * e
    name = objective.name
    if name == "beta":
        b = objective.beta
        log_w = b * (log_joint(z, 1.0 / b) - log_q(z, loc, log_scale))
    elif name == "annealed":
        t = float(objective.power(torch.tensor(UPDATES)))
        log_w = t * log_joint(z) - log_q(z, loc, log_scale)
    else:
        log_w = log_joint(z) - log_q(z, loc, log_scale)
    if name == "tail_adaptive":
        # Of two draws the one of the larger weight counts twice as much.
        gamma = torch.where(log_w > log_w.flip(0), 2 / 3, 1 / 3).detach()
        at = log_joint(z) - log_q(z, loc.detach(), log_scale.detach())
        value = (gamma * at).sum(0)
    elif objective.upper:
        n = getattr(objective, "n", 1.0)
        rate = 1.0 if n == 1.0 else (n - 1.0) / n
        shares = torch.softmax(n * log_w.detach(), 0)
        value = rate * (shares * log_q(z.detach(), loc, log_scale)).sum(0)
    elif name in ("iwae", "renyi") and objective.multi_sample:
        alpha = getattr(objective, "alpha", 0.0)
        if alpha == -math.inf:
            value = log_w.max(0).values
        else:
            value = ((1 - alpha) * log_w).exp().mean(0).log() / (1 - alpha)
    else:
        value = log_w.mean(0)
    return torch.stack(torch.autograd.grad((weight * value).sum(), [loc, log_scale]))


class SameForAll(nn.Module):
    """An encoder that ignores the datum, so that rows are independent replicates."""

    def __init__(self):
        super().__init__()
        self.numbers = nn.Parameter(torch.tensor([LOC, LOG_SCALE]))

    def forward(self, inputs):
        return self.numbers.expand(len(inputs), -1)


def replicated():
    """ROWS copies of the datum, each with a latent of its own, and one pair of guide parameters."""

    def model(y):
        with pyro.plate("datum", len(y)) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y))[index], 1.0))
            pyro.sample("y", dist.Normal(z, NOISE), obs=y[index])

    data = torch.full((ROWS,), Y)
    guide = guides.make("amortized", vi.Model(model, data), encoder=SameForAll())
    return guide, list(guide.parameters())


def single():
    """One datum under a global latent."""

    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, NOISE), obs=y)

    guide = guides.make("mean_field", vi.Model(model, torch.tensor(Y)), init_scale=0.9)
    guide.families["latent"].loc.data.fill_(LOC)
    return guide


def one_gradient(guide, objective, estimator, of, particles=2):
    _, loss = surrogate(
        guide,
        objective,
        particles,
        Batch(updates=torch.tensor(UPDATES)),
        share=objective.multi_sample and guide.blocks[0].plate is not None,
        estimator=estimator,
    )
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(-loss, of)])


@each_pair
def test_the_mean_gradient_is_that_of_brute_force(objective, estimator):
    """Within 3.5 s.e. in each of two coordinates; over all pairs about one in 40 runs would fail."""
    if objective.multi_sample:
        (guide, of), each, particles = replicated(), ROWS, 2
    else:
        # Their draws are averaged, so that 1,000 pairs at once are one of 2,000.
        guide, each, particles = single(), 1, 2 * ROWS
        family = guide.families["latent"]
        of = [family.loc, family.log_scale]
    torch.manual_seed(11)
    found = torch.stack(
        [one_gradient(guide, objective, estimator, of, particles) / each for _ in range(REPEATS)]
    )
    # A Student t of 11 degrees of freedom: 3.5 of its s.e. are as unlikely as 2.9 of a normal's.
    error = found.std(0) / math.sqrt(REPEATS)
    assert bool(((found.mean(0) - exact_gradient(objective)).abs() < 3.5 * error).all())
