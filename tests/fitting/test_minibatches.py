"""`batch_size=`: any data plate, any guide; the same posterior as the full data; what is refused."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO
from toys import local_and_global_model, local_evidence, local_model, two_scales_model

import pyro_vi_kit as vi
from benchmarks.peers.rows import grouped, moments, regression
from pyro_vi_kit import guides
from pyro_vi_kit.core.errors import ModelError, OptionError
from pyro_vi_kit.core.runtime import RandomStream
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.model.log_density.subsampling import require_subsamplable
from pyro_vi_kit.objectives import Elbo, Iwae
from pyro_vi_kit.optimize.engines import Batches, CapturedEngine, EagerEngine

ROWS, COLUMNS = 60, 3


def data(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    y = x.sum(-1) + 0.5 * torch.randn(ROWS, generator=generator, dtype=torch.float64)
    return x, y


def indexed(x, y):
    beta = pyro.sample("beta", dist.Normal(x.new_zeros(COLUMNS), 1.0).to_event(1))
    with pyro.plate("row", len(y)) as i:
        pyro.sample("y", dist.Normal(x[i] @ beta, 0.5), obs=y[i])


def declared(x, y):
    beta = pyro.sample("beta", dist.Normal(x.new_zeros(COLUMNS), 1.0).to_event(1))
    with pyro.plate("row", len(y), subsample_size=7) as i:
        pyro.sample("y", dist.Normal(x[i] @ beta, 0.5), obs=y[i])


def subsampled(x, y):
    beta = pyro.sample("beta", dist.Normal(x.new_zeros(COLUMNS), 1.0).to_event(1))
    with pyro.plate("row", len(y)):
        some_x, some_y = pyro.subsample(x, event_dim=1), pyro.subsample(y, event_dim=0)
        pyro.sample("y", dist.Normal(some_x @ beta, 0.5), obs=some_y)


def exact(x, y):
    """Posterior mean and covariance of `indexed`."""
    precision = torch.eye(COLUMNS, dtype=x.dtype) + x.T @ x / 0.25
    covariance = torch.linalg.inv(precision)
    return covariance @ (x.T @ y / 0.25), covariance


EACH_WAY = pytest.mark.parametrize("model", [indexed, declared, subsampled])


@EACH_WAY
def test_an_epoch_of_minibatches_has_the_full_gradient(model):
    """On one noise, gradients of the ELBO averaged over disjoint batches are that of all rows."""
    x, y = data()
    density = Density(vi.Model(model, x, y))
    guide = guides.make("full_rank", density)
    parameters = list(guide.parameters())

    def gradient(index):
        with RandomStream(3):
            loss = -guide.log_weights(5, index=index).joint().mean()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    whole = gradient(None)
    parts = [gradient({"row": rows}) for rows in torch.randperm(ROWS).split(12)]
    torch.testing.assert_close(torch.stack(parts).mean(0), whole, rtol=1e-10, atol=1e-10)


@EACH_WAY
def test_the_posterior_is_that_of_all_rows(model):
    x, y = data()
    posterior = vi.fit(vi.Model(model, x, y), "full_rank", batch_size=12, tol=0.003, seed=0)
    mean, covariance = exact(x, y)
    found = posterior.approximation.guide.families["latent"]()
    sd = covariance.diagonal().sqrt()
    # At most 0.003 nats short: a mean that is 0.08 sd off, or an sd 5 %, would cost as much alone.
    assert ((found.mean - mean) / sd).abs().max() < 0.08
    assert (found.stddev / sd - 1).abs().max() < 0.06
    assert posterior.record.batch_size == 12
    assert posterior.status.reason == "converged"


@pytest.mark.slow
def test_local_latents_in_minibatches_have_the_posterior_of_the_full_data():
    """85 groups of 900 rows, 17 groups a step: within 0.02 sd, which is 2e-4 nats a latent."""
    model = vi.Model(regression, *grouped(85, 900, seed=1))
    whole = moments(vi.fit(model, "mean_field", seed=0))
    posterior = vi.fit(model, "mean_field", batch_size=17, tol=0.002, seed=0)
    assert posterior.engine == "captured"
    for name, (mean, sd) in moments(posterior).items():
        assert ((mean - whole[name][0]) / whole[name][1]).abs().max() < 0.02, name
        assert (sd / whole[name][1] - 1).abs().max() < 0.02, name


@pytest.mark.parametrize("name", ["mean_field", "full_rank", "low_rank", "affine_coupling"])
@pytest.mark.parametrize("objective", [Elbo(3), Iwae(3)])
def test_a_step_on_tables_moves_the_rows_of_its_batch_alone(name, objective):
    def made(cls):
        density = Density(local_and_global_model(n=9))
        plate = density.structure.plates["datum"]
        with RandomStream(0):
            guide = guides.per_datum(guides.specify(name), density, [plate])
        return cls(guide, objective, seed=5, batches=Batches({plate: 4}), estimator="dreg")

    eager, captured = made(EagerEngine), made(CapturedEngine)
    before = {n: p.detach().clone() for n, p in eager.guide.named_parameters()}
    one = eager.run(1, 0.05)
    after = dict(eager.guide.named_parameters())
    table = next(n for n in before if n.endswith("source.rows"))
    moved = (after[table] != before[table]).any(-1)
    assert int(moved.sum()) == 4
    same = captured.run(1, 0.05)
    torch.testing.assert_close(one.bounds, same.bounds, rtol=1e-10, atol=1e-10)
    eager.run(7, 0.05)
    captured.run(7, 0.05)
    assert captured.name == "captured"
    for n, value in captured.guide.named_parameters():
        torch.testing.assert_close(value, after[n], rtol=1e-9, atol=1e-9)


# -- multi-sample bounds ----------------------------------------------------------------------


def test_a_subsampled_multi_sample_bound_stays_below_the_evidence():
    """N = 20, B = 5, K = 64: unbiased for the full bound, where stock RenyiELBO is over the evidence."""
    model = local_model(n=20, seed=4)
    (y,) = model.args
    evidence = local_evidence(y)
    density = Density(model)
    plate = density.structure.plates["datum"]
    guide = guides.per_datum(guides.specify("mean_field"), density, [plate])
    with torch.no_grad():
        # From the prior, N(0, 1): far enough from N(y / 2, 1 / 2) for the bound to be below.
        guide.families["local"].table.rows.zero_()
    engine = EagerEngine(guide, Iwae(64), seed=0, batches=Batches({plate: 5}))
    ours = engine.run(400, 0.0).bounds
    with RandomStream(1), torch.no_grad():
        rows = [guide.log_weights(64, share=True).local["datum"] for _ in range(400)]
    full = torch.stack([Iwae(64).bound(row).sum() for row in rows])
    se = math.hypot(float(ours.std()) / 20, float(full.std()) / 20)
    assert abs(float(ours.mean() - full.mean())) < 4 * se
    assert float(full.mean()) < evidence
    assert float(ours.mean()) < evidence + 4 * float(ours.std()) / 20

    def stock(y, dim):
        with pyro.plate("datum", len(y), subsample_size=5) as index:
            z = pyro.sample("z", dist.Normal(y.new_zeros(dim), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y[index])

    def prior(y, dim):
        with pyro.plate("datum", len(y), subsample_size=5):
            pyro.sample("z", dist.Normal(y.new_zeros(dim), 1.0).to_event(1))

    with RandomStream(2), pyro.get_param_store().scope():
        loss = RenyiELBO(alpha=0, num_particles=64, vectorize_particles=True, max_plate_nesting=1)
        bounds = torch.tensor([-loss.loss(stock, prior, y, dim=1) for _ in range(200)])
    assert float(bounds.mean()) > evidence + 4 * float(bounds.std()) / math.sqrt(200)


def test_a_multi_sample_bound_needs_latents_in_the_plate():
    model = vi.Model(indexed, *data())
    with pytest.raises(OptionError, match=r"minibatches of plate 'row'.*objective='elbo'"):
        vi.fit(model, "mean_field", "iwae", batch_size=12, seed=0)


def test_a_row_that_depends_on_latents_of_two_plates_has_no_bound_of_its_own():
    def ratings(y):
        with pyro.plate("user", 4, dim=-2):
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
        with pyro.plate("item", 3, dim=-1):
            v = pyro.sample("v", dist.Normal(0.0, 1.0))
        with pyro.plate("user", 4, dim=-2) as i, pyro.plate("item", 3, dim=-1) as j:
            pyro.sample("y", dist.Normal(u * v, 1.0), obs=y[i][:, j])

    model = vi.Model(ratings, torch.ones(4, 3))
    with pytest.raises(OptionError, match=r"'y' depends on the latents of two plates"):
        vi.fit(model, "amortized", "iwae", steps=5, seed=0)
    posterior = vi.fit(model, "amortized", steps=20, seed=0)
    assert posterior.sample(3, seed=0)["u"].shape[0] == 3


# -- which plate ------------------------------------------------------------------------------


def two_plates(y, z):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("short", len(y)) as i:
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y[i])
    with pyro.plate("long", len(z)) as i:
        pyro.sample("z", dist.Normal(mean, 1.0), obs=z[i])


@pytest.mark.parametrize(
    ("batch_size", "sizes"),
    [
        (4, {"long": 4}),
        ({"short": 2}, {"short": 2}),
        ({"short": 2, "long": 5}, {"short": 2, "long": 5}),
    ],
)
def test_a_number_means_the_largest_plate(batch_size, sizes):
    model = vi.Model(two_plates, torch.randn(6), torch.randn(11))
    posterior = vi.fit(model, "mean_field", batch_size=batch_size, steps=3, seed=0)
    assert posterior.record.batch_size == batch_size
    from pyro_vi_kit.fitting.minibatches import sizes_of

    assert {p.name: s for p, s in sizes_of(batch_size, posterior.density).items()} == sizes


@pytest.mark.parametrize(
    ("batch_size", "said"),
    [
        ({"rows": 4}, "names plate 'rows'; the model's plates are short, long"),
        ({"short": 7}, "between 1 and the 6 rows of plate 'short'"),
        ({"short": 0}, "integer of at least 1"),
        (2.5, "integer of at least 1"),
        (True, "integer of at least 1"),
    ],
)
def test_bad_batch_sizes(batch_size, said):
    with pytest.raises(OptionError, match=said):
        vi.fit(vi.Model(two_plates, torch.randn(6), torch.randn(11)), batch_size=batch_size, seed=0)


def test_a_model_without_a_data_plate():
    def flat(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mean, 1.0).expand(y.shape).to_event(1), obs=y)

    with pytest.raises(OptionError, match=r"needs a data plate.*pyro\.plate\('row'"):
        vi.fit(vi.Model(flat, torch.ones(5)), batch_size=2, seed=0)


# -- what cannot be subsampled ----------------------------------------------------------------


def not_indexed(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("row", 6):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def wrongly_indexed(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("row", 6) as i:
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y[: len(i)])


def mixed(y):
    with pyro.plate("row", len(y)) as i:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z - z.mean(), 1.0), obs=y[i])


@pytest.mark.parametrize("model", [not_indexed, wrongly_indexed, mixed])
def test_a_site_that_does_not_follow_the_indices_is_named(model):
    density = Density(vi.Model(model, torch.arange(6.0)))
    with pytest.raises(ModelError, match="site 'y' does not follow the plate's indices"):
        require_subsamplable(density, {density.structure.plates["row"]: 3})


def test_an_inner_plate_is_no_data_plate():
    def nested(y):
        with pyro.plate("group", 3, dim=-2) as i:
            mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
            with pyro.plate("member", 4, dim=-1) as j:
                pyro.sample("y", dist.Normal(mean, 1.0), obs=y[i][:, j])

    with pytest.raises(ModelError, match=r"'member' lies inside plate 'group'.*'group': \.\.\."):
        vi.fit(vi.Model(nested, torch.randn(3, 4)), batch_size={"member": 2}, seed=0)


def test_a_built_guide_that_holds_all_rows_is_refused():
    model = local_and_global_model()
    guide = guides.make("mean_field", model, dtype=torch.float64)
    with pytest.raises(OptionError, match=r"latent 'z' for all rows at once: name the guide"):
        vi.fit(model, guide, batch_size=2, seed=0)


def test_an_optimiser_of_the_users_does_not_move_tables():
    with pytest.raises(OptionError, match="optimizer= moves all rows"):
        vi.fit(
            local_and_global_model(), "mean_field", batch_size=2, optimizer=torch.optim.SGD, seed=0
        )


def test_new_rows_need_an_encoder():
    posterior = vi.fit(local_and_global_model(), "mean_field", batch_size=2, steps=5, seed=0)
    with pytest.raises(OptionError, match="guide='amortized'"):
        posterior.infer(torch.randn(3))


def test_a_posterior_of_minibatches_is_saved_and_resumed(tmp_path):
    model = local_and_global_model()
    first = vi.fit(model, "full_rank", batch_size=2, steps=50, seed=0)
    path = first.save(tmp_path / "rows.nc", draws=5)
    loaded = vi.load(path, model)
    assert np.array_equal(loaded.sample(4, seed=1)["z"], first.sample(4, seed=1)["z"])
    again = vi.fit(model, resume=path, steps=50)
    assert again.record.batch_size == 2
    assert len(again.losses) == 100


def test_a_float32_model_can_be_subsampled():
    model = vi.Model(indexed, *(t.float() for t in data()))
    posterior = vi.fit(model, "mean_field", batch_size=12, steps=20, dtype=torch.float32, seed=0)
    assert np.isfinite(posterior.losses).all()


def test_full_data_models_are_as_before():
    posterior = vi.fit(two_scales_model(), "mean_field", seed=0)
    assert posterior.method == "lbfgs"


def test_a_start_that_failed_is_told_of(monkeypatch):
    def failing(search, start):
        raise ModelError("not finite anywhere")

    monkeypatch.setattr("pyro_vi_kit.optimize.deterministic.fixed_draws.prefit", failing)
    posterior = vi.fit(local_model(), "mean_field", seed=0, batch_size=2, steps=2)
    notes = [note for note in posterior.status.notes if "No start from a Gaussian" in note]
    assert notes == [
        "No start from a Gaussian fitted to some rows: ModelError: not finite anywhere"
    ]
