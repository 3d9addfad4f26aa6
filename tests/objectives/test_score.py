"""The score function: its formulas by hand, its mean with global and local latents, its limits."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from toys import gaussian, guide_for, local_and_global_model, local_model, perturb, two_scales_model

import pyro_vi_kit as vi
from pyro_vi_kit import guides
from pyro_vi_kit.core.contracts import Batch
from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.guides import REGISTRY, Guide
from pyro_vi_kit.guides.families import Family
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.objectives import Elbo, Iwae, Renyi
from pyro_vi_kit.objectives.base import leave_one_out, leave_one_out_mean
from pyro_vi_kit.objectives.estimators import chosen, obstacle, surrogate

pytestmark = pytest.mark.usefixtures("float64", "own_param_store")

SPREAD = [name for name in REGISTRY if name != "delta"]


def gradient(guide, objective, estimator, **options):
    local = any(block.plate for block in guide.blocks)
    _, loss = surrogate(
        guide,
        objective,
        objective.particles,
        Batch(options.pop("index", {})),
        share=local and objective.multi_sample,
        estimator=estimator,
        **options,
    )
    of = list(guide.parameters())
    parts = torch.autograd.grad(-loss, of, allow_unused=True, materialize_grads=True)
    return torch.cat([part.reshape(-1) for part in parts])


# -- formulas ---------------------------------------------------------------------------------


def test_left_out_a_draw_counts_as_the_mean_of_the_others():
    """VIMCO (Mnih & Rezende 2016, eq. 10), draw by draw and row by row."""
    log_w = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    for objective in (Iwae(4), Renyi(2.0, 4), Renyi(-math.inf, 4)):
        found = leave_one_out(objective.bound, log_w)
        for k in range(4):
            others = torch.cat([log_w[:k], log_w[k + 1 :]])
            replaced = torch.cat([others, others.mean(0, keepdim=True)])
            expected = objective.bound(log_w) - objective.bound(replaced)
            torch.testing.assert_close(found[k], expected)


def test_of_a_mean_it_is_the_leave_one_out_baseline():
    """Kool et al. (2019): each less the mean of the others, over K."""
    log_w = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    by_hand = torch.stack(
        [(log_w[k] - torch.cat([log_w[:k], log_w[k + 1 :]]).mean(0)) / 5 for k in range(5)]
    )
    torch.testing.assert_close(leave_one_out_mean(log_w), by_hand)
    torch.testing.assert_close(leave_one_out(Elbo(5).bound, log_w), by_hand)


@pytest.mark.parametrize("name", SPREAD)
def test_the_density_at_fixed_draws_is_that_of_the_draw(name):
    guide = perturb(guide_for(name, Density(gaussian(2)[0]), Density(local_model(n=2))), size=0.3)
    torch.manual_seed(0)
    with torch.no_grad():
        draw = guide.draw(3)
        shared, local = guide.log_q(draw)
    torch.testing.assert_close(shared, draw.shared, rtol=1e-8, atol=1e-8)
    for plate, rows in draw.local.items():
        torch.testing.assert_close(local[plate], rows, rtol=1e-8, atol=1e-8)


# -- the mean ---------------------------------------------------------------------------------


def assert_same_mean(guide, objective, draws=200, **options):
    """Score against the low-noise estimator, each on its own noise: within 4 s.e. along 3 directions."""
    torch.manual_seed(5)
    both = [
        torch.stack([gradient(guide, objective, name, **options) for _ in range(draws)])
        for name in ("score", "dreg")
    ]
    directions = torch.randn(both[0].shape[1], 3)
    score, dreg = (found @ directions for found in both)
    error = ((score.var(0) + dreg.var(0)) / draws).sqrt()
    assert bool(((score.mean(0) - dreg.mean(0)).abs() < 4 * error).all())
    # The comparison says something: the mean is not lost in that noise.
    assert bool((dreg.mean(0).abs() > 4 * error).any())


def test_with_a_global_latent_and_minibatches():
    guide = perturb(guides.make("amortized", local_and_global_model(), hidden=4), size=0.3)
    assert_same_mean(guide, Elbo(8), index={"datum": torch.tensor([0, 3])})


@pytest.mark.slow
def test_with_encoders_that_see_the_globals():
    guide = perturb(
        guides.make("amortized", local_and_global_model(), hidden=4, conditioned=True), size=0.3
    )
    assert_same_mean(guide, Elbo(8))


def test_with_two_plates_whose_latents_meet():
    def model(y):
        with pyro.plate("row", 2, dim=-2):
            a = pyro.sample("a", dist.Normal(torch.zeros(2, 1), 1.0))
        with pyro.plate("column", 3, dim=-1):
            b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0))
        with pyro.plate("row_", 2, dim=-2), pyro.plate("column_", 3, dim=-1):
            pyro.sample("y", dist.Normal(a + b, 0.5), obs=y)

    density = Density(vi.Model(model, torch.arange(6.0).reshape(2, 3)))
    plates = [density.structure.plates[name] for name in ("row", "column")]
    guide = perturb(guides.per_datum(guides.MeanField(), density, plates), size=0.3)
    assert_same_mean(guide, Elbo(8))


@pytest.mark.parametrize(
    "objective", [Iwae(4), pytest.param(Renyi(-1.0, 4), marks=pytest.mark.slow)], ids=repr
)
def test_with_a_bound_per_datum(objective):
    guide = perturb(guides.make("amortized", local_model(n=3), hidden=4), size=0.3)
    assert_same_mean(guide, objective)


# -- where nothing else works -----------------------------------------------------------------


class Held(Family):
    """A normal whose draws have no derivative, as those of a discrete or a rejection sampler."""

    reparameterised = False

    def __init__(self, dim):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(dim))
        self.log_scale = nn.Parameter(torch.zeros(dim))

    def forward(self, context=None):
        return dist.Normal(self.loc, self.log_scale.exp()).to_event(1)


def held_guide(model):
    density = Density(model)
    return Guide("held", density, {density.block: Held(density.dim)})


def test_a_guide_without_derivatives_is_trained_by_the_score_function():
    model, mean, covariance = gaussian(2)
    guide = held_guide(model)
    assert not guide.draw(2).flat["latent"].requires_grad
    posterior = vi.fit(model, guide, Elbo(64), seed=0)
    assert posterior.record.estimator == "score"
    family = guide.families["latent"]
    sd = torch.linalg.inv(covariance).diagonal().rsqrt()
    # The best mean field has the precision's diagonal; a tolerance of 0.01 nats is 0.14 sds of a mean.
    assert bool(((family.loc.detach() - mean).abs() < 0.15 * sd).all())
    assert bool(((family.log_scale.detach().exp() / sd - 1).abs() < 0.15).all())


@pytest.mark.parametrize("estimator", ["pathwise", "dreg"])
def test_other_estimators_are_refused_for_it(estimator):
    model = gaussian(2)[0]
    with pytest.raises(OptionError, match=r"no derivative.*estimator='score'"):
        vi.fit(model, held_guide(model), Elbo(4), estimator=estimator)


def test_it_is_chosen_only_where_nothing_else_is_defined():
    assert chosen(held_guide(gaussian(2)[0]), Iwae(4)) == "score"
    guide = guides.make("mean_field", gaussian(2)[0])
    assert chosen(guide, Iwae(4)) == "dreg"
    assert chosen(guide, Renyi(-math.inf, 4)) == "pathwise"


# -- refusals ---------------------------------------------------------------------------------


def test_one_particle_has_no_baseline():
    with pytest.raises(OptionError, match="particles=2"):
        vi.fit(two_scales_model(), "mean_field", Elbo(1), estimator="score")


def test_a_point_has_no_score():
    guide = guides.make("delta", two_scales_model())
    assert "pathwise" in str(obstacle(guide, Elbo(4), "score"))


def test_a_shared_draw_has_no_baseline():
    with pytest.raises(OptionError, match=r"share one draw of the globals.*objective='elbo'"):
        vi.fit(local_and_global_model(), "amortized", "iwae", estimator="score")


def test_stock_pyro_has_its_own():
    with pytest.raises(OptionError, match="leave out engine='pyro'"):
        vi.fit(two_scales_model(), "mean_field", "elbo", estimator="score", engine="pyro")
