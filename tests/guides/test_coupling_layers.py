"""Coupling layers: their own gradient is autograd's, and the way back is the inverse."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from pyro_vi_kit.guides.flows.coupling_layers import MAX_LOG_SCALE, couple, slope_of_log_q, uncouple

SHAPES = [(2, 1, ()), (5, 3, (4,)), (6, 4, (3, 7))]  # D, layers, widths of the hidden layers


def flow(dim, layers, hidden):
    """x `[3, D]`, permutations, weights and biases."""
    torch.manual_seed(0)
    widths = [dim // 2, *hidden, 2 * (dim - dim // 2)]
    options = {"dtype": torch.float64, "requires_grad": True}
    weights = [torch.randn(layers, i, o, **options) for i, o in pairwise(widths)]
    biases = [torch.randn(layers, o, **options) for o in widths[1:]]
    permutations = torch.stack([torch.randperm(dim) for _ in range(max(layers // 2, 1))])
    return torch.randn(3, dim, **options), permutations, weights, biases


def naive(x, permutations, weights, biases):
    """The layers as a textbook has them."""
    log_det, split = 0.0, weights[0].shape[1]
    for layer in range(len(weights[0])):
        given, moved = x[:, :split], x[:, split:]
        out = given
        for depth, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            out = (out.tanh() if depth else out) @ weight[layer] + bias[layer]
        raw, shift = out.chunk(2, -1)
        log_scale = MAX_LOG_SCALE * raw.tanh()
        log_det = log_det + log_scale.sum(-1)
        x = torch.cat([moved * log_scale.exp() + shift, given], -1)
        if layer % 2:
            x = x[:, permutations[layer // 2]]
    return x, log_det


def gradients(y, log_det, of):
    """Of a sum in which every element counts differently."""
    weight = torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape)
    loss = (weight * y).sum() + (log_det * torch.arange(1.0, 4.0, dtype=y.dtype)).sum()
    return torch.autograd.grad(loss, of)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_those_of_autograd(shape):
    x, permutations, weights, biases = flow(*shape)
    y, log_det, _ = couple(x, permutations, weights, biases)
    expected, expected_log_det = naive(x, permutations, weights, biases)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(log_det, expected_log_det)
    of = [x, *weights, *biases]
    found = gradients(y, log_det, of)
    for a, b in zip(found, gradients(expected, expected_log_det, of), strict=True):
        torch.testing.assert_close(a, b)
    # Without a gradient of x, as for noise, the others are the same.
    y, log_det, _ = couple(x.detach(), permutations, weights, biases)
    for a, b in zip(gradients(y, log_det, of[1:]), found[1:], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_way_back_is_the_inverse(shape):
    x, permutations, weights, biases = flow(*shape)
    y, log_det, _ = couple(x, permutations, weights, biases)
    again, log_det_again = uncouple(y, permutations, weights, biases)
    torch.testing.assert_close(again, x)
    torch.testing.assert_close(log_det_again, log_det)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_slope_of_log_q_is_its_gradient(shape):
    x, permutations, weights, biases = flow(*shape)
    y, _, steps = couple(x, permutations, weights, biases)
    at = y.detach().requires_grad_()
    noise, log_det = uncouple(at, permutations, weights, biases)
    log_q = -0.5 * noise.square().sum() - log_det.sum()
    (expected,) = torch.autograd.grad(log_q, at)
    found = slope_of_log_q(x.detach(), steps, permutations, weights)
    torch.testing.assert_close(found, expected)
