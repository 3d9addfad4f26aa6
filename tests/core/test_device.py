"""Where a fit computes: on the CPU, on a GPU where there is one, and on a stand-in for one anywhere."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pyro
import pytest
import torch
from click.testing import CliRunner
from toys import MODELS, load, two_scales_model

import pyro_vi_kit as vi
from pyro_vi_kit import guides, objectives
from pyro_vi_kit.capture import Program, replay
from pyro_vi_kit.capture.recorder import record
from pyro_vi_kit.cli import main
from pyro_vi_kit.core.device import checked, device_of
from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.core.runtime import RandomStream, default_device, isolated, random_state
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.optimize.engines import CapturedEngine, EagerEngine

CASES = Path(__file__).parents[1] / "elsewhere_cases.py"
needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device; the stand-in runs everywhere"
)
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="is of machines without CUDA")


@pytest.mark.slow
def test_everything_of_a_fit_is_on_its_device():
    """Runs elsewhere_cases.py: torch has to know of that device before its first gradient."""
    run = "import os, pytest; code = pytest.main({}); os._exit(int(code))"
    arguments = ["-q", "--tb=short", "-p", "no:cacheprovider", str(CASES)]
    found = subprocess.run(
        [sys.executable, "-u", "-c", run.format(arguments)],
        cwd=CASES.parents[1],
        env={**os.environ, "PYTHONPATH": str(CASES.parents[1])},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-1000:]


# -- the option ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "complaint"),
    [
        ("gpu", "'gpu' is no device that torch knows: use 'cpu', 'cuda'"),
        ("cuda:x", "no device that torch knows"),
        (3.5, r"must be 'cpu', 'cuda' or a torch\.device, got 3\.5"),
        ("meta", "holds no numbers"),
        pytest.param("cuda", r"finds no CUDA device.*leave device= out", marks=without_cuda),
        pytest.param("cuda:1", "finds no CUDA device", marks=without_cuda),
        pytest.param("cuda:99", "cannot be used on this machine", marks=needs_cuda),
    ],
)
def test_devices_are_checked_before_the_model_runs(device, complaint):
    def never():
        raise AssertionError("the model was run")

    with pytest.raises(OptionError, match=complaint):
        vi.fit(vi.Model(never), device=device)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_the_cpu_by_name_is_the_default(device):
    default, named = (
        vi.fit(two_scales_model(), "mean_field", seed=0, device=where) for where in (None, device)
    )
    assert list(named.losses) == list(default.losses)
    assert named.density.device == torch.device("cpu")
    assert default.elbo == named.elbo


def test_where_data_are():
    assert checked(None) is None
    assert checked("cpu") == torch.device("cpu")
    assert device_of(([1, None], {"x": [torch.ones(2)]})) == torch.device("cpu")
    assert device_of([torch.ones(2), torch.ones(2, device="meta")]).type == "meta"
    with torch.device("meta"):
        assert device_of([1.0]).type == "meta"


def test_literals_land_on_the_device_and_the_default_comes_back():
    with isolated(torch.float64, torch.device("meta")):
        assert torch.tensor(0.0).device.type == "meta"
        assert pyro.distributions.Normal(0.0, 1.0).loc.device.type == "meta"
    assert torch.tensor(0.0).device.type == "cpu"
    with torch.device("meta"), isolated(torch.float64, torch.device("cpu")):
        assert torch.tensor(0.0).device.type == "cpu"


def test_where_nothing_changes_nothing_is_entered():
    """A default device costs every call of a torch function: none is set where tensors land anyway."""
    before = torch._C._len_torch_function_stack()
    with default_device(torch.device("cpu")), default_device(None):
        assert torch._C._len_torch_function_stack() == before


def test_a_random_state_tells_draws():
    before = random_state()
    assert random_state() == before
    with RandomStream(0):
        torch.randn(3)
    assert random_state() == before
    torch.randn(3)
    assert random_state() != before


def test_data_that_are_nowhere_near_the_model_are_brought_there():
    """On the CPU nothing is moved; where arguments differ the one beside the CPU counts."""
    density = Density(two_scales_model(), device="cpu")
    x = density.data[0]
    assert density.cast(x).data_ptr() == x.data_ptr()


def test_the_command_line_checks_it_too(tmp_path):
    model = str(MODELS / "eight_schools.py")
    wrong = CliRunner().invoke(main, ["fit", model, "--device", "gpu"])
    assert wrong.exit_code == 2
    assert "no device that torch knows" in wrong.output
    right = CliRunner().invoke(main, ["fit", model, "--guide", "mean_field", "--device", "cpu"])
    assert right.exit_code in (0, 3)


# -- CUDA graphs -----------------------------------------------------------------------------------


class PretendGraph:
    """Runs what was recorded again, on the memory that it was recorded on."""

    def replay(self):
        (a, b), results = self.last
        for result, value in zip(results, (a + b, a * b), strict=True):
            result.copy_(value)


def pair(a, b):
    """A function of two tensors that tells the pretended graph what it was called on."""
    results = (a + b, a * b)
    PretendGraph.last = (a, b), results
    return results


class Nothing:
    """Any CUDA context or stream."""

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def wait_stream(self, other):
        pass


@pytest.fixture
def pretend_cuda(monkeypatch):
    """What `replay.on_cuda` calls, on the CPU."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", PretendGraph)
    for name in ("Stream", "device", "stream", "graph", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Nothing)


def test_a_cuda_graph_reads_its_own_memory_and_gives_copies(pretend_cuda):
    example = [torch.ones(2), torch.ones(2)]
    run = replay.on_cuda(pair, example)
    first = run(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    second = run(torch.tensor([5.0, 6.0]), torch.tensor([7.0, 8.0]))
    assert [value.tolist() for value in first] == [[4.0, 6.0], [3.0, 8.0]]
    assert [value.tolist() for value in second] == [[12.0, 14.0], [35.0, 48.0]]
    assert example[0].tolist() == [1.0, 1.0]


@without_cuda
def test_a_graph_that_cuda_refuses_goes_to_torchscript(monkeypatch):
    with pytest.raises(RuntimeError):
        replay.on_cuda(pair, [torch.ones(2), torch.ones(2)])
    inputs = [torch.ones(2), torch.ones(2)]
    graph = record(lambda a, b: (a + b,), inputs)

    def refused(program, where, inputs):
        return "no CUDA graph: operation not permitted when stream is capturing"

    monkeypatch.setattr(Program, "_launch_at_once", refused)
    monkeypatch.setattr(
        "pyro_vi_kit.capture.program._elsewhere", lambda inputs: torch.device("cuda")
    )
    program = Program(graph, inputs)
    assert program.how == "script"
    assert program.note.startswith("no CUDA graph")
    assert not program.compile(inputs)
    assert program(*inputs)[0].tolist() == [2.0, 2.0]


# -- on a GPU --------------------------------------------------------------------------------------


@needs_cuda
@pytest.mark.parametrize(
    ("guide", "options"),
    [
        ("mean_field", {}),
        ("full_rank", {}),
        ("affine_coupling", {"steps": 2000}),
        ("full_rank", {"engine": "pyro", "steps": 50}),
    ],
)
def test_fits_on_cuda_are_those_of_the_cpu(guide, options):
    """L-BFGS holds the same draws on both; the others are compared by what is left to noise."""
    model = load("eight_schools").MODEL
    here, there = (
        vi.fit(model, guide, seed=0, device=device, **options) for device in ("cpu", "cuda")
    )
    assert next(there.approximation.guide.parameters()).is_cuda
    if not options:
        a, b = (fit.approximation.guide.state_dict() for fit in (here, there))
        for name, value in a.items():
            torch.testing.assert_close(b[name].cpu(), value, rtol=1e-4, atol=1e-4)
    error = 5 * (here.elbo_se**2 + there.elbo_se**2) ** 0.5
    # A stochastic fit stops within its tolerance of 0.01 nat, in few steps within a tenth.
    assert there.elbo == pytest.approx(here.elbo, abs=error + (0.1 if options else 0.0))


@needs_cuda
def test_densities_on_cuda_are_those_of_the_cpu():
    model = load("eight_schools").MODEL
    z = torch.randn(64, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    here, there = Density(model), Density(model, device="cuda")
    for a, b in zip(here.log_prob_and_grad(z), there.log_prob_and_grad(z.cuda()), strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-10, atol=1e-10)


@needs_cuda
def test_steps_of_an_autoencoder_on_cuda():
    fit = vi.fit(load("vae").MODEL, "amortized", device="cuda", batch_size=64, steps=50, seed=0)
    assert torch.tensor(fit.losses).isfinite().all()
    assert all(value.is_cuda for value in fit.approximation.params.values())


@needs_cuda
@pytest.mark.parametrize("guide", ["mean_field", "full_rank", "affine_coupling"])
def test_captured_steps_on_cuda_are_the_uncaptured_ones(guide):
    bounds = []
    for kind in (EagerEngine, CapturedEngine):
        built = guides.make(
            guide, load("eight_schools").MODEL, seed=0, dtype=torch.float64, device="cuda"
        )
        engine = kind(built, objectives.make("elbo", particles=8), seed=0)
        bounds.append(engine.run(20, 0.01).bounds)
    assert engine._program.how == "cuda", engine.note
    # Rounding grows by the step.
    torch.testing.assert_close(bounds[1], bounds[0], rtol=1e-6, atol=1e-6)


@needs_cuda
def test_cuda_random_states_are_left_alone_and_seeds_repeat():
    fit = functools.partial(
        vi.fit, two_scales_model(), "mean_field", seed=3, device="cuda", steps=20, engine="eager"
    )
    torch.cuda.manual_seed(5)
    first, before = fit(), torch.cuda.get_rng_state()
    second = fit()
    assert list(first.losses) == list(second.losses)
    assert torch.equal(torch.cuda.get_rng_state(), before)


@needs_cuda
def test_nuts_runs_on_the_cpu_wherever_the_data_are():
    x, y = (value.cuda() for value in two_scales_model().args)
    model = vi.Model(two_scales_model().fn, x, y)
    with pytest.warns(match="R-hat|chains|effective"):
        draws = vi.nuts(model, chains=1, draws=4, tune=10, sampler="pyro", progress=False)
    assert draws["posterior"]["beta"].shape == (1, 4, 3)
