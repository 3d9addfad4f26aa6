"""Distributions of single data: heads, tables and encoders, each against quadrature."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from scipy import stats
from torch import nn
from toys import local_and_global_model, local_model, perturb

import pyro_vi_kit as vi
from pyro_vi_kit import guides
from pyro_vi_kit.core.errors import OptionError, UnknownNameError
from pyro_vi_kit.core.runtime import RandomStream
from pyro_vi_kit.guides import Amortized, LocalFlow, LocalMixture
from pyro_vi_kit.guides.local.local import HEADS, Table, head_for
from pyro_vi_kit.guides.mixtures.mixture import MixtureNormal
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.objectives import Elbo, Iwae, Renyi, evaluate, surrogate
from pyro_vi_kit.optimize.engines import Batches, CapturedEngine, EagerEngine

pytestmark = pytest.mark.usefixtures("float64", "own_param_store")

SPREAD = [name for name in HEADS if name != "delta"]
KINDS = [*SPREAD, LocalMixture(components=2), LocalFlow(layers=2, hidden=8, features=3)]
each_kind = pytest.mark.parametrize("local", KINDS, ids=str)
DRAWS = 20_000


def made(local, dim, rows=3, dtype=torch.float64, seed=0):
    """A head away from its start, and numbers `[rows, p]`."""
    torch.manual_seed(seed)
    head = perturb(head_for(local, dim).to(dtype), seed=seed, size=0.1)
    head.frame(torch.linspace(-0.5, 0.5, dim).to(dtype), torch.linspace(0.7, 1.2, dim).to(dtype))
    numbers = head.initial(0.6).to(dtype).expand(rows, -1)
    return head, (numbers + 0.25 * torch.randn(rows, head.size, dtype=dtype)).requires_grad_()


def grid(dim, steps=401, width=8.0):
    """Points `[G, 1, d]` and the volume of a cell."""
    axis = torch.linspace(-width, width, steps)
    points = torch.cartesian_prod(*[axis] * dim).reshape(-1, 1, dim)
    return points, (2 * width / (steps - 1)) ** dim


def within(found, expected, se, sigmas=4.0):
    assert bool(((found - expected).abs() <= sigmas * se + 1e-9).all()), (found - expected) / se


# -- densities and draws ----------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("dim", [1, 2])
def test_densities_integrate_to_one_and_draws_follow_them(local, dim):
    """The trapezoid rule with cells of 0.04; sds are 0.3 and more. Four s.e. of 20,000 draws."""
    head, numbers = made(local, dim)
    points, cell = grid(dim)
    with torch.no_grad():
        q = head(numbers)
        weights = q.log_prob(points.expand(-1, 3, dim)).exp() * cell
        torch.manual_seed(1)
        draws = q.rsample((DRAWS,))
    torch.testing.assert_close(weights.sum(0), torch.ones(3), rtol=0, atol=1e-4)
    tests = [points, points.square(), points.prod(-1, keepdim=True), points.tanh()]
    at_draws = [draws, draws.square(), draws.prod(-1, keepdim=True), draws.tanh()]
    for f, found in zip(tests, at_draws, strict=True):
        expected = (weights[..., None] * f).sum(0)
        within(found.mean(0), expected, found.std(0) / math.sqrt(DRAWS))


@each_kind
def test_draws_of_one_latent_have_the_distribution_function_of_the_density(local):
    """Kolmogorov-Smirnov at 20,000 draws; one of 18 tests at 1e-4 fails by chance once in 500 runs."""
    head, numbers = made(local, 1)
    points, cell = grid(1, steps=8001)
    with torch.no_grad():
        q = head(numbers)
        below = (q.log_prob(points.expand(-1, 3, 1)).exp() * cell).cumsum(0)
        torch.manual_seed(2)
        draws = q.sample((DRAWS,))
    for row in range(3):
        at, share = points[:, 0, 0].numpy(), below[:, row].numpy()
        found = stats.kstest(draws[:, row, 0].numpy(), lambda x, a=at, s=share: _at(x, a, s))
        assert found.pvalue > 1e-4


def _at(x, points, shares):
    """The distribution function at x: a cell's mass counts half at its point."""
    width = points[1] - points[0]
    return np.interp(x, points + width / 2, shares)


@each_kind
@pytest.mark.parametrize("dim", [1, 2, 5])
def test_log_q_of_a_draw_is_the_density_there(local, dim):
    head, numbers = made(local, dim)
    q = head(numbers)
    value = q.rsample((4,))
    again = head(numbers).log_prob(value.detach().clone())
    torch.testing.assert_close(q.log_prob(value), again, rtol=1e-9, atol=1e-9)


# -- gradients through draws ------------------------------------------------------------------


def smooth(z):
    """A function of `[..., d]` that sees its coordinates together."""
    weights = torch.arange(1.0, z.shape[-1] + 1.0)
    return torch.sin((z * weights).sum(-1)) + 0.3 * z.square().sum(-1) + z.prod(-1)


@each_kind
@pytest.mark.parametrize("dim", [1, 2])
def test_gradients_through_draws_are_derivatives_of_the_expectation(local, dim):
    """Against derivatives of the integral on the grid, in every number of one row. 4.5 s.e. of 40
    batches of 1,000 draws, for up to 20 numbers a case.
    """
    head, numbers = made(local, dim, rows=1)
    points, cell = grid(dim)
    expected_value = (
        head(numbers).log_prob(points)[:, 0].exp() * cell * smooth(points)[:, 0]
    ).sum()
    (expected,) = torch.autograd.grad(expected_value, numbers)
    torch.manual_seed(3)
    found = []
    for _ in range(40):
        mean = smooth(head(numbers).rsample((1000,))).mean()
        found.append(torch.autograd.grad(mean, numbers)[0])
    batches = torch.stack(found)
    within(batches.mean(0), expected, batches.std(0) / math.sqrt(40), sigmas=4.5)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_implicit_gradients_of_a_mixture(dim):
    """Logits, means and sds of well separated and of overlapping components that make coordinates
    depend on each other. 4.5 s.e. of 60 batches of 1,000 draws.
    """
    torch.manual_seed(0)
    logits = torch.tensor([0.3, -0.4, 0.0], requires_grad=True)
    locs = (1.2 * torch.randn(3, dim)).requires_grad_()
    scales = (0.4 + torch.rand(3, dim)).requires_grad_()
    parameters = (logits, locs, scales)
    points, cell = grid(dim, steps={1: 2001, 2: 401, 3: 101}[dim], width=7.0)
    points = points[:, 0]
    q = MixtureNormal(*parameters)
    expected = torch.autograd.grad(
        (q.log_prob(points).exp() * cell * smooth(points)).sum(), parameters
    )
    batches = []
    for _ in range(60):
        mean = smooth(MixtureNormal(*parameters).rsample((1000,))).mean()
        batches.append(torch.autograd.grad(mean, parameters))
    for found, exact in zip(zip(*batches, strict=True), expected, strict=True):
        each = torch.stack(found)
        within(each.mean(0), exact, each.std(0) / math.sqrt(60), sigmas=4.5)


def test_implicit_gradients_move_draws_along_the_distribution_functions():
    """In one dimension F(z) stays where it is: dz = -dF / f, here by finite differences."""
    parameters = [
        torch.tensor([0.2, -0.1]),
        torch.tensor([[-1.0], [0.8]]),
        torch.tensor([[0.5], [0.9]]),
    ]
    for which in range(3):
        given = [p.clone().requires_grad_() for p in parameters]
        torch.manual_seed(1)
        z = MixtureNormal(*given).rsample((6,))
        direction = torch.randn_like(given[which])
        ahead, behind = (
            [p + step * direction if i == which else p for i, p in enumerate(parameters)]
            for step in (1e-5, -1e-5)
        )
        for i in range(6):
            (slope,) = torch.autograd.grad(z[i, 0], given[which], retain_graph=True)
            at = z[i].detach()
            f = MixtureNormal(*parameters).log_prob(at).exp()
            expected = -(share_below(at, *ahead) - share_below(at, *behind)) / 2e-5 / f
            torch.testing.assert_close((slope * direction).sum(), expected, rtol=1e-5, atol=1e-7)


def share_below(z, logits, locs, scales):
    """The distribution function of a mixture in one dimension."""
    return (logits.softmax(-1) * torch.special.ndtr((z - locs[:, 0]) / scales[:, 0])).sum()


def test_a_mixture_far_out_has_finite_gradients():
    logits, scales = (
        torch.zeros(2, requires_grad=True),
        torch.full((2, 2), 1e-3, requires_grad=True),
    )
    locs = torch.tensor([[-50.0, 0.0], [50.0, 0.0]], requires_grad=True)
    for dtype in (torch.float32, torch.float64):
        given = [p.to(dtype) for p in (logits, locs, scales)]
        z = MixtureNormal(*given).rsample((200,))
        slopes = torch.autograd.grad(z.sum(), (logits, locs, scales))
        assert all(bool(slope.isfinite().all()) for slope in slopes)
        assert bool(MixtureNormal(*given).log_prob(z).isfinite().all())


def test_moments_of_a_mixture():
    torch.manual_seed(0)
    q = MixtureNormal(torch.randn(4, 3), torch.randn(4, 3, 2), 0.5 + torch.rand(4, 3, 2))
    draws = q.sample((DRAWS,))
    within(draws.mean(0), q.mean, q.variance.sqrt() / math.sqrt(DRAWS))
    # The s.e. of a variance, from the draws' fourth moments.
    square = (draws - q.mean).square()
    within(square.mean(0), q.variance, square.std(0) / math.sqrt(DRAWS))


# -- shapes and dtypes ------------------------------------------------------------------------


@pytest.mark.parametrize("local", [*KINDS, "delta"], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("dim", [1, 3])
def test_dtypes_and_shapes(local, dtype, dim):
    head, numbers = made(local, dim, dtype=dtype)
    assert numbers.shape == (3, head.size)
    assert head.initial(0.1).shape == (head.size,)
    q = head(numbers)
    assert (q.batch_shape, q.event_shape) == ((3,), (dim,))
    value = q.rsample((2, 4))
    assert value.shape == (2, 4, 3, dim)
    assert value.dtype is q.log_prob(value).dtype is dtype
    value.sum().backward()
    assert bool(numbers.grad.isfinite().all())


@pytest.mark.parametrize("local", [*KINDS, "delta"], ids=str)
def test_expanding_changes_nothing(local):
    head, numbers = made(local, 2, rows=1)
    q = head(numbers)
    wide = head(numbers).expand((5, 1))
    assert wide.batch_shape == (5, 1)
    value = q.rsample((5,))
    torch.testing.assert_close(wide.log_prob(value), q.log_prob(value))
    assert wide.rsample().shape == (5, 1, 2)


def test_heads_are_measured_in_their_frame():
    """The same numbers, a hundred times as wide: draws and densities follow."""
    for local in KINDS:
        head, numbers = made(local, 2)
        centre, unit = head.centre.clone(), head.unit.clone()
        torch.manual_seed(0)
        before = head(numbers)
        z, log_q = before.rsample((3,)), None
        log_q = before.log_prob(z)
        head.frame(centre + 7.0, 100.0 * unit)
        torch.manual_seed(0)
        after = head(numbers)
        moved = after.rsample((3,))
        torch.testing.assert_close(moved, centre + 7.0 + 100.0 * (z - centre))
        torch.testing.assert_close(after.log_prob(moved), log_q - 2 * math.log(100.0))


@pytest.mark.parametrize("local", [*KINDS, "delta"], ids=str)
def test_another_frame_changes_numbers_and_no_distribution(local):
    head, numbers = made(local, 3)
    with torch.no_grad():
        torch.manual_seed(0)
        before = head(numbers).sample((4,))
        log_q = head(numbers).log_prob(before)
        other = head.reframe(numbers, torch.tensor([3.0, -1.0, 0.2]), torch.tensor([0.1, 5.0, 1.0]))
        torch.manual_seed(0)
        after = head(other).sample((4,))
        torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(head(other).log_prob(after), log_q, rtol=1e-9, atol=1e-9)
    assert head.unit.tolist() == [0.1, 5.0, 1.0]


# -- in a guide -------------------------------------------------------------------------------


def global_and_local(y):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("datum", len(y)) as index:
        z = pyro.sample("z", dist.Normal(m.unsqueeze(-1) * torch.ones(2), 1.0).to_event(1))
        s = pyro.sample("s", dist.Gamma(2.0, 2.0))
        pyro.sample("y", dist.Normal(z.sum(-1), s), obs=y[index])


def nested(y):
    """An outer data plate with a plate of latents and observations inside."""
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("group", y.shape[1], dim=-1) as g:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("member", y.shape[0], dim=-2):
            z = pyro.sample("z", dist.Normal(m, scale))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[:, g])


def two_plates(y, x):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("a", len(y)) as i:
        u = pyro.sample("u", dist.Normal(m, 1.0))
        pyro.sample("y", dist.Normal(u, 1.0), obs=y[i])
    with pyro.plate("b", len(x)) as j:
        v = pyro.sample("v", dist.Normal(m.unsqueeze(-1) * torch.ones(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(v, 1.0).to_event(1), obs=x[j])


def model_of(fn):
    torch.manual_seed(11)
    shapes = {global_and_local: [(5,)], nested: [(3, 4)], two_plates: [(5,), (4, 2)]}[fn]
    return vi.Model(fn, *(torch.randn(shape) for shape in shapes))


MODELS = (global_and_local, nested, two_plates)
each_model = pytest.mark.parametrize("fn", MODELS, ids=lambda fn: fn.__name__)
each_condition = pytest.mark.parametrize("conditioned", [False, True], ids=["free", "conditioned"])


@each_kind
@each_model
@each_condition
@pytest.mark.parametrize("vectorize", [False, True], ids=["looped", "vectorised"])
def test_a_stock_svi_sees_the_same_log_weights(local, fn, conditioned, vectorize):
    model = model_of(fn)
    guide = perturb(guides.make(Amortized(local=local, conditioned=conditioned), model))
    if vectorize:
        loss = Trace_ELBO(num_particles=3, vectorize_particles=True)
        loss.loss(model.fn, guide, *model.args)  # guesses the plate nesting
        pyro.set_rng_seed(1)
        stock = -loss.loss(model.fn, guide, *model.args)
        pyro.set_rng_seed(1)
        ours = guide.log_weights(3).joint().mean().item()
    else:
        pyro.set_rng_seed(1)
        stock = -Trace_ELBO(num_particles=2).loss(model.fn, guide, *model.args)
        pyro.set_rng_seed(1)
        ours = sum(guide.log_weights(1).joint().item() for _ in range(2)) / 2
    assert stock == pytest.approx(ours, rel=1e-10)


@each_model
def test_a_table_in_a_stock_svi(fn):
    model = model_of(fn)
    guide = guides.tabulated(perturb(guides.make(Amortized(local="full_rank"), model)))
    pyro.set_rng_seed(1)
    stock = -Trace_ELBO().loss(model.fn, guide, *model.args)
    pyro.set_rng_seed(1)
    assert stock == pytest.approx(guide.log_weights(1).joint().item(), rel=1e-10)


@each_kind
@each_condition
def test_a_table_says_what_its_encoder_said(local, conditioned):
    """Where the encoder sees the globals, at their mean."""
    spec = Amortized(local=local, conditioned=conditioned, globals="affine_coupling")
    guide = perturb(guides.make(spec, model_of(global_and_local)))
    table = guides.tabulated(guides.held_at_mean(guide))
    assert isinstance(table.families["local"].source, Table)
    draws = []
    for one in (guides.held_at_mean(guide), table):
        with RandomStream(0), torch.no_grad():
            draws.append(one.log_weights(4, share=True).local["datum"])
    torch.testing.assert_close(*draws, rtol=1e-9, atol=1e-9)


@each_kind
@pytest.mark.parametrize("objective", [Elbo(2), Iwae(3)], ids=repr)
@pytest.mark.parametrize("estimator", ["pathwise", "dreg"])
def test_captured_steps_are_the_eager_steps(local, objective, estimator):
    """With a conditioned encoder, on minibatches."""
    engines = []
    for engine in (EagerEngine, CapturedEngine):
        density = Density(model_of(global_and_local))
        guide = perturb(guides.make(Amortized(local=local, conditioned=True), density))
        batches = Batches({density.structure.plates["datum"]: 3})
        engines.append(engine(guide, objective, seed=5, batches=batches, estimator=estimator))
    expected, found = (engine.run(4, 0.02) for engine in engines)
    assert engines[1].name == "captured", engines[1].note
    torch.testing.assert_close(found.bounds, expected.bounds, rtol=1e-9, atol=1e-9)
    for name, value in expected.average.items():
        torch.testing.assert_close(found.average[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("local", ["full_rank", "mixture", "affine_coupling"])
def test_captured_steps_of_tables_are_the_eager_steps(local):
    engines = []
    for engine in (EagerEngine, CapturedEngine):
        density = Density(local_model(n=9, dim=2))
        guide = guides.tabulated(perturb(guides.make(Amortized(local=local), density)))
        guide.requires_grad_(False)
        guide.families["local"].source.requires_grad_()
        batches = Batches({density.structure.plates["datum"]: 4})
        engines.append(engine(guide, Elbo(2), seed=5, batches=batches))
    assert not engines[0].trained
    before = {n: p.clone() for n, p in engines[0].parameters().items()}
    expected, found = (engine.run(5, 0.02) for engine in engines)
    assert engines[1].name == "captured", engines[1].note
    torch.testing.assert_close(found.bounds, expected.bounds, rtol=1e-9, atol=1e-9)
    for name, value in engines[0].parameters().items():
        torch.testing.assert_close(engines[1].parameters()[name], value, rtol=1e-9, atol=1e-9)
        assert torch.equal(value, before[name]) == ("source.rows" not in name)


@pytest.mark.slow
@pytest.mark.parametrize("objective", [Elbo(3), Iwae(3), Renyi(0.5, 3)], ids=repr)
@pytest.mark.parametrize("local", ["mean_field", "full_rank", "mixture", "affine_coupling"])
def test_gradients_of_conditioned_blocks_are_unbiased(local, objective):
    """dreg against pathwise: 4.5 s.e. of the difference on common draws, 400 pairs, in the projections
    of the gradient of each of some 10 parameters on fixed random directions.
    """
    spec = Amortized(local=local, conditioned=True, hidden=(4,))
    guide = perturb(guides.make(spec, local_and_global_model(n=3)), size=0.3)
    named = dict(guide.named_parameters())
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(p.shape, generator=generator) for p in named.values()]
    torch.manual_seed(5)
    differences = []
    for _ in range(400):
        state, slopes = torch.get_rng_state(), []
        for estimator in ("dreg", "pathwise"):
            torch.set_rng_state(state)
            _, loss = surrogate(
                guide, objective, 3, share=objective.multi_sample, estimator=estimator
            )
            gradients = torch.autograd.grad(
                loss, list(named.values()), allow_unused=True, materialize_grads=True
            )
            slopes.append(
                torch.stack([(g * d).sum() for g, d in zip(gradients, directions, strict=True)])
            )
        differences.append(slopes[0] - slopes[1])
    each = torch.stack(differences)
    within(each.mean(0), torch.zeros(len(named)), each.std(0) / math.sqrt(len(each)), sigmas=4.5)
    assert bool(each.abs().sum() > 0)


@each_kind
@each_condition
def test_the_bound_per_datum_is_a_loop_over_rows(local, conditioned):
    """On given globals, rows of a minibatch are those rows among all."""
    guide = perturb(
        guides.make(Amortized(local=local, conditioned=conditioned), model_of(global_and_local))
    )
    rows = torch.tensor([3, 0])
    with RandomStream(0), torch.no_grad():
        draw = guide.draw(4, {"datum": rows}, share=True)
        weights = guide.weigh(draw, None, {"datum": rows})
    assert weights.scale["datum"] == 2.5
    bound = evaluate(Iwae(4), weights)
    local_part = weights.local["datum"].logsumexp(0) - math.log(4)
    expected = weights.shared.mean() + 2.5 * (local_part[0] + local_part[1])
    torch.testing.assert_close(bound, expected)


def test_each_plate_has_its_encoder():
    torch.manual_seed(0)
    encoders = {"a": nn.Linear(1, 2), "b": nn.Linear(2, 4)}
    guide = guides.make(Amortized(encoder=encoders), model_of(two_plates))
    assert [block.name for block in guide.blocks] == ["global", "local_a", "local_b"]
    for plate, encoder in encoders.items():
        family = guide.families[f"local_{plate}"]
        assert torch.equal(family.source.encoder.weight, encoder.weight)
        assert family.source.encoder is not encoder
    # One that is left out is made.
    partly = guides.make(Amortized(encoder={"b": encoders["b"]}), model_of(two_plates))
    assert type(partly.families["local_a"].source).__name__ == "Standardised"


# -- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["layers", "hidden", "features"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True, "3"])
def test_counts_of_a_local_flow(option, value):
    with pytest.raises(OptionError, match=f"affine_coupling: {option} must be a positive integer"):
        LocalFlow(**{option: value})


@pytest.mark.parametrize("value", [0, 1.5, True])
def test_counts_of_a_local_mixture(value):
    with pytest.raises(OptionError, match="mixture: components must be a positive integer"):
        LocalMixture(components=value)


def test_local_families_are_named_or_configured():
    with pytest.raises(UnknownNameError, match=r"mean_field"):
        Amortized(local="fullrank")
    for wrong in (LocalMixture, 3, None):
        with pytest.raises(OptionError, match=r"local= takes a name \(delta, mean_field"):
            Amortized(local=wrong)
    with pytest.raises(OptionError, match="local='delta' has no spread"):
        Amortized(local="delta")
    with pytest.raises(UnknownNameError, match="globals"):
        Amortized(globals="mixtur")


def test_encoders_go_by_plate():
    model = model_of(two_plates)
    with pytest.raises(OptionError, match="plates a, b need an encoder each: give encoder= a dict"):
        guides.make(Amortized(encoder=nn.Linear(1, 2)), model)
    with pytest.raises(OptionError, match="encoder= names plate 'c'; the plates with latents and"):
        guides.make(Amortized(encoder={"c": nn.Linear(1, 2)}), model)
    with pytest.raises(OptionError, match=r"must be a torch\.nn\.Module, or a dict of them"):
        Amortized(encoder={"a": 3})


def test_a_pair_is_of_normals_only():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x.exp()

    with pytest.raises(OptionError, match=r"one tensor \(2, 5\): the numbers of DenseHead for 2"):
        guides.make(Amortized(encoder=Pair(), local="full_rank"), local_model(dim=2))


def test_conditioned_encoders_are_shown_the_globals():
    with pytest.raises(OptionError, match=r"raised RuntimeError on an input of shape \(2, 2\)"):
        guides.make(Amortized(encoder=nn.Linear(1, 2), conditioned=True), local_and_global_model())
    guide = guides.make(
        Amortized(encoder=nn.Linear(2, 2), conditioned=True), local_and_global_model()
    )
    assert guide.families["local"].conditioned


def test_tables_take_the_data_they_were_made_for():
    guide = guides.tabulated(guides.make("amortized", local_model(n=6)))
    with pytest.raises(OptionError, match="numbers for each of the 6 rows of plate 'datum'"):
        guide.moved_to(Density(local_model(n=7)))
    moved = guide.moved_to(Density(local_model(n=6, seed=3)))
    assert torch.equal(moved.families["local"].source.rows, guide.families["local"].source.rows)


def test_guides_without_a_form_per_datum_are_refused_minibatches():
    density = Density(local_model(n=6))
    plates = list(density.structure.plates.values())
    with pytest.raises(OptionError, match="needs guide='amortized' or one of delta, mean_field"):
        guides.per_datum(object(), density, plates)
