"""Guides that hold discrete sites: fits against closed forms, draws, files, stock Pyro, refusals."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from discrete_toys import PRIOR, Y, by_index, by_weights, clusters, codes, coordinate_ascent
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from toys import traced_log_weight

import pyro_vi_kit as vi
from pyro_vi_kit import guides
from pyro_vi_kit.core.contracts import Batch
from pyro_vi_kit.core.errors import ModelError, OptionError, UnknownNameError
from pyro_vi_kit.guides import Amortized, FullRank, LowRank, MeanField, Relaxed
from pyro_vi_kit.model.log_density import Density, Drawn
from pyro_vi_kit.objectives import Elbo
from pyro_vi_kit.objectives.estimators import surrogate

pytestmark = pytest.mark.usefixtures("float64", "own_param_store")

SPECS = [
    MeanField(discrete="score"),
    FullRank(discrete="score"),
    LowRank(discrete={"z": "score", "b": Relaxed(0.3)}),
    Amortized(hidden=(8,), discrete={"b": "relaxed", "z": "score"}),
    Amortized(hidden=(8,), local="full_rank", discrete="score"),
]
DTYPES = [torch.float64, torch.float32, torch.float64, torch.float32, torch.float64]


def model_of_codes(n=6):
    generator = torch.Generator().manual_seed(1)
    return vi.Model(codes, torch.randn(n, generator=generator, dtype=torch.float64))


# -- fits -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster_fit():
    y, model = clusters()
    return y, model, vi.fit(model, MeanField(discrete="score"), seed=0, progress=False)


def test_score_ends_at_the_best_mean_field(cluster_fit):
    """Coordinate ascent has the optimum in closed form; the fit may fall short by its tolerance."""
    y, _, posterior = cluster_fit
    elbo, probabilities, mean = coordinate_ascent(y)
    shortfall = elbo - posterior.elbo
    assert abs(shortfall) < 0.1 + 3 * posterior.elbo_se
    guide = posterior.approximation.guide
    found = guide.families["local"].table.rows.detach().softmax(-1)[:, 1]
    # A shortfall of 0.1 nats is KL(q || q*) at most, and so a gap of sqrt(0.1 / 2) = 0.22 in any p.
    assert float((found - probabilities).abs().max()) < 0.22
    assert float((found - probabilities).abs().mean()) < 0.05
    torch.testing.assert_close(guide.families["global"]().mean.detach(), mean, atol=0.15, rtol=0)
    assert posterior.engine == "captured"
    assert posterior.record.note == ""
    assert posterior.record.estimator == "dreg"


@pytest.mark.slow
def test_relaxed_draws_end_there_too():
    y, _ = clusters()

    def by_number(y):
        mu = pyro.sample("mu", dist.Normal(y.new_tensor([-1.0, 1.0]), 3.0).to_event(1))
        with pyro.plate("datum", len(y)) as index:
            z = pyro.sample("z", dist.Bernoulli(y.new_tensor(0.4)))
            pyro.sample("y", dist.Normal(mu[0] + z * (mu[1] - mu[0]), 1.0), obs=y[index])

    posterior = vi.fit(vi.Model(by_number, y), MeanField(discrete="relaxed"), seed=0)
    elbo, _, _ = coordinate_ascent(y)
    # The bias of a temperature of 0.1 on top of the tolerance.
    assert -3 * posterior.elbo_se < elbo - posterior.elbo < 0.3 + 3 * posterior.elbo_se


def test_weights_are_those_of_the_discrete_density(cluster_fit):
    """log p(y, z, mu) - log q(z) - log q(mu) at the draws, by hand."""
    y, _, posterior = cluster_fit
    z = posterior.approximation.unconstrained(50, seed=3)
    values = posterior.sample(50, seed=3)
    guide = posterior.approximation.guide
    mu, state = torch.as_tensor(values["mu"]), torch.as_tensor(values["z"])
    torch.testing.assert_close(z["z"].argmax(-1), state)
    prior = dist.Normal(torch.tensor([-1.0, 1.0]), 3.0).log_prob(mu).sum(-1)
    own = dist.Bernoulli(torch.tensor(0.4)).log_prob(state.double()).sum(-1)
    fit = dist.Normal(mu.gather(1, state), 1.0).log_prob(y).sum(-1)
    rows = guide.families["local"].table.rows.detach()
    log_q = dist.Categorical(logits=rows).log_prob(state).sum(-1)
    log_q = log_q + guide.families["global"]().log_prob(mu).detach()
    found = torch.as_tensor(posterior.log_weights(50, seed=3))
    torch.testing.assert_close(found, prior + own + fit - log_q)


def test_draws_are_integers_and_go_out(cluster_fit, tmp_path):
    y, model, posterior = cluster_fit
    draws = posterior.sample(200, seed=0)["z"]
    assert draws.shape == (200, len(y))
    assert draws.dtype.kind == "i"
    assert set(draws.ravel()) == {0, 1}
    exported = posterior.to_arviz()
    assert exported.posterior["z"].dims == ("chain", "draw", "datum")
    assert "z[0]" in posterior.summary().index
    assert posterior.verdict.level in ("good", "resample", "reject")
    posterior.save(tmp_path / "fit.nc")
    again = vi.load(tmp_path / "fit.nc", model)
    assert again.elbo == posterior.elbo
    new = posterior.predict(y[:5], draws=30, seed=0)
    assert new["y"].shape == (30, 5)


def test_every_estimate_of_a_step_is_on_the_recorded_noise(cluster_fit):
    """The captured engine, which draws states by Gumbel noise, repeats the eager one."""
    _, model, _ = cluster_fit
    found = [
        vi.fit(model, MeanField(discrete="score"), engine=engine, steps=30, seed=2)
        for engine in ("captured", "eager")
    ]
    assert [posterior.engine for posterior in found] == ["captured", "eager"]
    assert found[0].losses == pytest.approx(found[1].losses, rel=1e-9)


@pytest.mark.parametrize("objective", ["iwae", "renyi", "annealed", "beta"])
def test_other_objectives_take_steps(cluster_fit, objective):
    _, model, _ = cluster_fit
    options = {"steps": 5} if objective == "annealed" else {}
    chosen = vi.objectives.make(objective, **options)
    posterior = vi.fit(model, FullRank(discrete="score"), chosen, steps=20, seed=0)
    assert torch.isfinite(torch.tensor(posterior.losses)).all()
    assert posterior.engine == "captured"


# -- the parts of a row -----------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_density_at_draws_is_that_of_their_parts(spec):
    """Log q of a row: each site's own distribution at its own value."""
    guide = guides.make(spec, model_of_codes())
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        drawn = guide.draw(4)
        shared, local = guide.log_q(drawn)
        block = guide.blocks[-1]
        q = guide.families[block.name](guide.rows(block))
        logits = dict(
            zip([s.name for s in block.sites if s.states], q._parted(q.logits), strict=True)
        )
        parts = [
            dist.OneHotCategorical(logits=logits["z"][:, 0]).log_prob(drawn.z["z"]),
            dist.OneHotCategorical(logits=logits["b"]).log_prob(drawn.z["b"]).sum(-1),
        ]
        if q.continuous is not None:
            parts.append(q.continuous.log_prob(drawn.z["e"].unsqueeze(-1)))
    torch.testing.assert_close(local["datum"], drawn.local["datum"])
    torch.testing.assert_close(drawn.local["datum"], sum(parts))
    torch.testing.assert_close(shared, drawn.shared)


@pytest.mark.parametrize(("spec", "dtype"), list(zip(SPECS, DTYPES, strict=True)), ids=str)
def test_fits_are_saved_and_drawn_from(spec, dtype, tmp_path):
    model = model_of_codes()
    posterior = vi.fit(model, spec, steps=20, seed=0, dtype=dtype)
    draws = posterior.sample(7, seed=1)
    assert draws["b"].shape == (7, 6, 2)
    assert draws["z"].shape == draws["e"].shape == (7, 6)
    posterior.save(tmp_path / "fit.nc")
    again = vi.load(tmp_path / "fit.nc", model)
    assert (again.sample(7, seed=1)["z"] == draws["z"]).all()
    assert again.elbo == posterior.elbo


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_rows_come_in_minibatches(spec, tmp_path):
    model = model_of_codes(12)
    posterior = vi.fit(model, spec, batch_size=4, steps=20, seed=0)
    posterior.save(tmp_path / "fit.nc")
    again = vi.load(tmp_path / "fit.nc", model)
    assert (again.sample(7, seed=1)["b"] == posterior.sample(7, seed=1)["b"]).all()
    resumed = vi.fit(model, resume=posterior, steps=5)
    assert resumed.losses.shape[-1] > posterior.losses.shape[-1]


def test_a_minibatch_has_the_gradient_of_all_rows_on_average():
    """Over the two halves of the rows: the mean of theirs is that of all, within 4 standard errors."""
    guide = guides.make("mean_field", vi.Model(by_index, torch.cat([Y, Y[:1]])), discrete="score")
    table = guide.families["local"].table.rows

    def mean_and_error(index, repeats=100):
        torch.manual_seed(0)
        found = []
        for _ in range(repeats):
            _, loss = surrogate(guide, Elbo(20), 20, Batch(index), share=False, estimator="dreg")
            found.append(torch.autograd.grad(loss, table)[0])
        return torch.stack(found).mean(0), torch.stack(found).std(0) / repeats**0.5

    whole, error = mean_and_error(None)
    halves = [mean_and_error({"datum": torch.tensor(rows)}) for rows in ([0, 1], [2, 3])]
    mean = sum(half for half, _ in halves) / 2
    errors = (error**2 + sum(e**2 for _, e in halves) / 4).sqrt()
    assert float(((mean - whole).abs() / errors).max()) < 4.0
    assert float(errors.norm()) < 0.2 * float(whole.norm())


def test_an_encoder_reads_rows_it_has_not_seen():
    model = model_of_codes()
    posterior = vi.fit(model, Amortized(hidden=(8,), discrete="score"), steps=20, seed=0)
    other = posterior.infer(model.args[0][:3] + 1)
    assert other.sample(5, seed=0)["z"].shape == (5, 3)
    refined = posterior.refine(steps=20)
    assert refined.sample(5, seed=0)["b"].shape == (5, 6, 2)


def test_others_are_summed_out():
    """With z drawn and w summed out, log p is that of both summed out less log p(z | rest)."""

    def mixed(y):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("datum", len(y)) as index:
            z = pyro.sample("z", dist.Categorical(PRIOR))
            w = pyro.sample("w", dist.Bernoulli(0.2 + 0.2 * z))
            pyro.sample("y", dist.Normal(m + z + 3 * w, 1.0), obs=y[index])

    model = vi.Model(mixed, Y)
    some = Density(model, drawn=Drawn({"z": False}))
    assert [site.name for site in some.discrete] == ["w"]
    m = torch.tensor([0.3, -0.7])
    rows = []
    for state in range(3):
        one = torch.zeros(2, 3, 3)
        one[..., state] = 1.0
        rows.append(some.terms({"m": m, "z": one}).local["datum"])
    summed = Density(model).terms({"m": m}).local["datum"]
    torch.testing.assert_close(torch.logsumexp(torch.stack(rows), 0), summed)
    posterior = vi.fit(model, MeanField(discrete={"z": "score"}), steps=20, seed=0)
    assert posterior.sample(5, seed=0)["w"].shape == (5, 3)


def test_a_masked_row_sums_to_one():
    def masked(y):
        pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("datum", len(y)), pyro.poutine.mask(mask=torch.tensor([True, False, True])):
            z = pyro.sample("z", dist.Categorical(PRIOR))
            pyro.sample("y", dist.Normal(z.to(y), 1.0), obs=y)

    model = vi.Model(masked, Y)
    density = Density(model, drawn=Drawn(others=False))
    one = torch.eye(3).unsqueeze(1).expand(3, 3, 3)
    rows = density.terms({"m": torch.zeros(3), "z": one}).local["datum"]
    summed = Density(model).terms({"m": torch.zeros(1)}).local["datum"][0]
    torch.testing.assert_close(torch.logsumexp(rows, 0), summed)


# -- stock Pyro -------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS[:1] + SPECS[3:4], ids=str)
def test_stock_traces_have_the_same_weights(spec):
    model = model_of_codes()
    guide = guides.make(spec, model)
    pyro.set_rng_seed(0)
    log_w, trace = traced_log_weight(model, guide)
    assert trace.nodes["z"]["value"].dtype == torch.long
    flat = {
        name: node["value"] for name, node in trace.nodes.items() if name.startswith(guide.name)
    }
    z = {}
    for block in guide.blocks:
        part = next(value for name, value in flat.items() if name.endswith(f"_{block.name}"))
        z |= block.unpack(part.reshape(1, *part.shape))
    log_p = guide.density.terms(z).total()
    drawn = guides.Draw(z, torch.zeros(1), {}, {b.name: b.pack(z) for b in guide.blocks})
    shared, local = guide.log_q(drawn)
    expected = log_p - shared - sum(rows.sum(-1) for rows in local.values())
    torch.testing.assert_close(log_w, expected[0])


def test_stock_svi_takes_steps():
    model = model_of_codes()
    guide = guides.make(MeanField(discrete="score"), model)
    svi = SVI(model.fn, guide, Adam({"lr": 0.05}), Trace_ELBO(num_particles=2))
    before = guide.families["local"].table.rows.detach().clone()
    for _ in range(3):
        svi.step(*model.args)
    assert bool((guide.families["local"].table.rows != before).any())


def test_the_stock_engine_refuses_what_renyi_gets_wrong():
    with pytest.raises(OptionError, match="cannot be reparameterised"):
        vi.fit(vi.Model(by_index, Y), MeanField(discrete="score"), "iwae", engine="pyro", steps=3)


# -- starts and refusals ----------------------------------------------------------------------


def test_globals_start_where_they_are_told():
    _, model = clusters()
    spec = MeanField(discrete="score")
    posterior = vi.fit(model, spec, init={"mu": [4.0, 5.0]}, steps=1, seed=0)
    mean = posterior.approximation.guide.families["global"]().mean.detach()
    torch.testing.assert_close(mean, torch.tensor([4.0, 5.0]), atol=0.3, rtol=0)
    with pytest.raises(OptionError, match=r"'z', which this guide holds row by row.*mu"):
        vi.fit(model, spec, init={"z": torch.zeros(24)}, steps=1)


def test_what_means_nothing_is_refused():
    with pytest.raises(UnknownNameError, match="reinforce"):
        MeanField(discrete="reinforce")
    with pytest.raises(OptionError, match="by site"):
        FullRank(discrete=3)
    with pytest.raises(OptionError, match="leave the others out"):
        MeanField(discrete={})
    with pytest.raises(OptionError, match="leave conditioned= out"):
        Amortized(discrete="score", conditioned=True)
    with pytest.raises(OptionError, match="temperature must be a positive number"):
        Relaxed(0.0)
    with pytest.raises(OptionError, match="steps must be a positive integer"):
        Relaxed(steps=0)


@pytest.mark.parametrize(
    ("discrete", "said"),
    [
        ({"y": "score"}, r"names 'y', and the discrete latents of this model are z"),
        ("relaxed", r"'z', which is Categorical.*OneHotCategorical"),
    ],
)
def test_sites_that_cannot_be_held(discrete, said):
    with pytest.raises(OptionError, match=said):
        vi.fit(vi.Model(by_index, Y), MeanField(discrete=discrete))


def test_a_site_outside_of_plates_is_summed_out():
    def outside(y):
        pyro.sample("m", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Bernoulli(0.4))
        with pyro.plate("datum", len(y)):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    with pytest.raises(OptionError, match="'z' is in none"):
        vi.fit(vi.Model(outside, Y), MeanField(discrete="score"))


def test_infinitely_many_values_are_too_many():
    def counts(y):
        pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("datum", len(y)):
            z = pyro.sample("z", dist.Poisson(2.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    with pytest.raises(OptionError, match=r"finitely many values.*'z' is Poisson"):
        vi.fit(vi.Model(counts, Y), MeanField(discrete="score"))


def test_a_model_that_rounds_relaxed_values_is_refused():
    def rounds(y):
        m = pyro.sample("m", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("datum", len(y)):
            z = pyro.sample("z", dist.Bernoulli(0.4))
            pyro.sample("y", dist.Normal(m[z.long()], 1.0), obs=y)

    with pytest.raises(OptionError, match=r"'z', and it rounds them.*'score'"):
        vi.fit(vi.Model(rounds, Y), MeanField(discrete="relaxed"))


def test_without_the_option_they_are_summed_out_as_before():
    assert guides.make("mean_field", vi.Model(by_weights, Y)).density.drawn is None
    with pytest.raises((ModelError, OptionError)):
        vi.fit(vi.Model(codes, Y), "mean_field", steps=2)  # two bits in one event
