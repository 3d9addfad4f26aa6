"""What has to hold on any device, on one that every machine has; `test_device.py` runs it.

Apart from the other tests: torch must know of the device before its first gradient in a process.
"""

import elsewhere
import pyro
import pyro.distributions as dist
import pytest
import torch
from toys import SEARCHED, is_local, local_and_global_model, local_model, two_scales_model

import pyro_vi_kit as vi
from pyro_vi_kit import guides, objectives
from pyro_vi_kit.core.checkpoint import cloned
from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.core.runtime import RandomStream
from pyro_vi_kit.guides import REGISTRY
from pyro_vi_kit.guides.local.local import HEADS
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.objectives.estimators import chosen
from pyro_vi_kit.optimize.engines import Batches, EagerEngine

ENCODED = [name for name in HEADS if name != "delta"]


@pytest.fixture(scope="module")
def device():
    with elsewhere.within() as there:
        yield there


def on_device(value):
    return value.device.type == elsewhere.NAME


def steps(guide, sizes=None, objective="elbo"):
    """Bounds of three steps and two looks, and all that moves."""
    batches = Batches(sizes, device=guide.density.device) if sizes else None
    goal = objectives.make(objective, particles=3)
    estimator = chosen(guide, goal)
    engine = EagerEngine(guide, goal, seed=0, batches=batches, estimator=estimator)
    bounds = torch.cat([engine.run(3, 0.01).bounds, engine.evaluate(2)])
    moved = [*engine.parameters().values(), *engine.adam]
    moved += [part for table in engine.tables for part in table.state]
    return bounds, moved


def assert_same(make, device, sizes=None, objective="elbo"):
    """Steps there are those on the CPU: noise and weights come from the same seeds.

    On the CPU noise and minibatches share a generator, and come in another order.
    """
    found, moved = steps(make(device), sizes, objective)
    assert all(map(on_device, moved))
    assert found.device.type == "cpu"
    assert found.isfinite().all()
    if sizes is None:
        expected, _ = steps(make("cpu"), sizes, objective)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", REGISTRY)
def test_steps_of_every_guide(name, device):
    model = local_model(n=6, dim=2) if is_local(name) else two_scales_model()

    def make(where):
        return guides.make(name, model, seed=1, dtype=torch.float64, device=where)

    assert_same(make, device)


@pytest.mark.parametrize("name", sorted(set(REGISTRY) - {"amortized", "structured", *SEARCHED}))
def test_minibatch_steps_of_every_guide_with_tables(name, device):
    def make(where):
        density = Density(local_and_global_model(n=6), device=where)
        with RandomStream(1):
            return guides.per_datum(guides.specify(name), density, [plate(density)])

    assert_same(make, device, {plate(Density(local_and_global_model(n=6))): 3})


@pytest.mark.parametrize("head", ENCODED)
def test_minibatch_steps_of_every_encoded_family(head, device):
    options = {"local": head, "globals": "full_rank", "conditioned": True, "hidden": (4,)}

    def make(where):
        density = Density(local_and_global_model(n=6), device=where)
        with RandomStream(1):
            return guides.specify("amortized", **options).build(density)

    assert_same(make, device, {plate(Density(local_and_global_model(n=6))): 3}, "iwae")


def plate(density):
    return next(iter(density.structure.plates.values()))


@pytest.mark.parametrize(
    ("guide", "options"),
    [
        ("mean_field", {}),
        ("full_rank", {"init": {"shift": 0.5}}),
        ("delta", {}),
        ("mixture", {}),
        ("affine_coupling", {"steps": 3, "engine": "eager"}),
        ("full_rank", {"steps": 3, "engine": "pyro"}),
        ("mean_field", {"steps": 3, "engine": "eager", "batch_size": 3}),
    ],
)
def test_fits_are_those_of_the_cpu(guide, options, device):
    model = rows_model() if "batch_size" in options else two_scales_model()

    def fitted(where):
        return vi.fit(model, guide, seed=0, device=where, progress=False, **options)

    here, there = fitted("cpu"), fitted(device)
    if "batch_size" not in options:  # whose rows, and so noise, are others on the CPU
        assert there.losses[:4] == pytest.approx(here.losses[:4], rel=1e-7, abs=1e-7)
    assert on_device(next(there.approximation.guide.parameters()))
    if guide != "delta":
        # On the same draws, up to where two fits of a few steps end.
        assert there.elbo == pytest.approx(here.elbo, abs=5 * (here.elbo_se + there.elbo_se))
    exported = there.to_arviz(5)
    assert exported["posterior"]["beta"].shape == (1, 5, 3)
    predicted = there.predict(draws=4, seed=0)["y"]
    assert predicted.shape == (4, 7)


def rows_model():
    """`two_scales_model`, indexed by its plate."""

    def rows(x, y):
        beta = pyro.sample("beta", dist.Normal(x.new_zeros(x.shape[-1]), 1.0).to_event(1))
        with pyro.plate("datum", len(x)) as i:
            pyro.sample("y", dist.Normal((x[i] * beta).sum(-1), 1.0), obs=y[i])

    return vi.Model(rows, *two_scales_model().args)


def streamed(x, y):
    w = pyro.sample("w", dist.Normal(x.new_zeros(x.shape[-1]), 1.0).to_event(1))
    with pyro.plate("row", len(x)) as i:
        pyro.sample("y", dist.Normal(x[i] @ w, 1.0), obs=y[i])


def test_streamed_data_are_brought_batch_by_batch(device):
    rows = torch.utils.data.TensorDataset(*two_scales_model(n=40).args)
    fit = vi.fit(
        vi.Model(streamed, rows),
        "mean_field",
        seed=0,
        device=device,
        engine="eager",
        batch_size=8,
        steps=6,
        progress=False,
    )
    assert all(map(on_device, fit.density.data))
    assert torch.tensor(fit.losses).isfinite().all()
    assert fit.elbo == pytest.approx(float(-fit.losses.mean()), abs=50.0)


def test_epochs_validate_and_checkpoints_go_on(device, tmp_path):
    model, held_out = rows_model(), two_scales_model(n=7, seed=5).args

    def fitted(steps, **options):
        plan = vi.Epochs(steps, validation=held_out, clip=1.0)
        return vi.fit(
            model,
            "mean_field",
            epochs=plan,
            batch_size=3,
            seed=0,
            device=device,
            engine="eager",
            progress=False,
            **options,
        )

    whole = fitted(2)
    kept = fitted(2, checkpoint=tmp_path / "fit.pt")
    again = fitted(2, checkpoint=tmp_path / "fit.pt")
    assert list(kept.losses) == list(whole.losses)
    assert list(again.losses) == list(whole.losses)


def test_an_engine_goes_on_from_a_state_that_was_on_the_cpu(device):
    sizes = {plate(Density(local_and_global_model(n=6))): 3}

    def engine():
        density = Density(local_and_global_model(n=6), device=device)
        with RandomStream(1):
            guide = guides.per_datum(guides.specify("mean_field"), density, [plate(density)])
        batches = Batches(sizes, device=density.device)
        return EagerEngine(guide, objectives.make("elbo"), seed=0, batches=batches)

    first, second = engine(), engine()
    first.run(3, 0.01)
    second.restore(cloned(first.state(), "cpu"))
    assert second.run(3, 0.01).bounds.tolist() == first.run(3, 0.01).bounds.tolist()


def closing_model():
    """A model that closes over CPU tensors, makes literals of its own, and learns a module's weights."""
    x, known = torch.linspace(-1.0, 1.0, 5), torch.tensor([0, 1, 1, 0, 1])
    decoder = torch.nn.Linear(1, 1)

    def model(y):
        pyro.module("decoder", decoder)
        offset = pyro.param("offset", torch.tensor(0.3))
        level = pyro.sample("level", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("datum", len(y)):
            mean = decoder(x.unsqueeze(-1)).squeeze(-1) + level[known] + offset
            pyro.sample("y", dist.Normal(mean, torch.tensor(1.0)), obs=y)

    return vi.Model(model, torch.ones(5)), decoder


@pytest.mark.parametrize("engine", ["eager", "pyro"])
def test_what_a_model_closes_over_is_brought_along_and_left_alone(engine, device):
    model, decoder = closing_model()
    before = decoder.weight.detach().clone()
    fit = vi.fit(model, "mean_field", seed=0, device=device, engine=engine, steps=3, progress=False)
    assert type(decoder.weight) is torch.nn.Parameter
    assert torch.equal(decoder.weight, before)
    assert all(map(on_device, fit.approximation.params.values()))
    assert fit.parameters["decoder$$$weight"].shape == (1, 1)


def mixture(y):
    with pyro.plate("component", 2):
        at = pyro.sample("at", dist.Normal(0.0, 3.0))
    with pyro.plate("datum", len(y)):
        which = pyro.sample("which", dist.Categorical(torch.tensor([0.4, 0.6])))
        pyro.sample("y", dist.Normal(at[..., which], 1.0), obs=y)


def matrices(y):
    tril = pyro.sample("tril", dist.LKJCholesky(3, 1.0))
    mean = pyro.sample("mean", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    angle = pyro.sample("angle", dist.VonMises(0.0, 1.0))
    share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("datum", len(y)):
        pyro.sample("y", dist.MultivariateNormal(mean + angle * share, scale_tril=tril), obs=y)


@pytest.mark.parametrize(
    ("function", "shape"), [(mixture, (6,)), (matrices, (4, 3))], ids=["discrete", "supports"]
)
def test_densities_draws_and_checks_of_harder_models(function, shape, device):
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    here, there = (Density(vi.Model(function, y), device=where) for where in ("cpu", device))
    z = torch.randn(3, here.dim, generator=generator, dtype=torch.float64, device="cpu")
    for mine, theirs in zip(
        there.log_prob_and_grad(there.cast(z)), here.log_prob_and_grad(z), strict=True
    ):
        assert on_device(mine)
        torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-9, atol=1e-9)
    with RandomStream(0):
        drawn = there.constrain(there.cast(z)) | there.simulate(there.cast(z))
    assert all(map(on_device, drawn.values()))
    assert vi.check(vi.Model(function, y.to(device)), verbose=False).ok


def test_random_states_are_left_alone_and_seeds_repeat(device):
    def fitted():
        return vi.fit(
            two_scales_model(), "mean_field", seed=3, device=device, steps=2, engine="eager"
        )

    first = fitted()
    here, there = torch.get_rng_state(), elsewhere.GENERATOR.get_state()
    torch.randn(3, device=device)
    elsewhere.GENERATOR.set_state(there)
    second = fitted()
    assert list(first.losses) == list(second.losses)
    assert torch.equal(torch.get_rng_state(), here)
    assert torch.equal(elsewhere.GENERATOR.get_state(), there)


def test_data_say_where(device):
    x, y = two_scales_model().args
    density = Density(vi.Model(two_scales_model().fn, x.to(device), y))
    assert density.device == device
    assert all(map(on_device, density.data))
    # As `nuts` has it.
    back = Density(vi.Model(two_scales_model().fn, x.to(device), y.to(device)), device="cpu")
    z = torch.zeros(2, back.dim, dtype=torch.float64)
    torch.testing.assert_close(back.log_prob(z), Density(two_scales_model()).log_prob(z))


def test_saved_there_and_loaded_anywhere(device, tmp_path):
    model = two_scales_model()
    fit = vi.fit(model, "full_rank", seed=0, device=device, progress=False)
    path = fit.save(tmp_path / "fit.nc", draws=5)
    here, there = vi.load(path, model), vi.load(path, model, device=device)
    assert here.density.device.type == "cpu"
    assert there.density.device == device
    for name, value in here.approximation.guide.state_dict().items():
        torch.testing.assert_close(value, there.approximation.guide.state_dict()[name].cpu())
    again = vi.fit(model, resume=path, device=device, seed=1, progress=False)
    assert again.density.device == device


def test_a_guide_that_was_built_elsewhere_is_refused(device):
    guide = guides.make("mean_field", two_scales_model())
    with pytest.raises(OptionError, match=r"built on 'cpu'.*guides\.make"):
        vi.fit(two_scales_model(), guide, device=device)
    with pytest.raises(OptionError, match="engine='compiled' compiles for the CPU"):
        vi.fit(two_scales_model(), engine="compiled", device=device)


def test_a_forgotten_device_is_caught(device):
    """The oracle itself: what a GPU refuses is refused here."""
    there = torch.zeros(3, device=device)
    with pytest.raises(RuntimeError, match="two devices"):
        there + torch.zeros(3)
    with pytest.raises((TypeError, RuntimeError)):
        there.numpy()


def test_what_comes_after_training_is_there_too(device):
    posterior = vi.fit(
        local_and_global_model(), "amortized", steps=10, seed=0, dtype=torch.float64, device=device
    )
    table = posterior.per_datum(draws=30, seed=0)
    assert table["log_evidence"].notna().all()
    refined = posterior.refine(steps=3, seed=0)
    assert all(map(on_device, refined.approximation.guide.parameters()))
    assert posterior.amortization_gap(draws=30, steps=3, seed=0)["amortization"].notna().all()
    assert len(posterior.infer(torch.tensor([0.5, -1.0])).sample(3, seed=0)["z"]) == 3
