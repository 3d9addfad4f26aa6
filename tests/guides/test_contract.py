"""What every guide of the registry keeps: a new entry is tested the moment it is registered."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import nn
from toys import (
    gaussian,
    guide_for,
    is_local,
    local_model,
    perturb,
    traced_log_weight,
    two_scales_model,
)

import pyro_vi_kit as vi
from pyro_vi_kit import guides
from pyro_vi_kit.core.errors import OptionError, UnknownNameError
from pyro_vi_kit.guides import REGISTRY, AffineCoupling, Amortized, Draw, Guide, GuideSpec
from pyro_vi_kit.model.log_density import Density

pytestmark = pytest.mark.usefixtures("float64", "own_param_store")

LOCAL = [name for name in REGISTRY if is_local(name)]
GLOBAL = [name for name in REGISTRY if name not in LOCAL]
POINT = [name for name in GLOBAL if guides.make(name, gaussian(1)[0]).point]
SPREAD = [name for name in REGISTRY if name not in POINT]
each_guide = pytest.mark.parametrize("name", REGISTRY)
each_global_guide = pytest.mark.parametrize("name", GLOBAL)
each_density = pytest.mark.parametrize("name", SPREAD)


def guide_and_model(name, **options):
    """A guide on a model with vector, positive and plain latents, or on one with local latents."""
    model = local_model(n=6, dim=2) if name in LOCAL else two_scales_model()
    return guides.make(name, model, **options), model


def of_dim(name, dim, **options):
    """A guide over `[D]`, or over rows `[d]` where it is local."""
    return guide_for(name, Density(gaussian(dim)[0]), Density(local_model(n=3, dim=dim)), **options)


def distribution_of(guide, block, index=None):
    """The distribution of a block: one, or one per row."""
    return guide.families[block.name](None if block.plate is None else guide.rows(block, index))


def family_of(guide):
    """The distribution of the guide's last block: one, or one per row."""
    return distribution_of(guide, guide.blocks[-1])


def mean_and_se(values):
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


# -- in a stock SVI ---------------------------------------------------------------------------


@each_guide
@pytest.mark.parametrize("vectorize", [False, True], ids=["looped", "vectorised"])
def test_it_trains_in_a_stock_svi(name, vectorize):
    guide, model = guide_and_model(name)

    def elbos():
        pyro.set_rng_seed(9)
        with torch.no_grad():
            return guide.log_weights(500).joint()

    before = elbos()
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=vectorize)
    svi = SVI(model.fn, guide, Adam({"lr": 0.01}), elbo)
    pyro.set_rng_seed(0)
    losses = [svi.step(*model.args, **model.kwargs) for _ in range(150)]
    assert all(math.isfinite(loss) for loss in losses)
    gain, se = mean_and_se(elbos() - before)
    # On common noise, five standard errors (none for a point) and more than a nat.
    assert gain > max(5 * se, 1.0)


@each_guide
def test_vectorised_particles_see_the_same_log_weights(name):
    guide, model = guide_and_model(name)
    perturb(guide)
    loss = Trace_ELBO(num_particles=5, vectorize_particles=True)
    loss.loss(model.fn, guide, *model.args, **model.kwargs)  # guesses the plate nesting
    pyro.set_rng_seed(1)
    stock = loss.loss(model.fn, guide, *model.args, **model.kwargs)
    pyro.set_rng_seed(1)
    ours = guide.log_weights(5).joint().mean().item()
    assert -stock == pytest.approx(ours, rel=1e-10)


@each_guide
def test_it_takes_new_data_of_the_same_shape(name):
    """A guide in a user's loop is called with whatever data come next."""
    guide, model = guide_and_model(name)
    perturb(guide)
    other = model.with_args(*(1.5 * a.flip(0) + 0.1 for a in model.args))
    pyro.set_rng_seed(2)
    expected, trace = traced_log_weight(other, guide)
    moved = guide.moved_to(Density(other))
    found = moved.weigh(same_draw(guide, trace)).joint()[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    pyro.set_rng_seed(2)
    again = moved.log_weights(1).joint()[0]
    torch.testing.assert_close(again, expected, rtol=1e-10, atol=1e-10)
    if name in LOCAL:
        own = traced_log_weight(model, guide)[1]
        sites = [f"{guide._pyro_name}_{block.name}" for block in guide.blocks]
        assert any(
            not torch.equal(trace.nodes[s]["fn"].mean, own.nodes[s]["fn"].mean) for s in sites
        )


@pytest.mark.parametrize("name", LOCAL)
def test_a_local_guide_takes_data_of_another_length(name):
    guide, _ = guide_and_model(name)
    longer = local_model(n=11, dim=2, seed=4)
    log_w, trace = traced_log_weight(longer, guide)
    assert torch.isfinite(log_w)
    assert trace.nodes["z"]["value"].shape == (11, 2)


@pytest.mark.parametrize("name", LOCAL)
def test_a_local_guide_follows_the_models_own_subsampling(name):
    model = local_model(n=6, dim=2)

    def subsampled(y, dim):
        with pyro.plate("datum", len(y), subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(y.new_zeros(dim), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y[index])

    guide = guides.make(name, vi.Model(subsampled, *model.args, kwargs=model.kwargs))
    svi = SVI(subsampled, guide, Adam({"lr": 0.01}), Trace_ELBO())
    assert math.isfinite(svi.step(*model.args, **model.kwargs))
    trace = traced_log_weight(guide.density.model, guide)[1]
    assert trace.nodes["z"]["value"].shape == (2, 2)


@each_guide
def test_two_guides_in_one_param_store_do_not_share_parameters(name):
    (first, model), (second, _) = guide_and_model(name), guide_and_model(name)
    pyro.set_rng_seed(0)
    before = {key: value.clone() for key, value in first.state_dict().items()}
    svi = SVI(model.fn, second, Adam({"lr": 0.1}), Trace_ELBO())
    traced_log_weight(model, first)
    for _ in range(3):
        svi.step(*model.args, **model.kwargs)
    count = len(list(first.parameters()))
    assert len(pyro.get_param_store().keys()) == 2 * count
    assert all(torch.equal(before[key], value) for key, value in first.state_dict().items())
    assert any(
        not torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )


# -- draws and densities ----------------------------------------------------------------------


@each_guide
def test_shapes_of_draws(name):
    guide, model = guide_and_model(name)
    draw = guide.draw(4)
    sites = {site.name: site.unconstrained_shape for site in guide.density.latents}
    assert {n: z.shape for n, z in draw.z.items()} == {n: (4, *s) for n, s in sites.items()}
    assert draw.shared.shape == (4,)
    plates = {b.plate.name: b.plate.size for b in guide.blocks if b.plate is not None}
    assert {n: rows.shape for n, rows in draw.local.items()} == {
        n: (4, size) for n, size in plates.items()
    }
    values = guide(*model.args, **model.kwargs)
    shapes = {s.name: (*s.batch_shape, *s.event_shape) for s in guide.density.latents}
    assert {n: tuple(v.shape) for n, v in values.items()} == shapes


@pytest.mark.parametrize("name", LOCAL)
def test_shapes_of_draws_on_a_minibatch(name):
    guide, _ = guide_and_model(name)
    draw = guide.draw(4, {"datum": torch.tensor([5, 0, 2])})
    assert draw.z["z"].shape == (4, 3, 2)
    assert draw.local["datum"].shape == (4, 3)
    rows = guide.context(guide.blocks[-1])
    picked = distribution_of(guide, guide.blocks[-1], {"datum": torch.tensor([5, 0, 2])}).mean
    torch.testing.assert_close(picked, family_of(guide).mean[[5, 0, 2]])
    assert rows.shape[0] == 6


def grid(dim, width=12.0, steps=601):
    """Points `[G, D]` and the volume of a cell."""
    axis = torch.linspace(-width, width, steps)
    points = torch.cartesian_prod(*[axis] * dim).reshape(-1, dim)
    return points, (2 * width / (steps - 1)) ** dim


@each_density
@pytest.mark.parametrize("dim", [1, 2])
def test_its_density_integrates_to_one_and_its_draws_follow_it(name, dim):
    """Quadrature on a grid: cells of 0.04, far below the sds of 0.3 and more."""
    # Perturbed, so that flows bend and encoders see their inputs.
    guide = perturb(of_dim(name, dim, init_scale=0.5), seed=dim)
    points, cell = grid(dim)
    with torch.no_grad():
        family = family_of(guide)
        rows = (1,) * len(family.batch_shape)
        weights = family.log_prob(points.reshape(-1, *rows, dim)).exp() * cell
        points = points.reshape(-1, *rows, dim)
        # The trapezoid rule is exact to rounding for smooth densities; a bent flow is the least so.
        # At a kink its error grows with the square of the step: fourfold on every other point.
        total = weights.sum(0)
        on = torch.arange(601).remainder(2) == 0
        coarse = weights[torch.cartesian_prod(*[on] * dim).reshape(-1, dim).all(-1)].sum(0) * 2**dim
        error = 1e-4 + float((coarse - total).abs().max())
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=min(error, 0.01))
        mean = (weights[..., None] * points).sum(0)
        second = (weights[..., None] * points**2).sum(0)
        pyro.set_rng_seed(0)
        draws = family.rsample((20_000,))
    for power, expected in ((1, mean), (2, second)):
        found = draws**power
        se = found.std(0) / math.sqrt(len(draws))
        # Four standard errors of 20,000 draws, at a fixed seed, of at most six numbers.
        assert bool(((found.mean(0) - expected).abs() < 4 * se).all())


@each_density
def test_log_q_of_a_draw_is_the_log_density_there(name):
    guide = perturb(of_dim(name, 3))
    pyro.set_rng_seed(0)
    draw = guide.draw(4)
    log_q = draw.shared + sum(rows.sum(-1) for rows in draw.local.values())
    pyro.set_rng_seed(0)
    expected = torch.zeros(4)
    for block in guide.blocks:
        family = distribution_of(guide, block)
        # A copy, so that no transform can find the way it came in a cache.
        value = family.rsample((4,)).detach().clone()
        log_prob = family.log_prob(value)
        expected = expected + log_prob.reshape(4, -1).sum(-1)
    torch.testing.assert_close(log_q, expected, rtol=1e-9, atol=1e-9)


# -- dimensions, dtypes, state ----------------------------------------------------------------


@each_guide
@pytest.mark.parametrize("dim", [1, 200])
def test_one_and_two_hundred_dimensions(name, dim):
    guide = of_dim(name, dim)
    log_w = guide.log_weights(3).joint()
    log_w.mean().backward()
    assert log_w.shape == (3,)
    assert bool(log_w.isfinite().all())
    assert all(bool(p.grad.isfinite().all()) for p in guide.parameters())


@each_guide
def test_gradient_flows_to_every_parameter(name):
    guide = perturb(of_dim(name, 4))
    pyro.set_rng_seed(0)
    guide.log_weights(8).joint().mean().backward()
    dead = [n for n, p in guide.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


@each_guide
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_both_dtypes(name, dtype):
    torch.set_default_dtype(torch.float32)
    model = local_model(dtype=dtype) if name in LOCAL else two_scales_model(dtype=dtype)
    guide = guides.make(name, model, dtype=dtype)
    floating = [p for p in guide.state_dict().values() if p.is_floating_point()]
    assert {p.dtype for p in floating} == {dtype}
    draw = guide.draw(2)
    assert {z.dtype for z in draw.z.values()} == {dtype}
    assert draw.shared.dtype is dtype
    assert guide.log_weights(2).joint().dtype is dtype


@each_guide
def test_float32_in_a_stock_svi(name):
    torch.set_default_dtype(torch.float32)
    model = (
        local_model(dtype=torch.float32) if name in LOCAL else two_scales_model(dtype=torch.float32)
    )
    guide = guides.make(name, model)
    svi = SVI(model.fn, guide, Adam({"lr": 0.01}), Trace_ELBO())
    assert math.isfinite(svi.step(*model.args, **model.kwargs))


@each_guide
def test_state_dict_round_trip(name):
    guide, model = guide_and_model(name, seed=1)
    perturb(guide)
    other = guides.make(name, model, seed=2)
    other.load_state_dict(guide.state_dict())
    pyro.set_rng_seed(0)
    expected = guide.draw(3)
    pyro.set_rng_seed(0)
    found = other.draw(3)
    assert all(torch.equal(expected.z[n], found.z[n]) for n in expected.z)
    assert torch.equal(expected.shared, found.shared)


@each_guide
def test_the_same_seed_gives_the_same_guide_and_the_users_stream_is_untouched(name):
    before = torch.get_rng_state()
    first, model = guide_and_model(name, seed=3)
    again = guides.make(name, model, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True)
    )


@each_guide
def test_a_registered_guide_keeps_the_contract(name):
    spec = guides.specify(name)
    assert isinstance(spec, GuideSpec)
    assert spec.name == name
    assert spec == guides.specify(name)
    assert guides.specify(spec) is spec
    assert isinstance(guide_and_model(name)[0], Guide)
    assert guides.describe()[name]
    # What `vi-kit guides` prints to choose from.
    assert len(guides.about()[name]) == 4
    assert all(guides.about()[name])
    assert name in guides.names()


# -- supports and plates ----------------------------------------------------------------------


def dynamic_support():
    a = pyro.sample("a", dist.Gamma(2.0, 1.0))
    u = pyro.sample("u", dist.Uniform(0.0, a))
    pyro.sample("y", dist.Normal(u, 0.5), obs=torch.tensor(0.4))


def dynamic_support_in_a_plate():
    a = pyro.sample("a", dist.Gamma(2.0, 1.0))
    with pyro.plate("row", 3):
        u = pyro.sample("u", dist.Uniform(0.0, a))
        pyro.sample("y", dist.Normal(u, 0.5), obs=torch.tensor([0.4, 0.1, 1.0]))


def simplex():
    p = pyro.sample("p", dist.Dirichlet(torch.tensor([2.0, 1.5, 1.0])))
    pyro.sample("y", dist.Multinomial(10, probs=p), obs=torch.tensor([5.0, 3.0, 2.0]))


def simplex_in_a_plate():
    with pyro.plate("row", 2):
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        obs = torch.tensor([[5.0, 3.0, 2.0], [1.0, 1.0, 8.0]])
        pyro.sample("y", dist.Multinomial(10, probs=p), obs=obs)


def ordered():
    base = dist.Normal(torch.zeros(3), 2.0).to_event(1)
    c = pyro.sample("c", dist.TransformedDistribution(base, [dist.transforms.OrderedTransform()]))
    pyro.sample("y", dist.Normal(c, 1.0).to_event(1), obs=torch.tensor([-1.0, 0.2, 1.0]))


def improper():
    m = pyro.sample("m", dist.ImproperUniform(constraints.real, (), ()))
    pyro.sample("y", dist.Normal(m, 1.0).expand([4]).to_event(1), obs=torch.arange(4.0))


def nested_plates():
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    outer, inner = pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 3, dim=-1)
    with outer:
        s = pyro.sample("s", dist.HalfNormal(1.0))
        with inner:
            x = pyro.sample("x", dist.Normal(m, s))
            pyro.sample("y", dist.Normal(x, 1.0), obs=torch.arange(6.0).reshape(2, 3) / 3)
    with inner:
        pyro.sample("v", dist.Beta(2.0, 2.0))


def masked_and_scaled():
    seen = torch.tensor([True, False, True])
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("row", 3), pyro.poutine.scale(scale=0.5):
        x = pyro.sample("x", dist.LogNormal(m, 1.0))
        with pyro.poutine.mask(mask=seen):
            pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor([0.1, 0.0, 2.0]))


STRUCTURES = [
    dynamic_support,
    dynamic_support_in_a_plate,
    simplex,
    simplex_in_a_plate,
    ordered,
    improper,
    nested_plates,
    masked_and_scaled,
]


def same_draw(guide, trace):
    """What a guide's trace drew, as the guide's own `draw` gives it."""
    z, shared, local = {}, torch.zeros(1), {}
    for block in guide.blocks:
        node = trace.nodes[f"{guide._pyro_name}_{block.name}"]
        z |= block.unpack(node["value"].detach()[None])
        log_q = node["fn"].log_prob(node["value"]).detach()[None]
        if block.plate is None:
            shared = shared + log_q
        else:
            local[block.plate.name] = log_q
    return Draw(z, shared, local)


@each_global_guide
@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda fn: fn.__name__)
def test_supports_and_plates_in_a_stock_svi(name, structure):
    model = vi.Model(structure)
    guide = guides.make(name, model)
    svi = SVI(structure, guide, Adam({"lr": 0.01}), Trace_ELBO())
    pyro.set_rng_seed(0)
    assert all(math.isfinite(svi.step()) for _ in range(3))
    perturb(guide)
    expected, trace = traced_log_weight(model, guide)
    found = guide.weigh(same_draw(guide, trace)).joint()[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@each_global_guide
def test_a_support_that_moves_with_the_data(name):
    """The bound of a Uniform that is an argument: transforms must follow the data of each call."""

    def bounded(high):
        u = pyro.sample("u", dist.Uniform(torch.zeros(2), high).to_event(1))
        pyro.sample("y", dist.Normal(u.sum(), 1.0), obs=torch.tensor(1.0))

    guide = guides.make(name, vi.Model(bounded, torch.tensor([1.0, 2.0])))
    other = vi.Model(bounded, torch.tensor([10.0, 20.0]))
    with torch.no_grad():
        perturb(guide)
    pyro.set_rng_seed(0)
    log_w, trace = traced_log_weight(other, guide)
    moved = guide.moved_to(Density(other))
    found = moved.weigh(same_draw(guide, trace)).joint()[0]
    torch.testing.assert_close(found, log_w, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", LOCAL)
def test_a_local_guide_with_a_global_latent_and_a_positive_local_one(name):
    y = torch.tensor([0.5, -1.0, 2.0, 0.1])

    def model(y):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("datum", len(y)) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            s = pyro.sample("s", dist.Gamma(2.0, 2.0))
            pyro.sample("y", dist.Normal(m + z.sum(-1), s), obs=y[index])

    guide = perturb(guides.make(name, vi.Model(model, y)))
    pyro.set_rng_seed(0)
    expected, trace = traced_log_weight(guide.density.model, guide)
    found = guide.weigh(same_draw(guide, trace)).joint()[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    svi = SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO(4, vectorize_particles=True))
    assert math.isfinite(svi.step(y))


# -- refusals ---------------------------------------------------------------------------------


@each_global_guide
def test_a_subsampled_plate_of_latents_is_refused_by_name(name):
    """One minibatch's latents would otherwise be shared by all (AutoContinuous does so)."""
    model = local_model(n=6)

    def subsampled(y, dim):
        with pyro.plate("people", len(y), subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(y.new_zeros(dim), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y[index])

    guide = guides.make(name, vi.Model(subsampled, *model.args, kwargs=model.kwargs))
    svi = SVI(subsampled, guide, Adam({"lr": 0.01}), Trace_ELBO())
    with pytest.raises(OptionError, match=r"'people' is subsampled.*guide='amortized'"):
        svi.step(*model.args, **model.kwargs)


@pytest.mark.parametrize("name", LOCAL)
def test_a_local_guide_on_a_global_model_is_refused(name):
    with pytest.raises(
        OptionError, match=r"every latent of this model is global \(z\): use guide="
    ):
        guides.make(name, gaussian(2)[0])


class Constant(nn.Module):
    def __init__(self, *shapes):
        super().__init__()
        self.shapes = shapes

    def forward(self, inputs):
        parts = tuple(inputs.new_ones(len(inputs), *shape) for shape in self.shapes)
        return parts if len(parts) > 1 else parts[0]


class Broken(nn.Module):
    def forward(self, inputs):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


@pytest.mark.parametrize(
    "encoder", [Constant((2,)), Constant((4, 1)), Constant((4,), (4,)), Constant((2,), (2,), (2,))]
)
def test_an_encoder_with_a_wrong_output_is_refused(encoder):
    with pytest.raises(OptionError, match=r"it must give one tensor \(2, 4\) of means and log sds"):
        guides.make("amortized", local_model(dim=2), encoder=encoder)


@pytest.mark.parametrize("encoder", [Constant((4,)), Constant((2,), (2,))])
def test_both_forms_of_an_encoders_output_are_taken(encoder):
    guide = guides.make("amortized", local_model(dim=2), encoder=encoder)
    scale = math.e if len(encoder.shapes) == 1 else 1.0
    torch.testing.assert_close(family_of(guide).stddev, torch.full((6, 2), scale))


def test_the_users_encoder_is_copied():
    encoder = nn.Linear(2, 4)
    guide = guides.make("amortized", local_model(dim=2), encoder=encoder)
    perturb(guide)
    assert not torch.equal(guide.families["local"].source.encoder.weight, encoder.weight)


def test_an_encoder_that_raises_is_refused_with_its_words():
    with pytest.raises(OptionError, match=r"raised RuntimeError.*shape \(2, 2\).*mat1 and mat2"):
        guides.make("amortized", local_model(dim=2), encoder=Broken())


def test_an_encoder_must_be_a_module():
    with pytest.raises(
        OptionError,
        match=r"encoder must be a torch\.nn\.Module, or a dict of them by plate, got function",
    ):
        Amortized(encoder=lambda x: x)


def test_a_plate_with_nothing_observed_is_refused():
    def unseen():
        with pyro.plate("a", 2):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x.sum(), 1.0), obs=torch.tensor(1.0))

    with pytest.raises(OptionError, match="plate 'a' has local latents but no observed site"):
        guides.make("amortized", vi.Model(unseen))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 0}, "layers must be a positive"),
        ({"layers": 2.5}, "layers must be a positive"),
        ({"layers": True}, "layers must be a positive"),
        ({"hidden": ()}, "hidden must be positive layer widths"),
        ({"hidden": (8, 0)}, "hidden must be positive layer widths"),
        ({"hidden": 0}, "hidden must be positive layer widths"),
        ({"hidden": True}, "hidden must be positive layer widths"),
        ({"hidden": (8, True)}, "hidden must be positive layer widths"),
        ({"hidden": None}, "hidden must be positive layer widths"),
        ({"hidden": "wide"}, "hidden must be positive layer widths"),
        ({"permutations": "shuffle"}, "permutations must be one of random, reverse, none"),
        ({"init_scale": 0.0}, "init_scale must be a positive number"),
        ({"init_scale": math.nan}, "init_scale must be a positive number"),
        ({"init_scale": math.inf}, "init_scale must be a positive number"),
    ],
)
def test_bad_options_of_affine_coupling(options, message):
    with pytest.raises(OptionError, match=message):
        AffineCoupling(**options)


@pytest.mark.parametrize("name", [n for n in REGISTRY if n not in POINT])
@pytest.mark.parametrize("scale", [0, -1.0, True, "1", math.nan])
def test_a_bad_initial_scale_is_refused(name, scale):
    with pytest.raises(OptionError, match=f"{name}: init_scale must be a positive number"):
        guides.specify(name, init_scale=scale)


def test_one_width_stands_for_one_layer():
    assert AffineCoupling(hidden=8).hidden == (8,)
    assert AffineCoupling(hidden=[8, 4]).hidden == (8, 4)


@pytest.mark.parametrize("permutations", ["random", "reverse", "none"])
def test_permutations(permutations):
    guide = guides.make("affine_coupling", gaussian(4)[0], permutations=permutations, layers=6)
    orders = guide.families["latent"].permutations
    assert orders.shape == (3, 4)
    assert all(sorted(order.tolist()) == [0, 1, 2, 3] for order in orders)
    if permutations == "reverse":
        assert orders[0].tolist() == [3, 2, 1, 0]
    if permutations == "none":
        assert orders[0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("permutations", ["random", "reverse", "none"])
def test_two_coordinates_are_moved_in_turn(permutations):
    """Each layer moves the half that the one before has not."""
    guide = guides.make("affine_coupling", gaussian(2)[0], permutations=permutations, layers=6)
    orders = guide.families["latent"].permutations
    assert orders.tolist() == 3 * [[0, 1]]


def test_an_unknown_name_lists_the_choices_and_the_nearest():
    with pytest.raises(UnknownNameError, match=r"Did you mean 'full_rank'\?.*mean_field"):
        guides.make("fullrank", gaussian(2)[0])


def test_an_unknown_option_lists_the_options():
    with pytest.raises(OptionError, match="no option 'depth'; options: layers, hidden"):
        guides.make("affine_coupling", gaussian(2)[0], depth=3)
    with pytest.raises(
        OptionError, match="guide 'delta' has no option 'init_scale'; it takes none"
    ):
        guides.make("delta", gaussian(2)[0], init_scale=1.0)


def test_options_do_not_go_beside_an_instance():
    with pytest.raises(OptionError, match="options go into the guide itself"):
        guides.make(AffineCoupling(), gaussian(2)[0], layers=3)


@pytest.mark.parametrize("wrong", [AffineCoupling, None, 3])
def test_what_is_no_guide_is_refused(wrong):
    with pytest.raises(OptionError, match="guide= takes a name"):
        guides.make(wrong, gaussian(2)[0])
