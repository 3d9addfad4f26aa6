"""Data that broadcast by mistake are refused as Pyro's SVI refuses them; what counts once is not."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam

import pyro_vi_kit as vi
from pyro_vi_kit.core.errors import ShapeError
from pyro_vi_kit.model.log_density import Density

X, Y = torch.linspace(0.5, 1.5, 5), torch.tensor([1.0, 2.0, 3.0, 2.5, 1.5])


def line(x, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("datum", len(y)):
        pyro.sample("y", dist.Normal(x * w, 1.0), obs=y)


def line_without_plate(x, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x * w, 1.0), obs=y)


def wide_latent(y):
    with pyro.plate("datum", len(y)):
        w = pyro.sample("w", dist.Normal(torch.zeros(5, 1), 1.0))
        pyro.sample("y", dist.Normal(w.sum(-2), 1.0), obs=y)


def masked_by_a_column(y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("datum", len(y)), poutine.mask(mask=(y > 1.2).unsqueeze(-1)):
        pyro.sample("y", dist.Normal(w, 1.0), obs=y)


def rows_and_columns(y):
    with pyro.plate("row", 3, dim=-2), pyro.plate("column", 5, dim=-1):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(w, 1.0), obs=y)


def one_event(y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(w.expand(5), 1.0).to_event(1), obs=y)


def whole(x, y):
    return line(x.squeeze(-1), y.squeeze(-1))


def refused_by_pyro(model, *args):
    refusal = pytest.raises(ValueError, match="invalid log_prob shape")
    with pyro.get_param_store().scope(), pyro.validation_enabled(True), refusal:
        SVI(model, AutoNormal(model), Adam({"lr": 0.01}), Trace_ELBO()).step(*args)


REFUSED = {
    "a column of predictors": (line, (X[:, None], Y), True),
    "a column of data": (line, (X, Y[:, None]), True),
    "columns of both": (line, (X[:, None], Y[:, None]), True),
    "a column of predictors, no plate": (line_without_plate, (X[:, None], Y), True),
    "a column of data, no plate": (line_without_plate, (X, Y[:, None]), True),
    "one datum for many, no plate": (line_without_plate, (X, Y[0]), True),
    "a latent wider than its plate": (wide_latent, (Y,), True),
    "a mask as a column": (masked_by_a_column, (Y,), True),
    # Pyro repeats these without a word.
    "a row for each row": (rows_and_columns, (Y,), False),
    "a number for an event": (one_event, (Y[0],), False),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_broadcast_by_mistake_is_refused_everywhere(case):
    model, args, by_pyro = REFUSED[case]
    if by_pyro:
        refused_by_pyro(model, *args)
    asked = vi.Model(model, *args)
    report = vi.check(asked, verbose=False)
    (failed,) = [check for check in report.checks if check.outcome == "fail"]
    assert failed.name == "shapes and plates"
    for use in (Density, vi.fit, vi.nuts, lambda m: vi.fit(m, AutoNormal(model), steps=2)):
        with pytest.raises(ShapeError) as refusal:
            use(asked)
        # One list of problems: what is refused is what the check says, site and remedy too.
        assert failed.message in str(refusal.value)
        assert "site '" in failed.message
        assert failed.remedy in str(refusal.value)


def exact(x, y):
    """Mean and sd of w for y ~ Normal(x w, 1) and w ~ Normal(0, 1)."""
    precision = 1 + (x * x).sum()
    return float((x * y).sum() / precision), float(precision**-0.5)


@pytest.mark.parametrize("args", [(X[:, None], Y), (X, Y[:, None]), (X[:, None], Y[:, None])])
def test_the_remedy_that_is_stated_gives_the_right_posterior(args):
    row = vi.fit(vi.Model(whole, *args), "full_rank", seed=0).summary().loc["w"]
    mean, sd = exact(X, Y)
    assert row["mean"] == pytest.approx(mean, abs=4 * sd / 4000**0.5)
    assert row["sd"] == pytest.approx(sd, rel=4 / 8000**0.5)


def summed_rows():
    row, column = pyro.plate("row", 2, dim=-2), pyro.plate("column", 3, dim=-1)
    with row:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with row, column:
        y = pyro.sample("y", dist.Normal(x, 1.0))
    with column:
        pyro.sample("z", dist.Normal(y.sum(-2, True), 1.0), obs=torch.zeros(3))


def homogeneous_hmm():
    p = pyro.sample("p", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
    seen = dist.Normal(torch.tensor([0.0, 3.0]), 1.0)
    pyro.sample("y", dist.DiscreteHMM(torch.zeros(2), p.log(), seen), obs=torch.tensor([0.0, 3.0]))


def one_rate_for_all():
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    pyro.sample("y", dist.Bernoulli(p), obs=torch.ones(10))


def all_were_one():
    p = pyro.sample("p", dist.Beta(2.0, 2.0).expand([5]).to_event(1))
    with pyro.plate("datum", 5):
        pyro.sample("y", dist.Bernoulli(p), obs=torch.tensor(1.0))


def columns_without_plate():
    line_without_plate(X[:, None], Y[:, None])


@pytest.mark.parametrize(
    "model",
    [summed_rows, homogeneous_hmm, one_rate_for_all, all_were_one, columns_without_plate],
)
def test_data_that_count_once_are_no_error(model):
    report = vi.check(vi.Model(model), verbose=False)
    assert report.ok, str(report)
    density = Density(vi.Model(model))
    assert density.log_prob(torch.zeros(1, density.dim, dtype=torch.float64)).isfinite().all()


def uniform(y):
    end = pyro.sample("end", dist.LogNormal(1.0, 1.0))
    with pyro.plate("datum", len(y)):
        pyro.sample("y", dist.Uniform(0.0, end), obs=y)


def test_data_outside_a_support_that_follows_a_latent_may_be_inside_it_elsewhere():
    density = Density(vi.Model(uniform, Y))
    low, high = density.log_prob(torch.tensor([[0.0], [2.0]], dtype=torch.float64))
    prior = dist.LogNormal(1.0, 1.0).log_prob(torch.tensor(2.0, dtype=torch.float64).exp())
    assert low == -torch.inf
    assert float(high) == pytest.approx(float(prior) + 2.0 - 5 * 2.0)
