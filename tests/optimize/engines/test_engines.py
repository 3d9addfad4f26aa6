"""The engines agree step by step, skip what is not finite, and leave the user's state alone."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn
from toys import (
    SEARCHED,
    gaussian,
    guide_for,
    is_local,
    local_and_global_model,
    local_model,
    perturb,
    two_scales_model,
)

import pyro_vi_kit as vi
from pyro_vi_kit import guides
from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.core.runtime import RandomStream
from pyro_vi_kit.fitting import schedule
from pyro_vi_kit.guides import REGISTRY
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.objectives import Elbo, Iwae, Renyi
from pyro_vi_kit.optimize.engines import Batches, EagerEngine, PyroEngine
from pyro_vi_kit.optimize.stochastic.stochastic import Schedule

LOCAL = [name for name in REGISTRY if is_local(name)]
GLOBAL = [name for name in REGISTRY if name not in LOCAL]
SPREAD = [name for name in GLOBAL if name != "delta"]
OBJECTIVES = [Elbo(5), Iwae(5), Renyi(0.5, 5), Renyi(2.0, 3), Renyi(1.0, 4)]


@pytest.fixture(autouse=True)
def nothing_global_changes():
    """The user's parameters, random state and defaults are theirs, in every test of this file."""
    pyro.param("users_own", torch.tensor(1.5))
    rng, dtype, threads = torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads()
    yield
    assert list(pyro.get_param_store().keys()) == ["users_own"]
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.get_default_dtype() is dtype
    assert torch.get_num_threads() == threads
    pyro.clear_param_store()


@pytest.fixture
def short_fits(monkeypatch):
    """Stochastic fits of 40 steps."""

    def short(**options):
        return Schedule(**{**options, "window": 20, "max_steps": 40, "replicates": 4})

    monkeypatch.setattr(schedule, "Schedule", short)


def pair(name, model, objective, seed=3, **options):
    """Both engines on the same initial guide."""
    density = Density(model)
    first, second = (perturb(guides.make(name, density, **options)) for _ in range(2))
    eager = EagerEngine(first, objective, seed=seed)
    literal = PyroEngine(model, second, objective, seed=seed, density=density)
    return eager, literal


def step(engine, rate):
    """One update; its estimate of the bound."""
    return float(engine.run(1, rate).bounds)


# -- the same numbers -------------------------------------------------------------------------


def model_of_two(y):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    s = pyro.sample("s", dist.HalfNormal(1.0))
    with pyro.plate("datum", len(y)):
        pyro.sample("y", dist.Normal(m, s), obs=y)


# A t takes 18 numbers for a draw in two dimensions.
@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@pytest.mark.parametrize("name", [name for name in SPREAD if name != "student_t"])
def test_both_engines_take_the_same_steps_on_global_latents(name, objective):
    """Bounds, gradients and parameters of five steps on the same noise.

    Torch draws fewer than 16 normals one by one, so K draws of `[D]` are one draw of `[K, D]`.
    """
    # A factor has noise of its own, and a component is chosen by it: one more number here.
    options = {"rank": 1} if name == "low_rank" else {}
    # So has the choice of a component or a path.
    extra = name in ("low_rank", "mixture", "pathfinder")
    assert objective.particles * (2 + extra) < 16
    model = vi.Model(model_of_two, torch.tensor([0.3, 1.0, -0.5]))
    eager, literal = pair(name, model, objective, **options)
    for _ in range(5):
        assert step(eager, 0.01) == pytest.approx(step(literal, 0.01), rel=1e-9)
        torch.testing.assert_close(*map(parameters_of, (eager, literal)), rtol=1e-9, atol=1e-9)
    assert eager.skipped == literal.skipped == 0


def parameters_of(engine):
    return dict(engine.guide.named_parameters())


@pytest.mark.parametrize("name", GLOBAL)
def test_the_elbo_of_one_draw_is_the_same_in_more_dimensions(name):
    eager, literal = pair(name, two_scales_model(), Elbo(1))
    for _ in range(3):
        assert step(eager, 0.01) == pytest.approx(step(literal, 0.01), rel=1e-9)
        torch.testing.assert_close(*map(parameters_of, (eager, literal)), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("objective", [Elbo(4), Iwae(4), Renyi(0.5, 4)], ids=repr)
@pytest.mark.parametrize("name", LOCAL)
def test_both_engines_take_the_same_steps_on_local_latents(name, objective):
    eager, literal = pair(name, local_model(n=3), objective)
    for _ in range(5):
        assert step(eager, 0.01) == pytest.approx(step(literal, 0.01), rel=1e-9)
        torch.testing.assert_close(*map(parameters_of, (eager, literal)), rtol=1e-9, atol=1e-9)


def test_gradients_are_those_of_the_stock_loss():
    eager, literal = pair(
        "full_rank", vi.Model(model_of_two, torch.tensor([0.3, 1.0])), Renyi(0.5, 5)
    )
    with RandomStream(3, "steps"):
        _, gradient = eager.gradient(None)
    expected = [
        part.reshape(p.shape)
        for part, p in zip(
            gradient.split([p.numel() for p in eager.guide.parameters()]),
            eager.guide.parameters(),
            strict=True,
        )
    ]
    found = []
    optimiser = literal._optim
    literal._svi.optim = lambda params: found.extend(
        p.grad.clone() for p in literal.guide.parameters()
    )
    literal.run(1, 0.0)
    assert optimiser.skipped == 0
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_learned_parameters_of_the_model_move_alike():
    with RandomStream(0):
        network = nn.Linear(1, 1)
    own = network.weight.detach().clone()

    def model(y):
        net = pyro.module("net", network)
        sd = pyro.param("sd", torch.tensor(0.7), constraint=dist.constraints.positive)
        with pyro.plate("datum", len(y)) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(net(z[..., None])[..., 0], sd), obs=y[index])

    y = torch.tensor([0.5, -1.0, 2.0])
    eager, literal = pair("amortized", vi.Model(model, y), Elbo(4))
    for _ in range(5):
        assert step(eager, 0.01) == pytest.approx(step(literal, 0.01), rel=1e-6)
    assert set(eager.params) == set(literal.params) == {"net$$$weight", "net$$$bias", "sd"}
    for name, value in eager.params.items():
        torch.testing.assert_close(value.detach(), literal.params[name], rtol=1e-6, atol=1e-6)
        assert not torch.equal(value.detach(), eager.guide.density.params[name])
    assert torch.equal(network.weight, own)
    assert network.weight.grad is None


@pytest.mark.parametrize("objective", [Elbo(3), Iwae(3)], ids=repr)
@pytest.mark.parametrize("engine", ["eager", "pyro"])
def test_evaluations_use_the_same_noise_at_every_call(engine, objective):
    made = pair("full_rank", gaussian(2)[0], objective)[["eager", "pyro"].index(engine)]
    first = made.evaluate(6)
    assert first.shape == (6,)
    assert len(first.unique()) == 6
    assert torch.equal(first, made.evaluate(6))
    made.run(1, 0.05)
    assert not torch.equal(first, made.evaluate(6))


@pytest.mark.parametrize("engine", ["eager", "pyro"])
def test_the_same_seed_takes_the_same_steps(engine):
    def run(seed):
        which = pair("affine_coupling", gaussian(3)[0], Elbo(2), seed)
        made = which[["eager", "pyro"].index(engine)]
        return made.run(3, 0.01).bounds.tolist()

    assert run(1) == run(1)
    assert run(1) != run(2)


# -- what is not finite -----------------------------------------------------------------------


def sometimes_nan(bad):
    """NaN where z < -0.6, of the value or of the gradient alone; runs at the origin are fine."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    if bad == "value":
        pyro.factor("f", torch.where(z < -0.6, torch.full_like(z, math.nan), z))
    else:
        # The gradient of the branch that is not taken is NaN.
        pyro.factor("f", torch.where(z < -0.6, torch.zeros_like(z), (z + 0.6).sqrt()))


@pytest.mark.parametrize("engine", ["eager", "pyro"])
@pytest.mark.parametrize("bad", ["value", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(engine, bad):
    model = vi.Model(sometimes_nan, bad)
    guide = guides.make("mean_field", Density(model), init_scale=1.0)
    made = (
        EagerEngine(guide, Elbo(1), seed=0)
        if engine == "eager"
        else PyroEngine(model, guide, Elbo(1), seed=0, density=guide.density)
    )
    skipped = []
    for _ in range(12):
        before = [p.detach().clone() for p in guide.parameters()]
        count = made.skipped
        bound = step(made, 0.01)
        same = [torch.equal(a, b) for a, b in zip(before, guide.parameters(), strict=True)]
        skipped.append(made.skipped > count)
        assert all(same) if skipped[-1] else not any(same)
        assert math.isnan(bound) == skipped[-1]
    # A quarter of the draws of N(0, 1) are below -0.6.
    assert 0 < sum(skipped) < 12
    assert made.skipped == sum(skipped)


# -- minibatches ------------------------------------------------------------------------------


def test_minibatches_cover_each_row_once_per_epoch():
    plate = Density(local_model(n=12)).structure.plates["datum"]
    batches = Batches({plate: 4})
    with RandomStream(0):
        epochs = [[batches.next().index["datum"] for _ in range(3)] for _ in range(5)]
    for epoch in epochs:
        assert sorted(torch.cat(epoch).tolist()) == list(range(12))
    assert len({tuple(torch.cat(epoch).tolist()) for epoch in epochs}) == 5


def test_rows_that_do_not_fill_a_minibatch_take_turns():
    plate = Density(local_model(n=7)).structure.plates["datum"]
    batches = Batches({plate: 3})
    with RandomStream(0):
        epochs = [torch.cat([batches.next().index["datum"] for _ in range(2)]) for _ in range(40)]
    assert all(len(epoch.unique()) == 6 for epoch in epochs)
    # Each epoch drops one of 7 at random: 40 epochs miss a given row with probability (6/7)^40.
    assert len({(set(range(7)) - set(epoch.tolist())).pop() for epoch in epochs}) == 7


@pytest.mark.parametrize("size", [0, 7, True, 2.5, "3", -1])
def test_a_minibatch_must_be_a_number_of_rows(size):
    plate = Density(local_model(n=6)).structure.plates["datum"]
    with pytest.raises(OptionError, match="between 1 and the 6 rows of plate 'datum'"):
        Batches({plate: size})


def test_the_eager_engine_trains_on_every_row_of_an_epoch(monkeypatch):
    guide = guides.make("amortized", Density(local_model(n=6)))
    batches = Batches({guide.density.structure.plates["datum"]: 2})
    engine = EagerEngine(guide, Iwae(3), seed=0, batches=batches)
    seen = []
    draw = guide.draw

    def spy(particles, index=None, *, share=False, **options):
        seen.append(index["datum"])
        assert share
        return draw(particles, index, share=share, **options)

    monkeypatch.setattr(guide, "draw", spy)
    for _ in range(3):
        engine.run(1, 0.01)
    assert sorted(torch.cat(seen).tolist()) == list(range(6))


@pytest.mark.parametrize("engine", ["eager", "pyro"])
def test_the_subsampled_elbo_is_unbiased(engine):
    """Mean of 200 minibatch steps of rate 0 against the bound on all data, in standard errors."""
    model = local_model(n=6)
    guide = perturb(guides.make("amortized", Density(model)))
    batches = Batches({guide.density.structure.plates["datum"]: 2})
    made = (
        EagerEngine(guide, Elbo(4), seed=0, batches=batches)
        if engine == "eager"
        else PyroEngine(model, guide, Elbo(4), seed=0, density=guide.density, batches=batches)
    )
    steps = made.run(200, 0.0).bounds
    with RandomStream(1), torch.no_grad():
        full = guide.log_weights(20_000).joint()
    se = math.hypot(float(steps.std()) / math.sqrt(200), float(full.std()) / math.sqrt(20_000))
    assert abs(float(steps.mean()) - float(full.mean())) < 4 * se


# -- what RenyiELBO gets wrong ----------------------------------------------------------------


def literal(model, guide, objective, **options):
    return PyroEngine(model, guide, objective, seed=0, **options)


@pytest.mark.parametrize("objective", [Iwae(4), Renyi(0.5, 4)], ids=repr)
def test_a_multi_sample_bound_on_minibatches_is_refused(objective):
    model = local_model()
    guide = guides.make("amortized", Density(model))
    batches = Batches({guide.density.structure.plates["datum"]: 2})
    with pytest.raises(OptionError, match=r"minibatches of plate 'datum'.*engine='eager'"):
        literal(model, guide, objective, density=guide.density, batches=batches)


def test_a_multi_sample_bound_on_a_plate_that_subsamples_itself_is_refused():
    def model(y):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("people", len(y), subsample_size=2) as index:
            pyro.sample("y", dist.Normal(m, 1.0), obs=y[index])

    subsampled = vi.Model(model, torch.tensor([0.1, 0.4, 1.0, -0.5]))
    guide = guides.make("mean_field", subsampled)
    with pytest.raises(OptionError, match=r"minibatches of plate 'people'.*objective='elbo'"):
        literal(subsampled, guide, Iwae(4), density=guide.density)
    assert math.isfinite(step(literal(subsampled, guide, Elbo(4), density=guide.density), 0.01))


def rate_model(y):
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    pyro.sample("y", dist.Exponential(rate).expand([len(y)]).to_event(1), obs=y)


class NotReparameterised(dist.Gamma):
    has_rsample = False


def score_function_guide(y):
    shape = pyro.param("shape", torch.tensor(2.0), constraint=dist.constraints.positive)
    pyro.sample("rate", NotReparameterised(shape, 1.0))


@pytest.mark.parametrize("objective", [Iwae(4), Renyi(0.5, 4)], ids=repr)
def test_a_site_without_a_reparameterisation_is_refused(objective):
    model = vi.Model(rate_model, torch.tensor([0.5, 1.0]))
    with pytest.raises(OptionError, match=r"site 'rate'.*reparameterised.*objective='elbo'"):
        literal(model, score_function_guide, objective)
    assert math.isfinite(step(literal(model, score_function_guide, Elbo(4)), 0.01))


def test_a_plate_around_every_site_needs_a_guide_that_is_local():
    model = local_model()
    guide = guides.make("mean_field", Density(model))
    with pytest.raises(OptionError, match=r"plate 'datum' encloses every site.*guide='amortized'"):
        literal(model, guide, Iwae(4), density=guide.density)
    local = guides.make("amortized", Density(model))
    assert math.isfinite(step(literal(model, local, Iwae(4), density=local.density), 0.01))


def test_a_local_guide_with_a_global_latent_needs_the_eager_engine():
    model = local_and_global_model()
    guide = guides.make("amortized", Density(model))
    with pytest.raises(OptionError, match=r"site 'm' is outside it.*engine='eager'"):
        literal(model, guide, Iwae(4), density=guide.density)
    assert math.isfinite(step(literal(model, guide, Elbo(4), density=guide.density), 0.01))
    assert math.isfinite(step(EagerEngine(guide, Iwae(4), seed=0), 0.01))


@pytest.mark.parametrize("objective", ["iwae", "renyi"])
def test_the_remedy_works_through_fit(objective, short_fits):
    model = local_model()
    with pytest.raises(OptionError, match="engine='eager'"):
        vi.fit(model, "amortized", objective, engine="pyro", batch_size=2, seed=0)
    assert vi.fit(model, "amortized", objective, engine="eager", batch_size=2, seed=0).bound < 0


# -- the user's state -------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["eager", "pyro"])
@pytest.mark.parametrize("name", [name for name in REGISTRY if name not in SEARCHED])
def test_a_fit_leaves_no_trace(name, engine, short_fits):
    """What `nothing_global_changes` watches, for every guide on every engine."""
    guide = guide_for(name, Density(two_scales_model()), Density(local_model()))
    posterior = vi.fit(guide.density.model, name, method="stochastic", engine=engine, seed=0)
    assert posterior.engine == engine
    assert len(posterior.losses) == 40
    posterior.sample(3, seed=0)
    posterior.verdict  # noqa: B018
    posterior.predict(draws=3, seed=0)


class Decoder(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](1, 2)

    def forward(self, y):
        with pyro.plate("datum", len(y)) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(self.linear(z), 1.0).to_event(1), obs=y[index])


@pytest.mark.parametrize("engine", ["eager", "pyro"])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_the_users_modules_are_not_trained_in_place(engine, batch_size, short_fits):
    with RandomStream(0):
        decoder, y = Decoder(), torch.randn(6, 2)
    before = {key: value.clone() for key, value in decoder.state_dict().items()}
    posterior = vi.fit(
        vi.Model(decoder, y), "amortized", engine=engine, batch_size=batch_size, seed=0
    )
    assert all(torch.equal(before[key], value) for key, value in decoder.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in decoder.parameters())
    learned = posterior.parameters
    assert sorted(value.shape for value in learned.values()) == [(2,), (2, 1)]
    assert not any(
        (torch.as_tensor(value) == own).all()
        for value in learned.values()
        for own in before.values()
        if own.shape == value.shape
    )


# -- Pyro guides of the user's ----------------------------------------------------------------


def normal_guide(y):
    loc = pyro.param("loc", torch.tensor(0.0))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    pyro.sample("m", dist.Normal(loc, scale))


def one_mean(y):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("datum", len(y)):
        pyro.sample("y", dist.Normal(m, 1.0), obs=y)


class ModuleGuide(PyroModule):
    def __init__(self):
        super().__init__()
        self.loc = PyroParam(torch.tensor(0.0))
        self.scale = PyroParam(torch.tensor(1.0), constraint=dist.constraints.positive)
        self.m = PyroSample(lambda self: dist.Normal(self.loc, self.scale))

    def forward(self, y):
        return self.m


Y = torch.tensor([0.9, 1.4, 0.2, 1.1])
USERS_GUIDES = {
    "function": lambda: normal_guide,
    "AutoNormal": lambda: AutoNormal(one_mean),
    "PyroModule": ModuleGuide,
}


@pytest.mark.parametrize("objective", [Elbo(2), Iwae(2)], ids=repr)
@pytest.mark.parametrize("kind", USERS_GUIDES)
def test_a_guide_of_the_users_runs_through_fit(kind, objective, short_fits):
    guide = USERS_GUIDES[kind]()
    model = vi.Model(one_mean, Y)
    posterior = vi.fit(model, guide, objective, seed=0)
    assert posterior.engine == "pyro"
    assert posterior.sample(5, seed=0)["m"].shape == (5,)
    assert posterior.log_weights(5, seed=0).shape == (5,)
    assert posterior.predict(draws=5, seed=0)["y"].shape == (5, 4)
    assert len(posterior.losses) == 40
    again = vi.fit(model, USERS_GUIDES[kind](), objective, seed=0)
    assert again.losses.tolist() == posterior.losses.tolist()


@pytest.mark.slow
def test_a_guide_of_the_users_finds_the_posterior():
    """N(3.6 / 5, 1 / 5), evidence of y ~ N(0, I + 1 1'); the schedule's own stop."""
    posterior = vi.fit(vi.Model(one_mean, Y), normal_guide, seed=0, tol=0.05)
    assert posterior.status.converged
    covariance = torch.eye(4) + torch.ones(4, 4)
    evidence = float(dist.MultivariateNormal(torch.zeros(4), covariance).log_prob(Y))
    # KL to the optimum of at most a few of the schedule's tolerances, noise of the estimate besides.
    assert evidence - 0.1 < posterior.elbo <= evidence + 3 * posterior.elbo_se
    draws = posterior.sample(1000, seed=0)["m"]
    # 1,000 draws: s.e. 0.03 sd of the mean; 0.1 nats of KL are 0.45 sd.
    assert abs(draws.mean() - 0.72) < 0.55 * math.sqrt(0.2)


def test_a_guide_object_of_the_packages_own_is_trained_in_place(short_fits):
    guide = guides.make("full_rank", vi.Model(one_mean, Y), dtype=torch.float64)
    before = [p.detach().clone() for p in guide.buffers()]
    posterior = vi.fit(vi.Model(one_mean, Y), guide, seed=0)
    assert posterior.approximation.guide is guide
    assert not all(torch.equal(a, b) for a, b in zip(before, guide.buffers(), strict=True))


def test_a_users_guide_needs_the_pyro_engine():
    model = vi.Model(one_mean, Y)
    with pytest.raises(OptionError, match="needs engine='pyro'"):
        vi.fit(model, normal_guide, engine="eager", seed=0)
    with pytest.raises(OptionError, match="method='lbfgs' runs the Gaussian guides"):
        vi.fit(model, normal_guide, method="lbfgs", seed=0)
    with pytest.raises(OptionError, match="batch_size= needs a guide of this package"):
        vi.fit(model, normal_guide, batch_size=2, seed=0)


def test_discrete_latents_run_with_a_guide_of_the_users(short_fits):
    def coin(y):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y):
        logit = pyro.param("logit", torch.tensor(0.0))
        pyro.sample("z", dist.Bernoulli(logits=logit))

    posterior = vi.fit(vi.Model(coin, torch.tensor(1.0)), guide, seed=0)
    assert set(posterior.sample(20, seed=0)["z"]) <= {0.0, 1.0}
