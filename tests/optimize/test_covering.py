"""Rounds of forward and reverse KL on fixed draws: where they lead, and what they never lose."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from toys import gaussian, load, local_model, perturb, two_scales_model

import pyro_vi_kit as vi
from pyro_vi_kit import guides
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.objectives import Annealed
from pyro_vi_kit.optimize.deterministic import fixed_draws, forward_kl_refinement
from pyro_vi_kit.optimize.deterministic.search import Search, sobol_normals

pytestmark = pytest.mark.usefixtures("float64")

SMALL = {
    "affine_coupling": {"layers": 2, "hidden": (4,)},
    "autoregressive": {"layers": 2, "hidden": (4,)},
    "neural_spline": {"layers": 2, "hidden": (4,), "bins": 3},
}


@pytest.fixture
def few(monkeypatch):
    """Fewer draws and evaluations than a fit has."""
    monkeypatch.setattr(forward_kl_refinement, "_DRAWS", 512)
    monkeypatch.setattr(forward_kl_refinement, "_DRAWS_PER_PARAMETER", 1)
    monkeypatch.setattr(forward_kl_refinement, "_FORWARD", 60)
    monkeypatch.setattr(forward_kl_refinement, "_REVERSE", 40)


def flow(model, name="affine_coupling", spread=0.0):
    guide = guides.make(name, model, init_scale=1.0, **SMALL[name])
    return perturb(guide, size=spread) if spread else guide


def rounds_of(guide, seed=0):
    search = Search(guide.density, seed)
    return forward_kl_refinement._Rounds(search, guide.families["latent"])


def values(guide):
    return torch.cat([p.detach().reshape(-1) for p in guide.parameters()])


def improve(guide, tolerance=0.01):
    # By the draws of some seeds the weights are too uneven to begin with, rightly.
    return forward_kl_refinement.improve(guide, Search(guide.density, 3, tolerance=tolerance))


def test_sobol_normals_have_the_moments_of_normals():
    """Their error is far below 1 / sqrt(4096) = 0.016, that of independent draws."""
    x = sobol_normals(4096, 3, seed=0)
    torch.testing.assert_close(x.mean(0), torch.zeros(3), rtol=0, atol=2e-3)
    torch.testing.assert_close(x.T @ x / 4096, torch.eye(3), rtol=0, atol=1e-2)
    assert bool((x == sobol_normals(4096, 3, seed=0)).all())
    assert bool((x != sobol_normals(4096, 3, seed=1)).any())


@pytest.mark.parametrize("name", SMALL)
def test_a_gaussian_posterior_is_met(few, name):
    """It contains the posterior: KL 0, seen by 2,000 draws of an optimum with even weights."""
    guide = flow(gaussian(2)[0], name)
    made = improve(guide)
    assert made > 512
    with torch.no_grad():
        log_w = guide.weigh(guide.draw(2000)).shared
    assert float(-log_w.mean()) < 0.02


def test_the_elbo_is_the_mean_log_weight():
    guide = flow(two_scales_model(), spread=0.3)
    with torch.no_grad():
        log_w = guide.weigh(guide.draw(20_000)).shared
    # Four standard errors of the draws; Sobol points have next to none.
    slack = 4 * float(log_w.std()) / 20_000**0.5
    assert rounds_of(guide).elbo() == pytest.approx(float(log_w.mean()), abs=slack)


def test_a_round_gains_where_the_best_gaussian_falls_short(few):
    """The ELBO, by draws that nothing was fitted to; forward KL alone need not gain any of it."""
    guide = flow(load("banana").MODEL)
    best = fixed_draws.prefit(Search(guide.density, 0), None).best
    guide.families["latent"].start_from(best.loc, best.scale_tril)
    rounds = rounds_of(guide)
    before = rounds.elbo()
    assert rounds.forward(0)
    covered = rounds.elbo()
    rounds.reverse(0)
    assert rounds.elbo() > max(before, covered) + 0.1


def test_uneven_weights_are_not_believed(few):
    """A flow of sd 1 at 0, a posterior of sd 0.01 at 4: one draw has all the weight."""
    model = vi.Model(lambda: pyro.sample("x", dist.Normal(torch.full((2,), 4.0), 0.01).to_event(1)))
    guide = flow(model)
    before = values(guide)
    assert not rounds_of(guide).forward(0)
    improve(guide)
    assert bool((values(guide) == before).all())


def test_the_best_is_kept(few, monkeypatch):
    guide = flow(gaussian(2)[0], spread=0.1)
    before = values(guide)

    def spoil(self, turn):
        self.write(self.read() + 1.0)

    monkeypatch.setattr(forward_kl_refinement._Rounds, "reverse", spoil)
    improve(guide)
    assert bool((values(guide) == before).all())


def test_an_interrupt_keeps_the_best_too(few, monkeypatch):
    guide = flow(gaussian(2)[0], spread=0.1)
    before, evaluate = values(guide), Search.evaluate
    calls = []

    def interrupted(self, z, **options):
        calls.append(len(z))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return evaluate(self, z, **options)

    monkeypatch.setattr(Search, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        improve(guide)
    found = rounds_of(guide).elbo()
    with torch.no_grad():
        rounds = rounds_of(guide)
        rounds.write(before)
    assert found >= rounds.elbo()


def test_small_flows_over_few_data_are_improved():
    model = two_scales_model()
    assert forward_kl_refinement.applies_to(flow(model))
    assert not forward_kl_refinement.applies_to(guides.make("full_rank", model))
    assert not forward_kl_refinement.applies_to(
        guides.make("affine_coupling", model, hidden=(200, 200))
    )
    assert not forward_kl_refinement.applies_to(
        guides.make("amortized", local_model(n=4), hidden=4)
    )
    assert not forward_kl_refinement.applies_to(flow(two_scales_model(n=10_000)))
    assert not forward_kl_refinement.applies_to(lambda: None)


@pytest.mark.parametrize("name", SMALL)
def test_hidden_biases_break_the_symmetry_and_nothing_else(name):
    """An odd network gives log scales that change their sign with x; drawn biases end that."""
    family = flow(gaussian(2)[0], name).families["latent"]
    x = torch.randn(50, 2)
    before, log_det = family.bend(x)
    torch.manual_seed(0)
    family.break_symmetry()
    after, still = family.bend(x)
    torch.testing.assert_close(after, before)
    torch.testing.assert_close(still, log_det)
    hidden = [b for m in family.modules() for b in list(getattr(m, "biases", ()))[:-1]]
    assert hidden
    assert all(bool((b != 0.0).all()) for b in hidden)


def test_an_annealed_fit_counts_the_evaluations_of_its_rounds(few, monkeypatch):
    seen = []

    def counted(guide, search, **options):
        seen.append(search.seed)
        return 123

    monkeypatch.setattr(forward_kl_refinement, "improve", counted)
    spec = guides.AffineCoupling(layers=2, hidden=(4,))
    objective = Annealed(particles=8, steps=50)
    found = vi.fit(gaussian(2)[0], spec, objective, seed=7, steps=100)
    assert seen == [7]
    assert found.evaluations == 8 * len(found.losses) + 123
    seen.clear()
    vi.fit(gaussian(2)[0], "mean_field", objective, seed=7, steps=100)
    vi.fit(gaussian(2)[0], spec, "elbo", seed=7, steps=100)
    assert seen == []


def test_density_of_the_annealed_start_is_raised_to_a_power():
    density = Density(two_scales_model())
    z = torch.randn(4, density.dim)
    whole = Search(density, 0).evaluate(z)
    part = Search(density, 0, power=0.25).evaluate(z)
    for found, expected in zip(part, whole, strict=True):
        torch.testing.assert_close(found, 0.25 * expected)
