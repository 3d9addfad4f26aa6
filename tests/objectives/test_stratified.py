"""The stratified estimator of mixtures: exact gradients by quadrature, less noise, capture, refusals."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from discrete_toys import Y, by_index
from toys import local_and_global_model, local_model, perturb, two_scales_model

import pyro_vi_kit as vi
from pyro_vi_kit import guides, objectives
from pyro_vi_kit.core.contracts import Batch
from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.guides import Guide, Mixture
from pyro_vi_kit.guides.local.local import LocalFamily, Table
from pyro_vi_kit.guides.mixtures.mixture import MixtureHead, MixtureNormal
from pyro_vi_kit.guides.mixtures.normal_mixture import NormalMixture
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.objectives import REGISTRY, Annealed, Beta, Elbo, Iwae, Renyi
from pyro_vi_kit.objectives.estimators import obstacle, surrogate
from pyro_vi_kit.optimize.engines import EagerEngine

pytestmark = pytest.mark.usefixtures("float64", "own_param_store")

LOGITS, LOCS, SDS = [0.4, -0.3], [-1.0, 0.8], [0.6, 0.9]
# The target, and so the guide that is the posterior.
SHARES, MODES, WIDTHS = [1 / 3, 2 / 3], [-2.0, 1.0], [0.5, 1.0]
UPDATES = 30.0
SINGLE = [Elbo(2), Renyi(1.0, 2), Beta(0.5, 2), Annealed(2, first=0.2, steps=100)]
SEVERAL = [Iwae(1), Iwae(2), Renyi(0.5, 2), Renyi(2.0, 1)]
each_objective = pytest.mark.parametrize("objective", SINGLE + SEVERAL, ids=repr)


def log_target(z):
    """Two modes, normalised: the log evidence is 0."""
    shares, locs, sds = (torch.tensor(v) for v in (SHARES, MODES, WIDTHS))
    return torch.logsumexp(shares.log() + dist.Normal(locs, sds).log_prob(z[..., None]), -1)


def two_modes():
    """One latent whose posterior that is."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("p", log_target(z) - dist.Normal(0.0, 1.0).log_prob(z))


def two_modes_each(y):
    """One such latent for each row; y says nothing of it."""
    with pyro.plate("datum", len(y)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
        pyro.factor("p", log_target(z) - dist.Normal(0.0, 1.0).log_prob(z))
        pyro.sample("y", dist.Normal(torch.zeros(len(y)), 1.0), obs=y)


def global_guide(covariance="diagonal", logits=LOGITS, locs=LOCS, sds=SDS):
    """The guide, and its parameters in the order of `exact_gradient`."""
    options = {"components": len(logits), "covariance": covariance}
    guide = guides.make("mixture", vi.Model(two_modes), **options)
    family = guide.families["latent"]
    family.logits.data = torch.tensor(logits)
    family.loc.data = torch.tensor(locs)[:, None]
    family.log_diagonal.data = torch.tensor(sds).log()[:, None]
    return guide, [family.logits, family.loc, family.log_diagonal]


def row_guide(rows, logits=LOGITS, locs=LOCS, sds=SDS):
    """Rows of equal posteriors with guide parameters of their own, and the table of these."""
    density = Density(vi.Model(two_modes_each, torch.zeros(rows)))
    (block,) = guides.per_datum(Mixture(), density, [*density.structure.plates.values()]).blocks
    numbers = torch.tensor([*logits, *locs, *map(math.log, sds)]).expand(rows, -1)
    table = Table(numbers)
    return Guide("mixture", density, {block: LocalFamily(table, MixtureHead(1, 2))}), [table.rows]


def estimate(guide, of, objective, estimator, *, particles=None, seed=0):
    """The bound, and its gradient upwards."""
    torch.manual_seed(seed)
    bound, loss = surrogate(
        guide,
        objective,
        particles or objective.particles,
        Batch(updates=torch.tensor(UPDATES)),
        share=objective.multi_sample and guide.blocks[0].plate is not None,
        estimator=estimator,
    )
    return bound, torch.autograd.grad(-loss, of, allow_unused=True, materialize_grads=True)


def gradients(objective, estimator, rows=4000, **options):
    """Of so many replicates, each a row: `[rows, 6]`."""
    particles = options.pop("particles", None)
    guide, of = row_guide(rows, **options)
    return estimate(guide, of, objective, estimator, particles=particles)[1][0]


# -- the mean, by quadrature ------------------------------------------------------------------


def exact_gradient(objective):
    """Gradient of the expected stratified bound in logits, means and log sds, `[6]`, upwards.

    The trapezoid rule over the noise: of one draw of each component for a mean of log weights, and over
    all T C = 2 or 4 draws for a multi-sample bound.
    """
    numbers = [torch.tensor(v).requires_grad_() for v in (LOGITS, LOCS, [*map(math.log, SDS)])]
    logits, locs, log_sds = numbers
    log_shares = logits.log_softmax(0)

    def log_w(z):
        parts = dist.Normal(locs, log_sds.exp()).log_prob(z[..., None])
        log_q = torch.logsumexp(log_shares + parts, -1)
        if isinstance(objective, Beta):
            prior = dist.Normal(0.0, 1.0).log_prob(z)
            return log_target(z) - prior + objective.beta * (prior - log_q)
        t = objective.power(torch.tensor(UPDATES)) if isinstance(objective, Annealed) else 1.0
        return t * log_target(z) - log_q

    draws = 2 * objective.particles if objective.multi_sample else 1
    grid = torch.linspace(-7.0, 7.0, 41 if draws == 4 else 801)
    mass = (-0.5 * grid**2).softmax(0)
    each = [log_w(locs[c] + log_sds[c].exp() * grid) for c in range(2)]
    if not objective.multi_sample:
        value = sum(log_shares[c].exp() * (mass * each[c]).sum() for c in range(2))
        return torch.cat(torch.autograd.grad(value, numbers))
    power, total, weight = 1.0 - objective.order, torch.zeros(()), torch.ones(())
    for i in range(draws):
        along = [1] * i + [-1] + [1] * (draws - 1 - i)
        term = (log_shares[i % 2] + power * each[i % 2]).exp() / objective.particles
        total, weight = total + term.reshape(along), weight * mass.reshape(along)
    return torch.cat(torch.autograd.grad((weight * total.log()).sum() / power, numbers))


@each_objective
def test_the_mean_gradient_is_that_of_quadrature(objective):
    """Six numbers, of which the two in the logits are one, each within 3 standard errors."""
    found, exact = gradients(objective, "stratified"), exact_gradient(objective)
    error = found.std(0) / math.sqrt(len(found))
    assert bool(((found.mean(0) - exact).abs() < 3.0 * error).all())
    # And the error is small enough to tell: a tenth of the gradient's length.
    assert float(error.norm()) < 0.1 * float(exact.norm())


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
@each_objective
def test_of_all_latents_it_is_what_it_is_of_a_row(objective, covariance):
    """The same draws in another shape: the same numbers."""
    bounds, slopes = [], []
    for guide, of in (global_guide(covariance), row_guide(1)):
        bound, parts = estimate(guide, of, objective, "stratified")
        bounds.append(bound)
        slopes.append(torch.cat([part.reshape(-1) for part in parts]))
    torch.testing.assert_close(slopes[1], slopes[0])
    if not isinstance(objective, Beta | Annealed):
        # The datum has a likelihood of its own.
        torch.testing.assert_close(bounds[1] + 0.5 * math.log(2.0 * math.pi), bounds[0])


def test_globals_that_are_a_mixture_weigh_what_the_rows_say_too():
    """The mean of another estimator, along three directions at 3.5 standard errors."""
    spec = guides.Amortized(globals=Mixture(2), hidden=4)
    guide = perturb(guides.make(spec, local_and_global_model()), size=0.5)
    differences = []
    for seed in range(150):
        ours = estimate(guide, [*guide.parameters()], Elbo(8), "stratified", seed=2 * seed)[1]
        other = estimate(guide, [*guide.parameters()], Elbo(16), "dreg", seed=2 * seed + 1)[1]
        pairs = zip(ours, other, strict=True)
        differences.append(torch.cat([(a - b).reshape(-1) for a, b in pairs]))
    along = torch.stack(differences) @ torch.randn(len(differences[0]), 3)
    assert bool((along.mean(0).abs() < 3.5 * along.std(0) / math.sqrt(150)).all())


# -- the bound --------------------------------------------------------------------------------


def test_the_bound_is_between_that_of_as_many_draws_and_the_evidence():
    """By Jensen's inequality: E log of a mean over components is above the mean of the logs."""
    guide, of = row_guide(4000)
    evidence = -0.5 * math.log(2.0 * math.pi)
    bounds = [
        float(estimate(guide, of, Iwae(2), name)[0]) / 4000 for name in ("pathwise", "stratified")
    ]
    # Bounds of single rows have sds below 0.7, so that each mean is known to 0.011.
    assert bounds[0] + 3 * 0.016 < bounds[1] < evidence + 3 * 0.011


def test_draws_of_each_component_are_normals_and_come_in_pairs():
    logits, locs = torch.tensor([0.3, -0.2]), torch.tensor([[0.0, 1.0], [2.0, -1.0]])
    trils = torch.tensor([[[1.0, 0.0], [0.5, 2.0]], [[0.3, 0.0], [-0.2, 0.1]]])
    q = NormalMixture(logits, locs, trils)
    torch.manual_seed(0)
    draws = q.rsample_each(20_000)
    assert draws.shape == (20_000, 2, 2)
    for c in range(2):
        # Five standard errors of a covariance of 20,000 draws with variances up to 4.25.
        torch.testing.assert_close(
            draws[:, c].T.cov(), trils[c] @ trils[c].T, rtol=0.0, atol=5 * 4.25 * 0.01
        )
    pairs = q.rsample_each(4, mirrored=True)
    torch.testing.assert_close(pairs[:2] + pairs[2:], (2 * locs).expand(2, 2, 2))
    rows = MixtureNormal(torch.zeros(5, 2), torch.zeros(5, 2, 3), torch.ones(5, 2, 3))
    assert rows.rsample_each(4).shape == (4, 2, 5, 3)
    assert rows.log_shares.shape == (2, 5)


# -- the variance -----------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [Elbo(2), *SEVERAL], ids=repr)
def test_where_q_is_the_posterior_the_gradient_has_no_noise(objective):
    at = {"logits": [math.log(s) for s in SHARES], "locs": MODES, "sds": WIDTHS, "rows": 50}
    noisy = gradients(objective, "pathwise", particles=2 * objective.particles, **at)
    assert float(noisy.var(0).sum()) > 0.01
    assert float(gradients(objective, "stratified", **at).abs().max()) < 1e-12


@pytest.mark.parametrize(
    ("objective", "estimator"),
    [(Elbo(4), "pathwise"), (Elbo(4), "dreg"), (Iwae(4), "pathwise")],
    ids=str,
)
def test_weights_and_small_components_have_less_noise(objective, estimator):
    """As many draws in all. A component of weight 0.05 is seldom drawn, and here as often as the other.

    Variances of 4,000 gradients are known to some 5 %, heavy tails counted.
    """
    at = {"logits": [math.log(0.05), math.log(0.95)], "locs": [-2.4, 1.2]}
    ours = gradients(objective, "stratified", **at).var(0)
    other = gradients(objective, estimator, particles=8, **at).var(0)
    small = [0, 2]  # its logit and its mean
    assert bool((ours[small] < 0.7 * other[small]).all())


# -- in a fit ---------------------------------------------------------------------------------


def test_a_fit_takes_it_by_name_and_goes_on_with_it():
    model, guide = vi.Model(two_modes), Mixture(2, init_scale=1.0)
    # From the origin two starts of six (seeds 0 and 2) end with both components at the larger mode.
    options = {"estimator": "stratified", "init": "origin", "seed": 1}
    posterior = vi.fit(model, guide, "elbo", **options)
    assert (posterior.method, posterior.record.estimator) == ("stochastic", "stratified")
    # The posterior is in the family: what is left is the tolerance of 0.01 nats.
    assert posterior.elbo > -0.01
    weights = posterior.approximation.guide.families["latent"].logits.softmax(0)
    assert sorted(weights.tolist()) == pytest.approx(SHARES, abs=0.02)
    assert vi.fit(model, resume=posterior, steps=20).record.estimator == "stratified"


def test_looks_at_a_multi_sample_fit_are_of_the_bound_that_is_trained():
    guide, _ = global_guide()
    means = [
        float(EagerEngine(guide, Iwae(2), seed=0, estimator=name).evaluate(2000).mean())
        for name in ("pathwise", "stratified")
    ]
    # As above, where both and their errors were found by steps: 0.05 apart, errors below 0.01.
    assert means[0] + 0.02 < means[1] < 0.02


# -- where it is defined ----------------------------------------------------------------------


@pytest.mark.parametrize("name", REGISTRY)
def test_it_is_for_bounds_that_are_power_means(name):
    made = objectives.make(name, particles=4)
    defined = made.order is not None and name != "elbo_analytic"
    assert ("stratified" in made.estimators) == defined
    assert (obstacle(global_guide()[0], made, "stratified") is None) == defined


def test_vr_max_is_no_power_mean():
    reason = obstacle(global_guide()[0], Renyi(-math.inf, 2), "stratified")
    assert reason is not None
    assert "estimator='pathwise' or estimator='score'" in reason


def test_other_guides_are_refused_with_the_remedy():
    with pytest.raises(OptionError, match=r"'stratified' cannot work here.*use guide='mixture'"):
        vi.fit(two_scales_model(), "mean_field", estimator="stratified")
    with pytest.raises(OptionError, match="leave estimator= out, or leave out engine='pyro'"):
        vi.fit(vi.Model(two_modes), "mixture", estimator="stratified", engine="pyro")
    with pytest.raises(OptionError, match="trained by estimator='dreg' or estimator='score'"):
        vi.fit(vi.Model(two_modes), "mixture", "forward_kl", estimator="stratified")


def obstacle_of(spec, model, objective):
    return obstacle(guides.make(spec, model), objective, "stratified") or ""


def test_mixtures_that_would_be_crossed_are_refused():
    both = guides.Amortized(local="mixture", globals=Mixture(2))
    assert "2 mixtures" in obstacle_of(both, local_and_global_model(), Elbo())
    shared = guides.Amortized(globals=Mixture(2))
    assert "share one draw" in obstacle_of(shared, local_and_global_model(), Iwae())
    assert not obstacle_of(shared, local_and_global_model(), Elbo())
    conditioned = guides.Amortized(local="mixture", conditioned=True)
    assert "conditioned=" in obstacle_of(conditioned, local_and_global_model(), Elbo())
    local = guides.Amortized(local="mixture")
    assert not obstacle_of(local, local_model(), Iwae())
    scored = guides.Amortized(globals=Mixture(2), discrete="score")
    assert "discrete" in obstacle_of(scored, vi.Model(by_index, Y), Elbo())


def test_rows_that_know_of_each_other_are_refused():
    def chained(y):
        with pyro.plate("datum", len(y)):
            z = pyro.sample("z", dist.Normal(y.new_zeros(len(y)), 1.0))
            pyro.sample("y", dist.Normal(z.cumsum(-1), 1.0), obs=y)

    model = vi.Model(chained, torch.tensor([0.1, 0.5, -0.2]))
    spec = guides.Amortized(local="mixture")
    assert "changes the terms of others" in obstacle_of(spec, model, Elbo())
