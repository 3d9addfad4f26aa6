"""Coordinate ascent: fixed points in closed form, agreement with other methods, and refusals."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from conjugate import exact
from toys import load, two_scales_model

import pyro_vi_kit as vi
from pyro_vi_kit.core.errors import ModelError, OptionError

pytestmark = pytest.mark.usefixtures("float64")

SUPPORT = vi.guides.MeanField(families="support")
Y = torch.tensor([1.0, 2.0, 0.5, 3.0, -1.0, 0.2], dtype=torch.float64)


def factors(posterior):
    from pyro_vi_kit.guides.gaussian.factors import Factors

    return Factors(posterior.approximation.guide).read()


# -- known noise ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def regression():
    return load("linear_regression")


@pytest.fixture(scope="module")
def swept(regression):
    return vi.fit(regression.MODEL, "mean_field", method="cavi", tol=1e-8, seed=0)


@pytest.fixture
def rough(regression):
    return vi.fit(regression.MODEL, "mean_field", method="cavi", seed=0)


def test_linear_regression_agrees_with_lbfgs_and_the_exact_posterior(regression):
    """Means are exact, sds are 1 / sqrt(precision_ii), whichever way they are found."""
    model = regression.MODEL
    mean, covariance, log_evidence = exact(*model.args, regression.PRIOR_SD, regression.NOISE_SD)
    sd = torch.linalg.inv(covariance).diagonal().rsqrt()
    # Sweeps end by what draws say is left, which some seeds' draws say too soon of the last 1e-5 nats.
    swept = vi.fit(model, "mean_field", method="cavi", tol=1e-8, seed=1)
    searched = vi.fit(model, "mean_field", seed=0)
    assert (swept.method, searched.method) == ("cavi", "lbfgs")
    assert swept.status.converged
    for posterior in (swept, searched):
        found = factors(posterior)["beta"]
        # What is left of 1e-8 nats is 1.4e-4 sds, of 0.05, in the worst direction.
        torch.testing.assert_close(found.mean, mean, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.stddev, sd)
    # KL(q || p) of two Gaussians with one mean, whose precisions have the same diagonal.
    kl = 0.5 * torch.logdet(covariance) - sd.log().sum()
    assert abs(swept.elbo - (log_evidence - float(kl))) < 4 * swept.elbo_se
    assert swept.elbo == pytest.approx(searched.elbo, abs=1e-6)


def test_losses_fall_and_the_rest_of_the_way_is_told(swept, rough):
    assert (rough.losses[1:] <= rough.losses[:-1]).all()
    assert rough.status.gap < 0.01
    # The geometric series of the sweeps ends where it says, on the same draws.
    left = rough.losses[-1] - swept.losses[-1]
    assert left == pytest.approx(rough.status.gap, rel=0.5)


def test_it_goes_on_from_an_earlier_fit(regression, swept, rough):
    again = vi.fit(regression.MODEL, resume=rough, method="cavi", tol=1e-8, seed=0)
    assert again.status.converged
    assert again.losses[-1] == pytest.approx(swept.losses[-1], abs=1e-6)


def test_other_data_keep_the_updates(regression):
    model = regression.MODEL
    X, y = model.args
    other = model.with_args(X[:60], y[:60])
    posterior = vi.fit(other, "mean_field", method="cavi", tol=1e-6, seed=0)
    mean, _, _ = exact(X[:60], y[:60], regression.PRIOR_SD, regression.NOISE_SD)
    torch.testing.assert_close(factors(posterior)["beta"].mean, mean, rtol=0, atol=5e-4)


# -- unknown noise ----------------------------------------------------------------------------


def unknown_noise(y):
    tau = pyro.sample("tau", dist.Gamma(2.0, 1.0))
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mu, tau.rsqrt()), obs=y)


def update_mu(q, y):
    precision = 1 / 9 + len(y) * q["tau"].mean
    return dist.Normal(q["tau"].mean * y.sum() / precision, precision.rsqrt())


def update_tau(q, y):
    squares = ((y - q["mu"].mean) ** 2 + q["mu"].variance).sum()
    return dist.Gamma(2 + len(y) / 2, 1 + 0.5 * squares)


UPDATES = {"mu": update_mu, "tau": update_tau}


def test_an_unknown_precision_has_a_gamma_factor():
    """Bishop 2006, section 10.1.3: the fixed point solves both updates, and Adam finds the same."""
    model = vi.Model(unknown_noise, Y, updates=UPDATES)
    swept = vi.fit(model, SUPPORT, method="cavi", tol=1e-10, seed=0)
    q = factors(swept)
    for name, update in UPDATES.items():
        again = update(q, Y)
        torch.testing.assert_close(again.mean, q[name].mean, rtol=1e-6, atol=0)
        torch.testing.assert_close(again.variance, q[name].variance, rtol=1e-6, atol=0)
    stepped = vi.fit(model, SUPPORT, seed=0)
    assert (swept.method, stepped.method) == ("cavi", "stochastic")
    # What the tolerance of stochastic steps lets them miss, 0.01 nats.
    assert swept.elbo == pytest.approx(stepped.elbo, abs=0.01)
    other = factors(stepped)
    assert float((other["mu"].mean - q["mu"].mean).abs() / q["mu"].stddev) < 0.15
    assert float(other["tau"].mean / q["tau"].mean) == pytest.approx(1.0, abs=0.1)


def test_simplexes_chances_and_angles():
    """Independent conjugate pairs: one sweep is exact, log weights are even."""
    counts = torch.tensor([[5.0, 3.0, 2.0], [0.0, 1.0, 9.0]])
    angles = torch.tensor([3.0, -3.0, 2.5])

    def model(counts, angles):
        with pyro.plate("row", 2):
            p = pyro.sample("p", dist.Dirichlet(torch.full((3,), 0.5)))
            pyro.sample("k", dist.Multinomial(10, p), obs=counts)
        c = pyro.sample("c", dist.Beta(1.0, 1.0).expand([2]).to_event(1))
        pyro.sample("n", dist.Binomial(10, c).to_event(1), obs=torch.tensor([0.0, 4.0]))
        a = pyro.sample("a", dist.VonMises(0.0, 0.5))
        with pyro.plate("angle", 3):
            pyro.sample("y", dist.VonMises(a, 2.0), obs=angles)

    def update_a(q, counts, angles):
        x, y = 0.5 + 2 * angles.cos().sum(), 2 * angles.sin().sum()
        return dist.VonMises(torch.atan2(y, x), torch.hypot(x, y))

    updates = {
        "p": lambda q, counts, angles: dist.Dirichlet(0.5 + counts),
        "c": lambda q, *_: dist.Beta(torch.tensor([1.0, 5.0]), torch.tensor([11.0, 7.0])).to_event(
            1
        ),
        "a": update_a,
    }
    posterior = vi.fit(
        vi.Model(model, counts, angles, updates=updates), SUPPORT, method="cavi", seed=0
    )
    assert len(posterior.losses) == 2
    assert float(posterior.log_weights(500, seed=0).std()) < 1e-6
    torch.testing.assert_close(factors(posterior)["p"].concentration, 0.5 + counts)
    torch.testing.assert_close(factors(posterior)["c"].mean, torch.tensor([1 / 12, 5 / 12]))


# -- refusals ---------------------------------------------------------------------------------


def sweep(updates, guide=SUPPORT, **options):
    return vi.fit(
        vi.Model(unknown_noise, Y, updates=updates), guide, method="cavi", seed=0, **options
    )


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        ("full_rank", r"guide 'full_rank' has none: use guide='mean_field'"),
        ("mean_field", r"site 'tau' is not real.*MeanField\(families='support'\)"),
    ],
)
def test_other_guides_are_refused(guide, message):
    with pytest.raises(OptionError, match=message):
        sweep(UPDATES, guide)


def test_a_model_without_updates_is_refused():
    with pytest.raises(OptionError, match=r"has none for 'beta', 'sd', 'shift': give vi.Model"):
        vi.fit(two_scales_model(), SUPPORT, method="cavi")
    with pytest.raises(OptionError, match=r"has none for 'tau'.*updates=\{'tau': update\}"):
        sweep({"mu": update_mu})
    with pytest.raises(OptionError, match="updates= name 'sigma', which is no continuous latent"):
        sweep({**UPDATES, "sigma": update_mu})


@pytest.mark.parametrize(
    "options", [{"objective": "iwae"}, {"steps": 10}, {"engine": "pyro"}, {"batch_size": 2}]
)
def test_options_of_other_methods_are_refused(options):
    with pytest.raises(OptionError, match="method='cavi' sweeps over all data"):
        sweep(UPDATES, **options)


def test_a_support_without_a_factor_is_refused():
    def model():
        pyro.sample("u", dist.Uniform(-1.0, 3.0))

    updates = {"u": lambda q: dist.Beta(1.0, 1.0)}
    with pytest.raises(OptionError, match="the support of site 'u' has no factor"):
        vi.fit(vi.Model(model, updates=updates), SUPPORT, method="cavi")


def test_what_is_no_update_is_refused():
    with pytest.raises(ModelError, match=r"updates\['mu'\] must be a function"):
        vi.Model(unknown_noise, Y, updates={"mu": 3})
    with pytest.raises(ModelError, match="updates= must be a dict of functions"):
        vi.Model(unknown_noise, Y, updates=[update_mu])


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (
            lambda q, y: dist.Normal(0.0, 1.0),
            "gave a Normal, and the factor of this site is a Gamma",
        ),
        (lambda q, y: dist.Gamma(torch.ones(2), 1.0), r"shape \(2,\), and the site has shape \(\)"),
        (lambda q: dist.Gamma(1.0, 1.0), r"raised TypeError.*update\(q, \*args, \*\*kwargs\)"),
        (lambda q, y: dist.Gamma(torch.tensor(math.nan), 1.0, validate_args=False), "not finite"),
        (lambda q, y: dist.Gamma(2.0 + len(y), update_tau(q, y).rate), "lowered the ELBO by"),
    ],
)
def test_a_wrong_update_is_refused_by_name(update, message):
    with pytest.raises(ModelError, match=rf"updates\['tau'\] .*{message}"):
        sweep({"mu": update_mu, "tau": update})


def test_updates_that_stand_still_too_early_are_refused():
    """Twice the right spread raises the ELBO of a poor start, and stays there."""

    def wide(q, y):
        right = update_mu(q, y)
        return dist.Normal(right.loc, 2 * right.scale)

    with pytest.raises(ModelError, match=r"updates\['mu'\] (stand still|lowered the ELBO)"):
        sweep({"mu": wide, "tau": update_tau})
    alone = vi.Model(lambda y: pyro.sample("mu", dist.Normal(y.mean(), 1.0)), Y)
    still = vi.Model(alone.fn, Y, updates={"mu": lambda q, y: dist.Normal(y.mean(), 2.0)})
    with pytest.raises(ModelError, match=r"updates\['mu'\] stand still.*another spread"):
        vi.fit(still, "mean_field", method="cavi", init={"mu": 100.0}, seed=0)


def test_a_budget_stops_it():
    posterior = sweep(UPDATES, budget=1e-9)
    assert posterior.status.reason == "budget"
    assert not posterior.status.converged
