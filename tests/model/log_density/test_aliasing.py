"""Writes through views, and into what a model closes over, are seen as plain Pyro sees them."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hand import density_of
from pyro import poutine
from pyro.distributions.util import eye_like

import pyro_vi_kit as vi
from pyro_vi_kit.core.errors import ModelError
from pyro_vi_kit.model.gradients import Gradients

SHAPE = (3, 4)
CLOSED = {t: torch.zeros(SHAPE, dtype=t) for t in (torch.float32, torch.float64)}
VIEWS = {t: whole.view(-1) for t, whole in CLOSED.items()}
COUNT = torch.zeros(SHAPE, dtype=torch.long)


def zeros(t):
    return torch.zeros(SHAPE, dtype=t)


def written(write, make=zeros):
    """A tensor that something is then written into."""

    def made(t):
        tensor = make(t)
        write(tensor)
        return tensor

    return made


def set_first(tensor, value=2.0):
    tensor[0] = value


def add_in_place(tensor):
    row = tensor[0]
    row += 2


def set_data(tensor):
    tensor.data = torch.ones(SHAPE, dtype=tensor.dtype)


def set_storage(tensor):
    other = torch.ones(SHAPE, dtype=tensor.dtype)
    tensor.set_(other)
    other.mul_(3.0)


def expanded(t):
    column = torch.zeros(3, 1, dtype=t)
    whole = column.expand(SHAPE)
    column.fill_(2.0)
    return whole


def from_numpy(t):
    array = np.zeros(SHAPE, np.float32 if t is torch.float32 else np.float64)
    tensor = torch.from_numpy(array)
    array[0] = 2.0
    tensor[1].fill_(3.0)
    return tensor


def mask_as_numbers(t):
    number = (
        (torch.arange(12.0) > 5).to(t) if t is torch.float64 else (torch.arange(12.0) > 5).float()
    )
    number.mul_(2.0)
    return number.view(SHAPE)


def converted(t):
    tensor = zeros(t)
    tensor.to(t)[0].fill_(2.0)
    return tensor


def through_another_view(t):
    VIEWS[t][:3].fill_(2.0)
    return CLOSED[t]


def counted(t):
    COUNT[0].add_(1)
    return COUNT.to(t)


def legacy(t):
    tensor = (torch.FloatTensor if t is torch.float32 else torch.DoubleTensor)(*SHAPE).zero_()
    tensor[0].fill_(2.0)
    return tensor


WAYS = {
    "A.view(-1)[:3] = 2": written(lambda a: a.view(-1).__setitem__(slice(3), 2.0)),
    "A[0].fill_": written(lambda a: a[0].fill_(2.0)),
    "A[1:].copy_": written(lambda a: a[1:].copy_(torch.ones(2, 4, dtype=a.dtype))),
    "A[:3].add_": written(lambda a: a[:3].add_(1.0)),
    "A[0][2] =": written(lambda a: set_first(a[0][2:])),
    "A.diagonal().fill_": written(lambda a: a.diagonal().fill_(2.0)),
    "(x > 0).float().mul_": mask_as_numbers,
    "r = A[0]; r += 2": written(add_in_place),
    "eye_like": lambda t: eye_like(torch.zeros(4, dtype=t), 4)[:3],
    "A[:] =": written(lambda a: a.__setitem__(slice(None), 1.5)),
    "A.fill_": written(lambda a: a.fill_(1.5)),
    "out=": written(lambda a: torch.add(torch.ones(4, dtype=a.dtype), 1.0, out=a[1])),
    "scatter_": written(lambda a: a.view(-1).scatter_(0, torch.tensor([1, 5]), 2.0)),
    "index_put_": written(
        lambda a: a.view(-1).index_put_((torch.tensor([1, 5]),), torch.tensor(3.0, dtype=a.dtype))
    ),
    "masked_fill_": written(lambda a: a.view(-1).masked_fill_(torch.arange(12) > 5, 2.0)),
    "A.data[0] =": written(lambda a: set_first(a.data)),
    "A.data =": written(set_data),
    "A.T": written(lambda a: a.T[0].fill_(2.0)),
    "unbind": written(lambda a: a.unbind(0)[1].fill_(2.0)),
    "split": written(lambda a: a.split(2, 1)[1].fill_(2.0)),
    "chunk": written(lambda a: a.chunk(3)[1].fill_(2.0)),
    "narrow": written(lambda a: a.narrow(0, 1, 1).fill_(2.0)),
    "as_strided": written(lambda a: a.as_strided((3,), (5,)).fill_(2.0)),
    "expand": expanded,
    "set_": written(set_storage),
    "numpy": written(lambda a: set_first(a.numpy())),
    "resize_": written(lambda a: a.resize_(SHAPE), lambda t: torch.ones(1, 12, dtype=t)),
    "from_numpy": from_numpy,
    "rows of a loop": written(lambda a: [row.fill_(float(i)) for i, row in enumerate(a)]),
    "new_zeros": written(set_first, lambda t: torch.ones(2, dtype=t).new_zeros(SHAPE)),
    "to(dtype)": converted,
    "FloatTensor": legacy,
    "closed over": written(lambda a: (a[0].fill_(2.0), a[0].mul_(1.5)), CLOSED.__getitem__),
    "closed over, another view": through_another_view,
    "closed over, added up": written(lambda a: a[0].add_(1.0), CLOSED.__getitem__),
    "closed over, integers": counted,
}
Y = 3.0 * torch.ones(SHAPE)


def model_of(way, t):
    def model(y):
        b = pyro.sample("b", dist.Normal(torch.zeros((), dtype=t), 10.0))
        pyro.sample("y", dist.Normal(b * way(t), 1.0).to_event(2), obs=y)

    return model


@pytest.fixture(autouse=True)
def forget_writes():
    """What plain Pyro writes into closed-over tensors is none of the next run's."""
    yield
    for tensor in (*CLOSED.values(), COUNT):
        tensor.zero_()


def plain(model, y, b):
    values = []
    for value in b:
        for tensor in (*CLOSED.values(), COUNT):
            tensor.zero_()
        conditioned = poutine.condition(model, {"b": value.to(y.dtype)})
        values.append(poutine.trace(conditioned).get_trace(y).log_prob_sum().double())
    return torch.stack(values)


@pytest.mark.parametrize("t", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("way", WAYS)
def test_a_write_is_seen_and_nothing_of_the_users_is_written(way, t):
    model, y = model_of(WAYS[way], t), Y.to(t)
    density = density_of(model, y)
    z = torch.tensor([[0.3], [1.5], [-2.0]], dtype=torch.float64)
    found, again = density.log_prob(z), density.log_prob(z)
    captured, _ = Gradients(density, patience=0)(z)
    assert not any(tensor.any() for tensor in (*CLOSED.values(), COUNT))
    # 13 terms of up to 30 nats, summed up in the model's own precision.
    exact = {"rtol": 1e-5, "atol": 1e-4} if t is torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    expected = plain(model, y, z[:, 0])
    for value in (found, again, captured):
        torch.testing.assert_close(value, expected, **exact)


def slope(a, b):
    """The exact posterior of b for y ~ Normal(b a, 1), a prior of sd 10: mean and sd."""
    precision = float((a * a).sum()) + 0.01
    return float((a * b).sum()) / precision, precision**-0.5


# The first eleven, which are the commonest, and one that writes into what it closes over.
COMMON = [*list(WAYS)[:11], "closed over"]


@pytest.mark.parametrize("t", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("way", COMMON)
def test_fit_and_nuts_see_it(way, t):
    model = vi.Model(model_of(WAYS[way], t), Y.to(t))
    mean, sd = slope(WAYS[way](t), Y.to(t))
    for tensor in CLOSED.values():
        tensor.zero_()
    posterior = vi.fit(model, "full_rank", seed=0)
    draws = posterior.sample(4000, seed=0)["b"]
    assert abs(draws.mean() - mean) < 5 * sd / 4000**0.5
    # The sd of 4,000 draws has an error of 1 / sqrt(8,000), 1.1 %.
    assert abs(draws.std() / sd - 1) < 0.05
    reference = vi.nuts(model, chains=2, draws=1000, tune=300, seed=0, progress=False)
    chains = reference.posterior["b"].values
    # Two thousand draws that are worth 400 at the least.
    assert abs(chains.mean() - mean) < 5 * sd / 400**0.5
    assert not CLOSED[t].any()


@pytest.mark.parametrize("t", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("way", COMMON)
def test_in_c(way, t, cache):
    model = vi.Model(model_of(WAYS[way], t), Y.to(t))
    density = density_of(model.fn, *model.args)
    gradients = Gradients(density, patience=0)
    point = np.array([0.7])
    gradients(torch.from_numpy(point).view(1, -1))
    assert gradients.to_c(10**6, point), gradients.how(1)
    expected = plain(model.fn, *model.args, torch.from_numpy(point))
    assert abs(gradients.at(point)[0] - float(expected)) < (1e-4 if t is torch.float32 else 1e-10)


def test_an_argument_that_the_model_writes_into_stays_as_it_is():
    def model(y):
        b = pyro.sample("b", dist.Normal(0.0, 10.0))
        y -= y.mean()
        y.div_(2.0)
        pyro.sample("y", dist.Normal(b, 1.0).expand([5]).to_event(1), obs=y)

    for t in (torch.float32, torch.float64):
        y = torch.arange(5.0, dtype=t)
        density = density_of(model, y)
        z = torch.zeros(2, 1, dtype=torch.float64)
        first, second = density.log_prob(z), density.log_prob(z)
        assert torch.equal(y, torch.arange(5.0, dtype=t))
        assert torch.equal(first, second)
        trace = poutine.trace(poutine.condition(model, {"b": torch.tensor(0.0)})).get_trace(
            y.clone()
        )
        torch.testing.assert_close(
            first, trace.log_prob_sum().double().expand(2), rtol=1e-5, atol=1e-5
        )


def test_lower_precisions_round_as_they_are_meant_to():
    def model():
        b = pyro.sample("b", dist.Normal(0.0, 10.0))
        third = torch.tensor(1.0 / 3.0)
        pyro.sample("y", dist.Normal(b * third.half(), 1.0), obs=third)
        pyro.sample("x", dist.Normal(b * third.float(), 1.0), obs=third.double())

    density = density_of(model)
    half = float(torch.tensor(1.0 / 3.0).half())

    def log_p(y, loc):
        return -0.5 * (y - loc) ** 2 - 0.9189385332046727

    expected = (
        log_p(1 / 3, half) + log_p(1 / 3, 1 / 3) - 0.5 * 0.01 - np.log(10) - 0.9189385332046727
    )
    assert abs(float(density.log_prob(torch.ones(1, 1).double())) - expected) < 1e-12


def test_bits_of_floating_point_numbers_are_refused():
    def model(y):
        b = pyro.sample("b", dist.Normal(0.0, 10.0))
        sign = (y.view(torch.int32) < 0).float()
        pyro.sample("y", dist.Normal(b * sign, 1.0).to_event(1), obs=y)

    with pytest.raises(ModelError, match="bits of floating-point numbers"):
        density_of(model, torch.tensor([-1.0, 2.0]))
