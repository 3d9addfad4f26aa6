"""A coupling layer of splines: its gradients are autograd's, and the slope of log q is carried along."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from pyro_vi_kit.guides.flows.coupling_layers import MAX_LOG_SCALE
from pyro_vi_kit.guides.flows.spline import spline
from pyro_vi_kit.guides.flows.spline_layers import (
    Setters,
    couple,
    numbers_of,
    slope_behind,
    uncouple,
)

BINS = 4
SHAPES = [(1, ()), (2, ()), (5, (4,)), (6, (3, 7))]  # D, widths of the hidden layers
COUNT = 20


def layer(dim, hidden):
    """x `[D, N]`, some of it beyond the splines, and what sets them."""
    torch.manual_seed(1)
    options = {"dtype": torch.float64, "requires_grad": True}
    each, given = numbers_of(BINS), dim // 2
    widths = [given, *hidden, each * (dim - given)]
    weights = [torch.randn(i, o, **options) for i, o in pairwise(widths)] if given else []
    biases = [torch.randn(o, **options) for o in widths[1:]]
    x = torch.randn(dim, COUNT, dtype=torch.float64).mul(3.0).requires_grad_()
    return x, Setters(torch.randn(each, given, **options), weights, biases)


def naive(x, setters):
    """The layer as a textbook has it; the spline itself is left to autograd."""
    out = x[: len(x) // 2].mT
    for depth, (weight, bias) in enumerate(zip(setters.weights, setters.biases, strict=False)):
        out = (out.tanh() if depth else out) @ weight + bias
    if not setters.weights:
        out = setters.biases[-1].expand(COUNT, -1)
    own = setters.own.unsqueeze(-1).expand(-1, -1, COUNT)
    raw = torch.cat([own, out.mT.reshape(len(own), -1, COUNT)], 1)
    image, _, bent = spline(x, raw[:-2])
    log_scale = MAX_LOG_SCALE * (raw[-2] / MAX_LOG_SCALE).tanh()
    log_det = bent.slope.log().sum(0) + log_scale.sum(0)
    return image * log_scale.exp() + raw[-1], log_det


def gradients(y, log_det, of, *, with_log_det=True):
    """Of a sum in which every element counts differently."""
    weight = torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape)
    loss = (weight * y).sum()
    if with_log_det:
        loss = loss + (log_det * torch.arange(1.0, COUNT + 1, dtype=y.dtype)).sum()
    return torch.autograd.grad(loss, of, allow_unused=True)


@pytest.mark.parametrize("with_log_det", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_those_of_autograd(shape, with_log_det):
    x, setters = layer(*shape)
    y, log_det, _ = couple(x, setters)
    expected, expected_log_det = naive(x, setters)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(log_det, expected_log_det)
    of = [x, *setters.weights, *setters.biases, *([setters.own] if shape[0] > 1 else [])]
    found = gradients(y, log_det, of, with_log_det=with_log_det)
    wanted = gradients(expected, expected_log_det, of, with_log_det=with_log_det)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    # Without a gradient of x, as for noise, the others are the same.
    y, log_det, _ = couple(x.detach(), setters)
    again = gradients(y, log_det, of[1:], with_log_det=with_log_det)
    for a, b in zip(again, found[1:], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_way_back_is_the_inverse(shape):
    x, setters = layer(*shape)
    y, log_det, _ = couple(x, setters)
    # Rounding is multiplied by the steepest way back.
    torch.testing.assert_close(uncouple(y, setters), x, rtol=1e-8, atol=1e-8)
    for i in range(3):
        back = torch.autograd.functional.jacobian(
            lambda one: uncouple(one[:, None], setters)[:, 0], y[:, i].detach()
        )
        assert float(back.slogdet()[1]) == pytest.approx(-log_det[i].item(), abs=1e-8)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_slope_of_log_q_is_carried_along(shape):
    x, setters = layer(*shape)
    y, _, done = couple(x, setters)
    again = y.detach().requires_grad_()
    noise = uncouple(again, setters)
    log_q = -0.5 * noise.square().sum() - couple(noise, setters)[1].sum()
    (expected,) = torch.autograd.grad(log_q, again)
    torch.testing.assert_close(slope_behind(done, -x, setters), expected, rtol=1e-6, atol=1e-6)
