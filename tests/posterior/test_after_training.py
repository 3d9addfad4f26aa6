"""What a trained guide says datum by datum, against factor analysis in closed form.

z_i ~ N(0, I), x_i ~ N(W z_i + mu, diag(psi)): p(x_i) is N(mu, W W' + diag(psi)).
"""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from toys import gaussian, local_model

import pyro_vi_kit as vi
from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.core.runtime import RandomStream
from pyro_vi_kit.guides import Amortized, held_at_mean
from pyro_vi_kit.model import groups
from pyro_vi_kit.objectives import Iwae, evaluate

pytestmark = pytest.mark.usefixtures("float64")
N, P, D = 60, 4, 2


def factors(x, W, mu, psi):
    with pyro.plate("person", len(x)) as index:
        z = pyro.sample("z", dist.Normal(torch.zeros(W.shape[1]), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ W.T + mu, psi.sqrt()).to_event(1), obs=x[index])


def factor_model(rows=N, seed=0):
    generator = torch.Generator().manual_seed(0)
    W, mu, psi = (torch.randn(s, generator=generator).double() for s in ((P, D), (P,), (P,)))
    psi = 0.4 + psi.sigmoid()
    generator.manual_seed(seed)
    noise = torch.randn(rows, P, generator=generator).double()
    x = torch.randn(rows, D, generator=generator).double() @ W.T + mu + psi.sqrt() * noise
    names = [f"p{i}" for i in range(rows)]
    return vi.Model(factors, x, W, mu, psi, coords={"person": names})


def evidence(model):
    """log p(x_i), `[N]`."""
    x, W, mu, psi = model.args
    return dist.MultivariateNormal(mu, W @ W.T + psi.diag()).log_prob(x).numpy()


@pytest.fixture(scope="module")
def trained():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    model = factor_model()
    fitted = vi.fit(model, Amortized(local="full_rank"), batch_size=20, seed=0, tol=0.1)
    torch.set_default_dtype(before)
    return fitted


@pytest.fixture(scope="module")
def narrow():
    """One hidden unit and 100 steps: a bad encoder of a family that holds the posterior."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    spec = Amortized(local="full_rank", hidden=(1,))
    fitted = vi.fit(factor_model(), spec, batch_size=20, seed=0, steps=100)
    torch.set_default_dtype(before)
    return fitted


# -- factor analysis --------------------------------------------------------------------------


def test_a_linear_posterior_is_amortized_to_a_hundredth_of_a_nat(trained):
    frame = trained.amortization_gap(draws=400)
    exact = evidence(trained.model)
    # The family holds the posterior: all that is lost is the encoder's. The mean log weight of 60 x 400
    # draws has its own s.e. beside it.
    gap = float((exact - frame["elbo"]).mean())
    assert gap < 0.01
    assert frame["amortization"].mean() <= gap + 4 * frame.attrs["amortization_se"] + 1e-3
    assert "60 rows: amortization gap" in frame.attrs["summary"]


def test_the_importance_weighted_bound_of_100_draws_is_the_evidence(trained):
    guide, exact = trained.approximation.guide, evidence(trained.model)
    with RandomStream(1), torch.no_grad():
        rows = [Iwae(100).bound(guide.log_weights(100).local["person"]) for _ in range(20)]
    error = torch.stack(rows).mean(1) - exact.mean()
    se = float(error.std()) / math.sqrt(len(rows))
    assert abs(float(error.mean())) < 0.01 + 4 * se


@pytest.mark.parametrize("local", ["mean_field", "full_rank"])
def test_gradients_of_the_bound_per_datum_are_those_of_a_loop(local):
    model = factor_model(7)
    guide = vi.guides.make(Amortized(local=local, hidden=(3,)), model)
    with RandomStream(0):
        draw = guide.draw(5)
        z = draw.z["z"].detach()
    parameters = list(guide.parameters())
    bound = evaluate(Iwae(5), guide.weigh(draw))
    found = torch.autograd.grad(bound, parameters)
    x, W, mu, psi = model.args
    numbers = guide.families["local"].source(x)
    total = torch.zeros(())
    for i in range(7):
        loc, log_sd = numbers[i, :D], numbers[i, D : 2 * D]
        tril = log_sd.exp().diag()
        if local == "full_rank":
            tril = tril + torch.stack(
                [torch.zeros(D), torch.stack([numbers[i, 2 * D], torch.zeros(())])]
            )
        terms = []
        for k in range(5):
            noise = torch.linalg.solve_triangular(tril, (z[k, i] - loc)[:, None], upper=False)
            value = loc + (tril @ noise.detach())[:, 0]
            log_p = dist.Normal(0.0, 1.0).log_prob(value).sum()
            log_p = log_p + dist.Normal(W @ value + mu, psi.sqrt()).log_prob(x[i]).sum()
            q = dist.MultivariateNormal(loc, scale_tril=tril)
            terms.append(log_p - q.log_prob(value))
        total = total + torch.stack(terms).logsumexp(0) - math.log(5)
    expected = torch.autograd.grad(total, parameters)
    torch.testing.assert_close(bound, total, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_evidence_per_datum(narrow):
    frame = narrow.per_datum(draws=2000)
    exact = evidence(narrow.model)
    assert list(frame.index) == list(narrow.model.coords["person"])
    assert frame.index.name == "person"
    # Wide enough at first for its weights to have a variance: four s.e. of 2,000 draws, 60 rows.
    usable = frame["khat"] < 0.5
    assert usable.mean() > 0.8
    error = (frame["log_evidence"] - exact) / frame["log_evidence_se"]
    assert error[usable].abs().max() < 4
    assert frame["elbo"].sum() < exact.sum()
    assert ((frame["ess"] > 0) & (frame["ess"] <= 1)).all()
    joint, se = narrow.elbo, narrow.elbo_se
    assert abs(frame.attrs["elbo"] - joint) < 4 * math.hypot(se, frame.attrs["elbo_se"])


def test_per_datum_is_the_naive_mean_of_log_weights(trained):
    """However the rows are cut into pieces."""
    frame = trained.per_datum(draws=30, seed=3)
    with RandomStream(3, "rows"), torch.no_grad():
        log_w = trained.approximation.guide.log_weights(30).local["person"].numpy()
    np.testing.assert_allclose(frame["elbo"], log_w.mean(0), rtol=1e-12)
    expected = np.logaddexp.reduce(log_w, 0) - math.log(30)
    np.testing.assert_allclose(frame["log_evidence"], expected, rtol=1e-12)


def test_pieces_of_rows_and_of_draws(trained, monkeypatch):
    """Twenty numbers at a time: one row of three draws. Other noise, the same law."""
    whole = trained.per_datum(draws=300)
    monkeypatch.setattr(groups, "_CHUNK_NUMBERS", 2000)
    cut = trained.per_datum(draws=300)
    assert not np.array_equal(whole["elbo"], cut["elbo"])
    se = np.hypot(whole["log_evidence_se"], cut["log_evidence_se"])
    assert (np.abs(whole["log_evidence"] - cut["log_evidence"]) < 4.5 * se).all()
    monkeypatch.setattr(groups, "_CHUNK_NUMBERS", 20)
    assert len(trained.per_datum(draws=7)) == N


# -- refinement -------------------------------------------------------------------------------


def test_refinement_closes_the_gap_of_a_narrow_encoder(narrow):
    exact = evidence(narrow.model)
    frame = narrow.amortization_gap(draws=400)
    assert (exact - frame["elbo"]).mean() > 0.3
    # The family holds the posterior, so that weights are nearly even: no s.e. to speak of.
    left = (exact - frame["elbo_refined"]).mean()
    assert -1e-3 < left < 2e-3
    np.testing.assert_allclose(
        frame["amortization"] + frame["approximation"],
        frame["log_evidence"] - frame["elbo"],
        atol=1e-10,
    )
    error = (frame["log_evidence"] - exact) / np.maximum(frame["log_evidence_se"], 1e-6)
    assert error.abs().max() < 4.5  # 60 rows


@pytest.mark.parametrize("batch_size", [None, 15])
def test_refined_rows_are_the_posteriors(narrow, batch_size):
    refined = narrow.refine(seed=0, batch_size=batch_size)
    assert refined.record.refined
    assert refined.status.converged
    assert refined.record.batch_size == (None if batch_size is None else {"person": 15})
    assert evidence(narrow.model).sum() - refined.elbo < 0.01 * N
    x, W, mu, psi = narrow.model.args
    covariance = torch.linalg.inv(torch.eye(D) + W.T @ (W / psi[:, None]))
    mean = (x - mu) @ (W / psi[:, None]) @ covariance
    guide = refined.approximation.guide
    with torch.no_grad():
        q = guide.families["local"](guide.rows(guide.blocks[0]))
    # A KL of 0.01 nats moves a mean by 0.14 sd at most; the average row is far closer.
    sd = covariance.diagonal().sqrt()
    assert float(((q.mean - mean) / sd).abs().mean()) < 0.05
    assert float((q.stddev / sd - 1).abs().mean()) < 0.05


def test_refinement_moves_the_tables_alone():
    model = learned_model()
    fitted = vi.fit(model, Amortized(local="affine_coupling"), batch_size=10, seed=0, steps=40)
    before = {n: v.clone() for n, v in fitted.approximation.guide.named_parameters()}
    refined = fitted.refine(steps=60, seed=1)
    after = dict(refined.approximation.guide.named_parameters())
    assert all(
        torch.equal(before[n], v) for n, v in after.items() if n in before and "source" not in n
    )
    assert any("head.layers" in name for name in after)
    assert refined.parameters.keys() == fitted.parameters.keys() == {"shift"}
    assert np.array_equal(refined.parameters["shift"], fitted.parameters["shift"])
    assert all(torch.equal(before[n], v) for n, v in fitted.approximation.guide.named_parameters())
    gain = refined.per_datum(draws=200).attrs["elbo"] - fitted.per_datum(draws=200).attrs["elbo"]
    assert gain > 0


def learned(y):
    shift = pyro.param("shift", torch.tensor(0.3))
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("datum", len(y)) as index:
        z = pyro.sample("z", dist.Normal(m, 1.0).expand([2]).to_event(1))
        pyro.sample("y", dist.Normal(z.exp().sum(-1) + shift, 0.5), obs=y[index])


def learned_model(n=20):
    y = 2.0 + torch.randn(n, generator=torch.Generator().manual_seed(1)).double()
    return vi.Model(learned, y)


def test_new_data_are_refined_saved_and_loaded(trained, tmp_path):
    new = factor_model(9, seed=5)
    refined = trained.refine(*new.args, seed=0)
    assert refined.sample(3, seed=0)["z"].shape == (3, 9, D)
    path = refined.save(tmp_path / "refined.nc", draws=20)
    loaded = vi.load(path, new)
    assert loaded.record.refined
    assert np.array_equal(loaded.sample(4, seed=0)["z"], refined.sample(4, seed=0)["z"])
    again = loaded.refine(steps=20, seed=0)
    assert again.elbo >= refined.elbo - 4 * math.hypot(again.elbo_se, refined.elbo_se) - 0.01
    with pytest.raises(OptionError, match="has no encoder to infer new data with"):
        loaded.infer(*factor_model(9, seed=6).args)
    with pytest.raises(OptionError, match="numbers of its own already"):
        loaded.amortization_gap()


def test_the_same_seed_refines_to_the_same_numbers(narrow):
    first, second = (narrow.refine(steps=30, seed=4) for _ in range(2))
    for a, b in zip(
        first.approximation.guide.parameters(),
        second.approximation.guide.parameters(),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_a_fit_with_tables_has_values_per_datum_and_can_be_refined():
    model = local_model(n=12)
    fitted = vi.fit(model, "mean_field", batch_size=6, seed=0)
    frame = fitted.per_datum(draws=500)
    y = model.args[0][:, 0].numpy()
    exact = -0.25 * y**2 - 0.5 * math.log(4 * math.pi)
    error = np.abs(frame["log_evidence"] - exact) / np.maximum(frame["log_evidence_se"], 1e-9)
    assert error.max() < 4.5
    assert fitted.refine(seed=0).elbo > exact.sum() - 0.05


# -- with globals -----------------------------------------------------------------------------


def local_and_global(y):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("datum", len(y)) as index:
        z = pyro.sample("z", dist.Normal(m, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])


@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("globals_", ["full_rank", "affine_coupling"])
def test_globals_are_held_at_their_mean(globals_, conditioned):
    y = 0.5 + 1.4 * torch.randn(8, generator=torch.Generator().manual_seed(0)).double()
    spec = Amortized(globals=globals_, conditioned=conditioned)
    fitted = vi.fit(vi.Model(local_and_global, y), spec, seed=0, steps=200)
    frame = fitted.per_datum(draws=2000)
    assert frame.attrs["globals"] == "held at the mean of q"
    held = held_at_mean(fitted.approximation.guide)
    m = held.families["global"].loc
    drawn = fitted.sample(4000, seed=1)["m"]
    assert abs(float(m) - drawn.mean()) < 5 * drawn.std() * math.sqrt(1 / 4000 + 1 / 10_000)
    exact = dist.Normal(m, math.sqrt(2.0)).log_prob(y).detach().numpy()
    error = np.abs(frame["log_evidence"] - exact) / frame["log_evidence_se"]
    # Eight rows of 2,000 draws.
    assert error.max() < 4.5
    gap = fitted.amortization_gap(draws=200)
    assert (gap["amortization"] > -4 * gap["amortization_se"] - 1e-2).all()
    assert (exact - gap["elbo_refined"]).mean() < 0.01


def two_plates(y, x):
    with pyro.plate("a", len(y)) as i:
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(u, 1.0), obs=y[i])
    with pyro.plate("b", len(x)) as j:
        v = pyro.sample("v", dist.Normal(0.0, 2.0))
        pyro.sample("x", dist.Normal(v, 1.0), obs=x[j])


def test_two_plates_are_seen_one_at_a_time():
    y, x = torch.tensor([0.1, -1.0, 2.0]), torch.tensor([3.0, -1.0])
    fitted = vi.fit(vi.Model(two_plates, y, x), "amortized", seed=0, steps=300)
    with pytest.raises(OptionError, match=r"several plates: plate= one of a, b"):
        fitted.per_datum()
    with pytest.raises(OptionError, match=r"no plate 'c' with local latents; there are a, b"):
        fitted.per_datum(plate="c")
    for plate, data, sd in (("a", y, math.sqrt(2)), ("b", x, math.sqrt(5))):
        frame = fitted.per_datum(plate=plate, draws=3000)
        exact = dist.Normal(0.0, sd).log_prob(data).numpy()
        error = np.abs(frame["log_evidence"] - exact) / frame["log_evidence_se"]
        assert error.max() < 4.5
    assert fitted.infer(y[:2], x).sample(3, seed=0)["u"].shape == (3, 2)
    assert fitted.refine(seed=0).elbo > fitted.elbo - 0.1


def nested(y):
    with pyro.plate("group", y.shape[1], dim=-1) as g:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("member", y.shape[0], dim=-2):
            z = pyro.sample("z", dist.Normal(m, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[:, g])


def test_the_evidence_of_a_row_with_a_plate_inside():
    """y_g of three members: covariance 2 I + 1 1'."""
    y = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)).double()
    fitted = vi.fit(vi.Model(nested, y), Amortized(local="full_rank"), seed=0, steps=1500)
    frame = fitted.per_datum(draws=2000)
    law = dist.MultivariateNormal(torch.zeros(3), 2 * torch.eye(3) + torch.ones(3, 3))
    error = np.abs(frame["log_evidence"] - law.log_prob(y.T).numpy()) / frame["log_evidence_se"]
    assert error.max() < 4.5
    assert fitted.infer(y[:, :4]).sample(2, seed=0)["z"].shape == (2, 3, 4)


# -- the verdict ------------------------------------------------------------------------------


@pytest.mark.slow
def test_many_good_rows_are_good(trained):
    """Rows that lose a thousandth of a nat each; jointly, of 3,000 the weights are uneven."""
    many = trained.infer(*factor_model(3000, seed=2).args)
    assert many.khat > 0.7
    assert many.verdict.level == "good"
    assert "k-hat of 500 of 3,000 rows" in many.verdict.reasons[0]


@pytest.mark.slow
def test_bad_rows_are_said(narrow):
    many = narrow.infer(*factor_model(600, seed=2).args)
    assert many.verdict.level == "reject"
    assert "k-hat of 500 of 600 rows: median" in many.verdict.reasons[0]
    assert "posterior.refine()" in many.verdict.advice
    assert many.refine(seed=0).verdict.level == "good"


# -- refusals ---------------------------------------------------------------------------------


def test_rows_that_share_an_observation_have_no_evidence_of_their_own():
    def sums(y, total):
        with pyro.plate("datum", len(y)) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])
        pyro.sample("total", dist.Normal(z.sum(), 1.0), obs=total)

    def chained(y, total):
        with pyro.plate("datum", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z + z.roll(1, -1), 1.0), obs=y)

    for model in (sums, chained):
        data = torch.tensor([0.3, -0.2, 1.0]), torch.tensor(1.0)
        fitted = vi.fit(vi.Model(model, *data), "amortized", seed=0, steps=20)
        with pytest.raises(OptionError, match="no evidence of their own"):
            fitted.per_datum()
        assert fitted.verdict is not None


def test_what_has_no_rows_is_refused():
    fitted = vi.fit(gaussian(2)[0], "mean_field", seed=0)
    for call in (fitted.per_datum, fitted.refine, fitted.amortization_gap):
        with pytest.raises(OptionError, match="has no distribution for each datum"):
            call()
    with pytest.raises(OptionError, match="has no encoder to infer new data"):
        fitted.infer(*fitted.model.args)

    def by_hand(mean, covariance):
        pyro.sample("z", dist.Normal(mean, 1.0).to_event(1))

    literal = vi.fit(gaussian(2)[0], by_hand, seed=0, steps=3)
    for call in (literal.per_datum, literal.refine, literal.amortization_gap):
        with pytest.raises(OptionError, match="is a Pyro guide, whose parts"):
            call()


def test_a_point_has_no_weights():
    fitted = vi.fit(local_model(n=6), "delta", batch_size=3, seed=0, steps=20)
    with pytest.raises(OptionError, match="point estimate"):
        fitted.per_datum()
    assert fitted.refine(steps=5, seed=0).approximation.point


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps= must be an integer of at least 1, got 0"),
        ({"batch_size": 2.5}, "batch_size= must be an integer of at least 1"),
        ({"tol": 0}, "tol= must be a positive number"),
    ],
)
def test_options_of_a_refinement(trained, options, message):
    with pytest.raises(OptionError, match=message):
        trained.refine(**options)
    with pytest.raises(OptionError, match="draws= must be an integer of at least 1"):
        trained.per_datum(draws=0)
