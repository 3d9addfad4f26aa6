"""A replay is the function itself, at points, noises and data that it was not recorded on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_vi_kit.capture import CaptureError, Program, capture, capture_holding, record
from pyro_vi_kit.capture import recorder as recorder_module
from pyro_vi_kit.core.runtime import RandomStream


def points(*shape: int, seed: int = 0, count: int = 3) -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(*shape, generator=generator, dtype=torch.float64),) for _ in range(count)]


def captured(function, *shape: int) -> Program:
    first, *others = points(*shape)
    return capture(function, first, others)


def gradient(function):
    """Value and gradient of a scalar function, as the density has them."""

    def both(x: Tensor):
        x = x.detach().requires_grad_()
        value = function(x)
        return value.detach(), *torch.autograd.grad(value.sum(), x)

    return both


def into_a_buffer(x: Tensor) -> Tensor:
    buffer = torch.zeros(4, dtype=x.dtype)
    first = buffer[:2]
    buffer[0] = x[0]
    before = first * 2.0
    first[1] = x[1] * buffer[0]
    return torch.stack([buffer.sum(), before.sum(), first.sum()])


def differentiable_buffer(x: Tensor) -> Tensor:
    buffer = torch.ones(4, dtype=x.dtype)
    view = buffer[1:]
    buffer[0] = x[0].sin()
    view[1] = x[1] ** 2
    return (buffer * 2.0).exp().sum() + view.sum()


def constant_changed_after_use(x: Tensor) -> Tensor:
    constant = torch.ones(3, dtype=x.dtype)
    one = x * constant
    constant += 1.0
    return one + x * constant


def in_place_chain(x: Tensor) -> Tensor:
    y = x.exp()
    part = y[1:]
    part.mul_(2.0).add_(x[:-1])
    return y.cumsum(0)


def fills_with_bool(x: Tensor) -> Tensor:
    return torch.where(torch.full_like(x, True, dtype=torch.bool), x, 0.0).sum(0, keepdim=True)


def saved_for_backward(x: Tensor) -> Tensor:
    y = torch.sigmoid(x).sqrt()
    return (y * torch.tanh(y) / y.exp()).sum()


def under_vmap(x: Tensor) -> Tensor:
    scale = torch.arange(1.0, 4.0, dtype=x.dtype)
    return torch.func.vmap(lambda row: torch.logsumexp(row * scale, 0), randomness="different")(x)


def matrix(x: Tensor) -> Tensor:
    return torch.linalg.cholesky(x @ x.mT + 0.1 * torch.eye(3, dtype=x.dtype)).diagonal(0, -2, -1)


FUNCTIONS = {
    "buffer": (into_a_buffer, (3,)),
    "constant": (constant_changed_after_use, (3,)),
    "in place": (in_place_chain, (5,)),
    "bool": (fills_with_bool, (3,)),
}
DIFFERENTIABLE = {
    "saved": (saved_for_backward, (4,)),
    "vmap": (under_vmap, (2, 3)),
    "matrix": (matrix, (2, 3, 3)),
    "buffer": (differentiable_buffer, (3,)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_replay_computes_the_function(name):
    function, shape = FUNCTIONS[name]
    program = captured(lambda x: (function(x),), *shape)
    for (x,) in points(*shape, seed=7):
        torch.testing.assert_close(program(x)[0], function(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_replay_computes_values_and_gradients(name):
    function, shape = DIFFERENTIABLE[name]
    program = captured(gradient(function), *shape)
    for (x,) in points(*shape, seed=7):
        for found, expected in zip(program(x), gradient(function)(x), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_recording_agrees_with_make_fx(name):
    from torch.fx.experimental.proxy_tensor import make_fx

    function, shape = DIFFERENTIABLE[name]
    first, (x,), _ = points(*shape)
    traced = make_fx(gradient(function))(*first)
    program = captured(gradient(function), *shape)
    for found, expected in zip(program(x), traced(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_constants_are_copies():
    weights = torch.ones(3, dtype=torch.float64)
    program = captured(lambda x: (x * weights,), 3)
    weights.fill_(100.0)
    (x,) = points(3, seed=9)[0]
    torch.testing.assert_close(program(x)[0], x)


def test_an_input_is_known_by_its_memory():
    data = torch.ones(3, dtype=torch.float64)
    x = torch.full((3,), 2.0, dtype=torch.float64)

    def through_a_closure(x, given):
        return (x * data,)  # not `given`, but the same memory

    program = capture(through_a_closure, (x, data), [])
    torch.testing.assert_close(program(x, 3.0 * data)[0], 3.0 * x)


def test_noise_is_fresh_and_is_the_stream_that_the_function_draws():
    def function(x):
        noise = torch.randn(3, dtype=x.dtype)
        more = torch.distributions.Normal(0.0, 1.0).rsample((3,)).to(x.dtype)
        return (x + noise * more,)

    program = captured(function, 3)
    (x,) = points(3, seed=4)[0]
    with RandomStream(11):
        expected = [function(x)[0] for _ in range(3)]
    with RandomStream(11):
        found = [program(x)[0] for _ in range(3)]
    torch.testing.assert_close(found, expected)
    assert not torch.equal(found[0], found[1])


def test_noise_whose_distribution_depends_on_an_input_is_drawn_in_the_graph():
    def function(x):
        return (torch.distributions.Gamma(x.exp(), 1.0, validate_args=False).rsample(),)

    program = captured(function, 200)
    assert not program.graph.noise
    x = torch.full((200,), 2.0, dtype=torch.float64)
    draws = torch.stack([program(x)[0] for _ in range(20)])
    mean, sd = float(x[0].exp()), float(x[0].exp()) ** 0.5
    assert abs(float(draws.mean()) - mean) < 4.0 * sd / draws.numel() ** 0.5
    assert float(draws.std()) == pytest.approx(sd, rel=0.1)


def test_a_failed_factorisation_is_nan_for_that_particle_alone():
    def function(x):
        return (torch.linalg.cholesky(x).sum((-2, -1)),)

    good = torch.eye(2, dtype=torch.float64).repeat(2, 1, 1)
    program = capture(function, (good,), [(2.0 * good,)])
    bad = torch.stack([4.0 * good[0], -good[0]])
    result = program(bad)[0]
    assert float(result[0]) == 4.0
    assert bool(result[1].isnan())


def branches(x):
    return (x if float(x.sum()) > 0 else -x,)


def picks(x):
    return (x[x > 0].sum(),)


def compares(x):
    return (x * float(torch.equal(x, x)),)


def writes_into_its_input(x):
    return (x.mul_(2.0),)


COUNTER = torch.zeros((), dtype=torch.float64)
NORM = torch.nn.BatchNorm1d(4, dtype=torch.float64)


def counts(x):
    COUNTER.add_(1.0)
    return (x * 2.0,)


def keeps_statistics(x):
    return (NORM(x.expand(3, 4) * torch.arange(3.0, dtype=x.dtype).unsqueeze(-1)).detach(),)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (branches, "Python number"),
        (picks, "shape"),
        (compares, "Python value"),
        (writes_into_its_input, "written into"),
        (counts, "outlives"),
        (keeps_statistics, "outlives"),
    ],
)
def test_what_cannot_be_replayed_is_refused(function, words):
    with pytest.raises(CaptureError, match=words):
        captured(function, 4)


@pytest.mark.parametrize(
    "reads",
    [
        lambda x: torch.as_tensor(np.exp(x.detach().numpy()).sum()),
        lambda x: 2.0 if x.detach().numpy().max() > 30.0 else 1.0,  # a branch that no check takes
        lambda x: 2.0 if max(x.tolist()) > 30.0 else 1.0,
        lambda x: torch.tensor([x[0].detach(), 1.0]).sum(),
    ],
)
def test_latents_that_python_or_numpy_read_are_refused(reads):
    with pytest.raises(CaptureError, match="read by Python or NumPy"):
        captured(lambda x: (x * reads(x),), 4)


def test_a_long_loop_is_left_alone(monkeypatch):
    monkeypatch.setattr(recorder_module, "MAX_NODES", 50)

    def function(x):
        for _ in range(60):
            x = torch.sin(x)
        return (x,)

    with pytest.raises(CaptureError, match="long Python loop"):
        captured(function, 2)


def test_what_changes_nothing_is_left_out():
    def function(x):
        y = (x.expand(3, 4) * 1.0).detach().view(3, 4) ** 1.0
        return (torch.exp(y.neg().neg()) + torch.exp(y) * torch.ones_like(y) / 1.0,)

    graph = record(function, points(3, 4)[0])
    assert [str(node.op) for node in graph.nodes] == ["aten.exp.default", "aten.add.Tensor"]


def test_a_tensor_of_one_number_is_a_constant():
    def function(x):
        return (
            torch.where(torch.full_like(x, True, dtype=torch.bool), x, 0.0) + x.new_full((3,), 2),
        )

    program = captured(function, 3)
    assert program.how == "script"
    assert not any("full" in str(node.op) for node in program.graph.nodes)


def test_a_view_keeps_the_strides_that_it_needs():
    def function(x):
        wide = x.unsqueeze(-1).expand(3, 4) * 1.0
        turned = (x.unsqueeze(-1) + wide).t() * 1.0
        return (wide.view(-1) + turned.contiguous().view(-1),)

    program = captured(function, 3)
    (x,) = points(3, seed=8)[0]
    torch.testing.assert_close(program(x)[0], function(x)[0], rtol=0.0, atol=0.0)


def test_a_shape_changed_in_place_is_followed():
    def function(x):
        wide = (x.unsqueeze(0) * 2.0).squeeze_(0)
        return (wide.exp().mul_(x).add_(wide),)

    program = captured(function, 4)
    assert not any(node.writes for node in program.graph.nodes)
    (x,) = points(4, seed=8)[0]
    torch.testing.assert_close(program(x)[0], function(x)[0], rtol=0.0, atol=0.0)


def test_a_shape_changed_in_place_hinders_nothing():
    """`squeeze_` writes no number, also where another view sees them; the rest is shortened."""

    def function(x):
        y = x.sin()
        z = y.unsqueeze(0)
        z.squeeze_(0)
        return (z.exp() * 1.0 + y,)

    graph = record(function, points(3)[0])
    assert not any(node.writes for node in graph.nodes)
    assert not any("mul" in str(node.op) for node in graph.nodes)
    (x,) = points(3, seed=1)[0]
    torch.testing.assert_close(captured(function, 3)(x)[0], function(x)[0])


def test_a_large_tensor_of_one_number_runs_in_torchscript():
    def function(x):
        y = x.sin()
        return (torch.empty_like(y).fill_(3.0) * y,)

    program = captured(function, 300, 300)
    assert program.how == "script"
    (x,) = points(300, 300, seed=1)[0]
    torch.testing.assert_close(program(x)[0], function(x)[0])


def test_results_too_large_to_be_held_at_once_are_replayed_by_python(monkeypatch):
    def function(x):
        return ((x.sin() * 2.0).exp(),)

    (x,) = points(50, seed=1)[0]
    assert captured(function, 50).how == "script"
    # Three results of 50 numbers of 8 bytes.
    monkeypatch.setattr("pyro_vi_kit.capture.program._MAX_SCRIPT_BYTES", 3 * 50 * 8 - 1)
    program = captured(function, 50)
    assert program.how == "python"
    assert program.note == captured(function, 50).note
    torch.testing.assert_close(program(x)[0], function(x)[0], rtol=0.0, atol=0.0)
    monkeypatch.setattr("pyro_vi_kit.capture.program._MAX_SCRIPT_BYTES", 3 * 50 * 8)
    assert captured(function, 50).how == "script"


def test_operations_that_nothing_reads_are_left_out():
    def function(x):
        x.exp()
        return (x + 1.0,)

    graph = record(function, points(3)[0])
    assert [str(node.op) for node in graph.nodes] == ["aten.add.Tensor"]


def operations(function, *inputs: Tensor) -> list[str]:
    return [str(node.op) for node in record(function, inputs).nodes]


def test_the_gradient_of_a_vector_cut_into_sites_is_one_chain():
    def density(x):
        first, second, third = x[:, :2], x[:, 2], x[:, 3:]
        return first.sin().sum(-1) + second.sin() + third.exp().sum(-1)

    program = captured(gradient(density), 4, 5)
    ops = [str(node.op) for node in program.graph.nodes]
    assert ops.count("aten.cat.default") == 1
    assert not any("backward" in op for op in ops)
    (x,) = points(4, 5, seed=8)[0]
    for found, expected in zip(program(x), gradient(density)(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)


def test_the_gradient_of_slices_that_overlap_or_leave_gaps_is_a_sum():
    def density(x):
        return x[:3].sin().sum() + x[2:4].exp().sum()

    program = captured(gradient(density), 6)
    (x,) = points(6, seed=8)[0]
    for found, expected in zip(program(x), gradient(density)(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)


def test_all_rows_by_their_indices_are_the_tensor():
    rows = torch.arange(4)
    assert operations(lambda x: (x[rows].exp(),), torch.ones(4, 2)) == ["aten.exp.default"]
    assert operations(lambda x: (x[:, rows].exp(),), torch.ones(2, 4)) == ["aten.exp.default"]
    others = (rows.flip(0), rows[:3], torch.tensor([0, 1, 2, 2]))
    for other in others:
        ops = operations(lambda x, other=other: (x[other].exp(),), torch.ones(4, 2))
        assert ops == ["aten.index.Tensor", "aten.exp.default"]


def test_views_of_views_are_one_and_views_of_what_has_another_order_stay():
    def flat(x):
        return (x.unsqueeze(0)[0].view(2, 6).reshape(12).exp(),)

    def turned(x):
        return (x.t().reshape(12).exp(),)

    x = torch.arange(12.0).view(3, 4)
    assert operations(flat, x) == ["aten.view.default", "aten.exp.default"]
    for function in (flat, turned):
        (found,) = capture(function, (x,), [(x + 1.0,)])(x)
        torch.testing.assert_close(found, function(x)[0], rtol=0.0, atol=0.0)


def test_what_constants_alone_decide_is_a_constant():
    def function(x):
        weight = (x.new_zeros(3) + 2.0).log().neg()
        return (x * weight + (0.0 + x * -1.0),)

    found = operations(function, torch.ones(3))
    assert [op for op in found if "new_zeros" in op or "log" in op] == []
    minus = operations(lambda x: (x * (x.new_zeros(3) - 1.0),), torch.ones(3))
    assert minus == ["aten.neg.default"]


def test_what_depends_on_held_tensors_alone_is_computed_once():
    def function(x, y, rows):
        return ((x * torch.lgamma(y + 1.0)[rows]).sum(), x + y)

    (x,), (other,), _ = points(3)
    y, rows = torch.rand(3, dtype=torch.float64), torch.tensor([2, 0, 1])
    program, rest = capture_holding(function, (x,), (y, rows), [(other,)])
    ops = [str(node.op) for node in program.graph.nodes]
    assert not any("lgamma" in op or "index" in op for op in ops)
    assert len(rest) == 2  # y, and the picked values in the place of the rows
    for found, expected in zip(program(other, *rest), function(other, y, rows), strict=True):
        torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)


def test_torch_compile_is_not_imported(tmp_path):
    import subprocess
    import sys

    code = (
        "import sys, torch\n"
        "from pyro_vi_kit.capture import capture\n"
        "f = lambda x: (torch.randn(3) + x.exp(),)\n"
        "p = capture(f, (torch.zeros(3),), [(torch.ones(3),)])\n"
        "p(torch.zeros(3))\n"
        "print(p.how, 'torch._dynamo' in sys.modules, 'sympy' in sys.modules)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["script", "False", "False"], out.stdout + out.stderr
