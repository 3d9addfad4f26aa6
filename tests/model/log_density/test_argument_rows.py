"""Plates without a size, and plates of which the arguments hold a minibatch."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from hand import assert_agrees, density_of, normal
from pyro import poutine

import pyro_vi_kit as vi
from pyro_vi_kit.core.errors import ModelError, ModelWarning, OptionError
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.model.log_density.subsampling import require_subsamplable

X = torch.randn(20, generator=torch.Generator().manual_seed(0))
Y = X + torch.randn(20, generator=torch.Generator().manual_seed(1))


def slope(x, y, plate):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with plate(x):
        pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)


def sizeless(x):
    return pyro.plate("datum")


def as_long_as_it_is_given(x):
    return pyro.plate("datum", len(x))


def of_a_hundred(x):
    return pyro.plate("datum", 100, len(x))


def exact(times=1.0):
    """Mean and sd of w where each row counts so many times."""
    x, y = X.double(), Y.double()
    precision = 1 + times * x.square().sum()
    return float(times * (x * y).sum() / precision), float(precision**-0.5)


# -- plates without a size ----------------------------------------------------------------------


def two_levels(x, discrete=False):
    """Rows of pixels, z_i ~ N(0, 1) or a third more, x_ij ~ N(z_i + k_i, 1)."""
    with pyro.plate("row", dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0))
        k = pyro.sample("k", dist.Bernoulli(torch.full((len(x), 1), 0.3))) if discrete else 0.0
        with pyro.plate("pixel", x.shape[1], dim=-1):
            pyro.sample("x", dist.Normal(z + k, 1.0), obs=x)


def test_its_size_follows_from_its_sites():
    x = torch.randn(5, 3)
    density = density_of(two_levels, x)
    sites = density.structure.sites
    assert {p.name: (p.dim, p.size) for p in sites["x"].plates} == {
        "row": (-2, 5),
        "pixel": (-1, 3),
    }
    assert [p.name for p in sites["z"].plates] == ["row"]

    def by_hand(z):
        return normal(z).sum() + normal(x.double(), z[:, None]).sum()

    assert_agrees(density, by_hand, 5)
    assert (
        density.terms(density.block.unpack(torch.zeros(1, 5).double())).local["row"].shape[1] == 5
    )


def test_discrete_sites_in_it_are_summed_out_row_by_row():
    x = torch.randn(5, 3)

    def by_hand(z):
        parts = [
            torch.tensor(p, dtype=torch.float64).log() + normal(x.double(), z[:, None] + k).sum(-1)
            for k, p in ((0.0, 0.7), (1.0, 0.3))
        ]
        return normal(z).sum() + torch.stack(parts).logsumexp(0).sum()

    assert_agrees(density_of(two_levels, x, discrete=True), by_hand, 5)


def test_a_site_of_one_value_is_shared_by_its_rows():
    """Pyro broadcasts nothing to a plate of unknown size: there is one z, counted once."""

    def model(y):
        with pyro.plate("datum"):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def by_hand(z):
        return normal(z).sum() + normal(Y.double(), z).sum()

    assert_agrees(density_of(model, Y), by_hand, 1)


def test_two_lengths_are_refused():
    def model(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("datum"):
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)
            pyro.sample("y", dist.Normal(w, 1.0), obs=y)

    with pytest.raises(ModelError, match=r"plate 'datum' .* 20 and 7 rows \(site 'y'\)"):
        Density(vi.Model(model, X, Y[:7]))


def local(y):
    """m ~ N(0, 1), z_i ~ N(m, 1), y_i ~ N(z_i, 1), without a size."""
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("datum"):
        z = pyro.sample("z", dist.Normal(m, torch.ones(len(y))))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


# y ~ N(0, 2 I + 1 1'): the evidence, and the mean of m, sum(y) / (n + 2).
EVIDENCE = float(
    dist.MultivariateNormal(
        torch.zeros(20).double(), 2 * torch.eye(20).double() + torch.ones(20, 20).double()
    ).log_prob(Y.double())
)


@pytest.mark.parametrize("batch_size", [None, 5])
@pytest.mark.parametrize("guide", ["mean_field", "amortized"])
def test_guides_with_latents_in_it(guide, batch_size):
    posterior = vi.fit(
        vi.Model(local, Y),
        guide=guide,
        batch_size=batch_size,
        steps=600,
        seed=0,
        dtype=torch.float64,
    )
    # Mean field cannot hold the correlation of m with the rows: its gap is 1.4 nats here (fitted by
    # L-BFGS), of which a short stochastic fit is allowed to miss 1.
    assert EVIDENCE - 2.5 < posterior.elbo < EVIDENCE + 4 * posterior.elbo_se
    assert posterior.sample(10, seed=0)["z"].shape == (10, 20)
    assert posterior.to_arviz().posterior["z"].dims == ("chain", "draw", "datum")


def test_the_pyro_engine_runs_it():
    posterior = vi.fit(vi.Model(local, Y), guide="mean_field", engine="pyro", steps=20, seed=0)
    assert posterior.elbo < EVIDENCE


# -- minibatches without indices ----------------------------------------------------------------


@pytest.mark.parametrize("plate", [sizeless, as_long_as_it_is_given])
def test_minibatches_are_rows_of_the_arguments(plate):
    posterior = vi.fit(
        vi.Model(slope, X, Y, plate), guide="full_rank", batch_size=5, steps=2000, seed=0
    )
    mean, sd = exact()
    draws = posterior.sample(4000, seed=0)["w"]
    # Tolerances of a stochastic fit: a tenth of a posterior sd.
    assert abs(draws.mean() - mean) < 0.1 * sd
    assert abs(draws.std() - sd) < 0.1 * sd


@pytest.mark.parametrize("plate", [sizeless, as_long_as_it_is_given])
def test_their_terms_average_to_those_of_all_rows(plate):
    density = density_of(slope, X, Y, plate)
    datum = density.structure.plates["datum"]
    require_subsamplable(density, {datum: 5})
    z = density.block.unpack(torch.tensor([[0.4], [-1.0]]).double())
    parts = [density.terms(z, index={"datum": rows}).total() for rows in torch.arange(20).split(5)]
    torch.testing.assert_close(torch.stack(parts).mean(0), density.terms(z).total())
    some = density.subset({"datum": torch.arange(5)})
    torch.testing.assert_close(some.terms(z).total(), parts[0])


def test_indices_are_taken_where_the_model_reads_them():
    def indexed(y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("datum", len(y)) as i:
            pyro.sample("y", dist.Normal(w, 1.0), obs=y[i])

    density = density_of(indexed, Y)
    require_subsamplable(density, {density.structure.plates["datum"]: 5})
    assert not density.sliced


def fixed_size(x, y):
    return slope(x, y, lambda x: pyro.plate("datum", 20))


def rows_depend(y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("datum", len(y)):
        pyro.sample("y", dist.Normal(w + y.mean(), 1.0), obs=y)


@pytest.mark.parametrize("model", [vi.Model(fixed_size, X, Y), vi.Model(rows_depend, Y)])
def test_what_rows_of_the_arguments_would_change_is_refused(model):
    with pytest.raises(ModelError, match="minibatches of plate 'datum' cannot be taken"):
        vi.fit(model, guide="mean_field", batch_size=5, seed=0)


def test_the_pyro_engine_needs_indices():
    with pytest.raises(OptionError, match="engine='pyro' tells the model which rows"):
        vi.fit(
            vi.Model(slope, X, Y, sizeless), guide="mean_field", batch_size=5, engine="pyro", seed=0
        )


# -- arguments that are a minibatch -------------------------------------------------------------


def test_a_minibatch_counts_for_all_rows_as_in_pyro():
    with pytest.warns(ModelWarning, match="20 of the 100 rows of plate 'datum'"):
        density = density_of(slope, X, Y, of_a_hundred)
    for w in (0.3, -1.2):
        held = poutine.condition(slope, data={"w": torch.tensor(w).double()})
        trace = poutine.trace(held).get_trace(X.double(), Y.double(), of_a_hundred)
        found = density.log_prob(torch.tensor([[w]]).double())[0]
        torch.testing.assert_close(found, trace.log_prob_sum())


def test_a_fit_and_nuts_of_a_minibatch():
    model = vi.Model(slope, X, Y, of_a_hundred)
    mean, sd = exact(5.0)
    with pytest.warns(ModelWarning, match="count 5 times each"):
        draws = vi.fit(model, guide="full_rank", seed=0).sample(4000, seed=0)["w"]
    # 4,000 draws, and 200 effective ones: four standard errors.
    assert abs(draws.mean() - mean) < 4 * sd / 4000**0.5
    with pytest.warns(ModelWarning):
        chains = vi.nuts(model, chains=2, draws=500, seed=0).posterior
    assert abs(float(chains.w.mean()) - mean) < 4 * sd / 200**0.5


def test_a_guide_of_the_users_on_a_minibatch():
    """Pyro's svi_torch example: what is reported is of the same rows, each counted five times."""
    locs = []

    def guide(x, y, plate):
        locs.append(pyro.param("loc", torch.tensor(0.5)))
        pyro.sample("w", dist.Normal(locs[-1], 0.3))

    with pytest.warns(ModelWarning, match="count 5 times each"):
        posterior = vi.fit(vi.Model(slope, X, Y, of_a_hundred), guide, steps=1, seed=0)
    with pytest.warns(ModelWarning):
        density = density_of(slope, X, Y, of_a_hundred)
    w = torch.as_tensor(posterior.sample(64, seed=0)["w"]).double()
    log_q = dist.Normal(locs[-1].item(), 0.3).log_prob(w)
    expected = density.log_prob(w[:, None]) - log_q
    found = torch.as_tensor(posterior.log_weights(64, seed=0))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # draws in float32


def test_data_alone_tell_that_they_are_a_minibatch():
    """The distribution broadcasts to the whole plate; only what is observed is shorter."""

    def model(y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("datum", 100, len(y)):
            pyro.sample("y", dist.Normal(w, 1.0), obs=y)

    with pytest.warns(ModelWarning, match="20 of the 100"):
        density = density_of(model, Y)

    def by_hand(z):
        return normal(z).sum() + 5 * normal(Y.double(), z).sum()

    assert_agrees(density, by_hand, 1)


def test_minibatches_of_a_minibatch():
    with pytest.warns(ModelWarning):
        posterior = vi.fit(
            vi.Model(slope, X, Y, of_a_hundred), guide="full_rank", batch_size=5, steps=2000, seed=0
        )
    mean, sd = exact(5.0)
    assert abs(posterior.sample(4000, seed=0)["w"].mean() - mean) < 0.1 * sd


def test_a_subsample_that_the_model_indexes_is_none():
    def model(y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("datum", 20, 5) as i:
            pyro.sample("y", dist.Normal(w, 1.0), obs=y[i])

    density = density_of(model, Y)
    assert not density.notes

    def by_hand(z):
        return normal(z).sum() + normal(Y.double(), z).sum()

    assert_agrees(density, by_hand, 1)


def latent_rows(y):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("datum", 100, len(y)):
        z = pyro.sample("z", dist.Normal(m, torch.ones(len(y))))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def test_latents_of_some_rows_are_refused_with_the_remedies():
    with pytest.raises(ModelError, match=r"latent 'z' .* of whose 100 rows the arguments hold 20"):
        vi.fit(vi.Model(latent_rows, Y), seed=0)
    assert not vi.check(vi.Model(latent_rows, Y), verbose=False).ok


def test_the_remedies_for_latents_of_some_rows():
    rows = torch.utils.data.TensorDataset(torch.cat([Y] * 5))
    posterior = vi.fit(vi.Model(latent_rows, rows), guide="amortized", steps=50, seed=0)
    assert posterior.elbo < 0
    assert vi.fit(vi.Model(local, Y), guide="mean_field", seed=0).elbo < EVIDENCE
