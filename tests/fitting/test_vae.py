"""A variational autoencoder from end to end: learned decoder, minibatches, unseen digits."""

import math

import numpy as np
import pytest
import torch
from toys import load

import pyro_vi_kit as vi
from pyro_vi_kit import guides
from pyro_vi_kit.fitting import schedule
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.objectives import Elbo, Iwae
from pyro_vi_kit.optimize.engines import Batches, EagerEngine
from pyro_vi_kit.optimize.stochastic.stochastic import Schedule

pytest.importorskip("sklearn")
SUBSET = 60


@pytest.fixture(scope="module")
def zoo():
    return load("vae")


@pytest.fixture(scope="module")
def short():
    """Fits of 600 steps."""
    patch = pytest.MonkeyPatch()

    def brief(**options):
        return Schedule(**{**options, "window": 100, "max_steps": 600, "replicates": 2})

    patch.setattr(schedule, "Schedule", brief)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def fitted(zoo, short):
    return vi.fit(zoo.MODEL, "amortized", Elbo(1), batch_size=100, seed=0)


def bound_per_digit(guide, params, objective):
    """Mean over digits of a bound on log p(x_i): its estimate and the s.e. of the mean."""
    with torch.no_grad():
        weights = guide.log_weights(objective.particles, params)
    (rows,) = weights.local.values()
    bounds = objective.bound(rows)
    assert not weights.shared.any()
    return float(bounds.mean()), float(bounds.std()) / math.sqrt(len(bounds))


def test_training_improves_the_bound_of_unseen_digits(zoo, fitted):
    """360 digits of 64 pixels. Untrained, a pixel costs about log 2 and a digit some 40 nats."""
    torch.manual_seed(0)
    density = Density(zoo.MODEL.with_args(zoo.TEST), dtype=torch.float32)
    untrained, before_se = bound_per_digit(guides.make("amortized", density), None, Elbo(20))
    unseen = fitted.infer(zoo.TEST).approximation
    trained, after_se = bound_per_digit(unseen.guide, unseen.params, Elbo(20))
    assert trained > untrained + 8 + 3 * math.hypot(before_se, after_se)
    closer, se = bound_per_digit(unseen.guide, unseen.params, Iwae(20))
    assert closer > trained
    assert se < 1


def test_the_users_decoder_is_untouched(zoo, fitted):
    fresh = load("vae").DECODER.state_dict()
    for name, value in zoo.DECODER.state_dict().items():
        assert torch.equal(value, fresh[name])
        assert fitted.parameters[f"decoder$$${name}"].shape == value.shape
    assert all(p.grad is None for p in zoo.DECODER.parameters())


def means_of(guide):
    """Where the encoder puts each digit."""
    block = guide.blocks[0]
    return guide.families[block.name](guide.rows(block)).mean.detach()


def test_unseen_digits_are_inferred_in_one_pass(zoo, fitted):
    digits = zoo.TEST[:SUBSET]
    before = {
        name: value.clone() for name, value in fitted.approximation.guide.state_dict().items()
    }
    unseen = fitted.infer(digits)
    after = unseen.approximation.guide.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(
        np.array_equal(fitted.parameters[name], value) for name, value in unseen.parameters.items()
    )
    draws = unseen.sample(5, seed=0)
    assert draws["z"].shape == (5, SUBSET, 8)
    assert unseen.log_weights(5, seed=0).shape == (5,)
    assert unseen.predict(draws=5, seed=0)["x"].shape == (5, SUBSET, 64)
    # The encoder reads each digit by itself: of the first ten alone, it says the same.
    ten = fitted.infer(digits[:10])
    means = [means_of(p.approximation.guide) for p in (unseen, ten)]
    torch.testing.assert_close(means[0][:10], means[1], rtol=1e-4, atol=1e-5)
    assert fitted.sample(2, seed=0)["z"].shape == (2, zoo.TRAIN, 8)


def test_reconstructions_are_nearer_than_other_digits(zoo, fitted):
    """Mean predicted pixels against the digit and against the next one: far fewer errors."""
    digits = zoo.TEST[:SUBSET]
    pixels = fitted.infer(digits).predict(draws=100, seed=0)["x"].mean(0)
    own = np.abs(pixels - digits.numpy()).mean()
    other = np.abs(pixels - digits.roll(1, 0).numpy()).mean()
    # 60 x 64 pixels: the s.e. of each mean is below 0.008.
    assert own < other - 0.05


def test_it_is_saved_with_its_decoder(zoo, fitted, tmp_path):
    unseen = fitted.infer(zoo.TEST[:SUBSET])
    path = unseen.save(tmp_path / "vae.nc", draws=10)
    loaded = vi.load(path, zoo.MODEL.with_args(zoo.TEST[:SUBSET]))
    assert np.array_equal(loaded.sample(3, seed=0)["z"], unseen.sample(3, seed=0)["z"])
    assert np.array_equal(loaded.log_weights(3, seed=0), unseen.log_weights(3, seed=0))


def test_dims_carry_the_models_names(zoo, fitted):
    data = fitted.infer(zoo.TEST[:SUBSET]).to_arviz(10, seed=0)
    assert data.posterior["z"].dims == ("chain", "draw", "digit", "latent")
    assert data.posterior_predictive["x"].dims == ("chain", "draw", "digit", "pixel")
    assert data.log_likelihood["x"].dims == ("chain", "draw", "digit")
    assert "decoder" in data.attrs["learned_parameters"]


def test_minibatches_see_every_digit_once_per_epoch(zoo):
    density = Density(zoo.MODEL, dtype=torch.float32)
    guide = guides.make("amortized", density)
    batches = Batches({density.structure.plates["digit"]: 100})
    engine = EagerEngine(guide, Elbo(1), seed=0, batches=batches)
    seen, next_batch = [], batches.next
    batches.next = lambda: seen.append(next_batch()) or seen[-1]
    for _ in range(14):
        assert math.isfinite(float(engine.run(1, 1e-3).bounds))
    rows = torch.cat([batch.index["digit"] for batch in seen])
    assert len(rows) == len(rows.unique()) == 1400


@pytest.mark.parametrize("engine", ["eager", "pyro"])
def test_both_engines_train_it_on_minibatches(zoo, engine, monkeypatch):
    def tiny(**options):
        return Schedule(**{**options, "window": 10, "max_steps": 20, "replicates": 2})

    monkeypatch.setattr(schedule, "Schedule", tiny)
    own = {name: value.clone() for name, value in zoo.DECODER.state_dict().items()}
    posterior = vi.fit(zoo.MODEL, "amortized", Elbo(1), batch_size=50, engine=engine, seed=0)
    assert posterior.engine == engine
    assert posterior.losses.shape == (20,)
    assert np.isfinite(posterior.losses).all()
    assert all(torch.equal(own[name], v) for name, v in zoo.DECODER.state_dict().items())
    weight = next(v for name, v in posterior.parameters.items() if name.endswith("2.weight"))
    assert not np.array_equal(weight, own["2.weight"].numpy())
