"""The benchmark's posteriors have exactly the density of their references."""

import importlib.util
import json
import math
import re
from pathlib import Path

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.util import site_is_subsample
from torch.distributions import biject_to

import pyro_vi_kit as vi
from pyro_vi_kit.core.errors import FileError
from pyro_vi_kit.model.log_density import Density

pytestmark = pytest.mark.usefixtures("float64")

FILES = Path(__file__).parents[2] / "benchmarks" / "posteriordb"
NAMES = sorted(path.stem for path in FILES.glob("[a-z]*.py"))
K = 3  # prime, and the size of no data


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def module(name, posteriordb):
    posteriordb(posterior_name(name))
    return load(FILES / f"{name}.py")


@pytest.fixture
def reference(name, posteriordb):
    path = posteriordb(posterior_name(name)) / "reference.json"
    return json.loads(path.read_text(encoding="utf-8"))


def posterior_name(name):
    """The reference's name, read without running the file."""
    return re.search(r'^POSTERIOR = "(.*)"', (FILES / f"{name}.py").read_text(), re.M)[1]


def load(path):
    spec = importlib.util.spec_from_file_location(f"posteriordb_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def latent_sites(model):
    """The latent sites and their distributions, from a run with every latent at its transform of 0.

    Sampling would not do: some priors are improper.
    """

    def at_zero(site):
        bijection = biject_to(site["fn"].support)
        return bijection(torch.zeros(bijection.inverse_shape(site["fn"].shape())))

    with InitMessenger(at_zero):
        nodes = poutine.trace(model).get_trace().nodes
    return {
        name: site["fn"]
        for name, site in nodes.items()
        if site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
    }


def unpack(model, order, z):
    """Cut z at the latent sites in ``order``: constrained values, and the log Jacobian."""
    latent = latent_sites(model)
    values, log_jacobian, start = {}, torch.zeros(()), 0
    for site in order:
        fn = latent[site]
        bijection = biject_to(fn.support)
        shape = bijection.inverse_shape(fn.shape())
        stop = start + math.prod(shape)
        unconstrained = z[start:stop].reshape(shape)
        values[site] = bijection(unconstrained)
        log_jacobian += bijection.log_abs_det_jacobian(unconstrained, values[site]).sum()
        start = stop
    assert start == len(z)
    return values, log_jacobian


def condition(model, values):
    return poutine.trace(poutine.condition(model, data=values)).get_trace()


def test_there_are_eleven():
    assert len(NAMES) == 11


def test_the_log_joint_at_the_reference_mean_is_the_references(module, reference):
    z = torch.tensor(reference["unconstrained"]["mean"])
    values, log_jacobian = unpack(module.MODEL, module.UNCONSTRAINED, z)
    log_joint = condition(module.MODEL, values).log_prob_sum() + log_jacobian
    # 5e-7 of it is the step size of the ODE's solver; the others agree to rounding.
    expected = reference["log_joint_at_reference_mean_unconstrained"]
    assert float(log_joint) == pytest.approx(expected, rel=0, abs=1e-6)


def test_the_density_at_the_reference_mean_is_the_references(module, reference):
    z = torch.tensor(reference["unconstrained"]["mean"])
    values, _ = unpack(module.MODEL, module.UNCONSTRAINED, z)
    density = Density(module.MODEL)
    log_joint = density.log_prob(density.unconstrain(values).unsqueeze(0))
    expected = reference["log_joint_at_reference_mean_unconstrained"]
    assert float(log_joint) == pytest.approx(expected, rel=0, abs=1e-6)


def test_the_sites_are_the_references_parameters(module, reference):
    assert set(latent_sites(module.MODEL)) == set(module.UNCONSTRAINED)
    z = torch.tensor(reference["unconstrained"]["mean"])
    values, _ = unpack(module.MODEL, module.UNCONSTRAINED, z)
    nodes = condition(module.MODEL, values).nodes
    for parameter in reference["parameters"]:
        site, entry = re.fullmatch(r"(\w+)(?:\[(\d+)\])?", parameter).groups()
        value = nodes[site]["value"]
        assert value.dim() == (entry is not None)
        assert entry is None or int(entry) <= len(value)


def test_dims_name_events(module, reference):
    z = torch.tensor(reference["unconstrained"]["mean"])
    values, _ = unpack(module.MODEL, module.UNCONSTRAINED, z)
    nodes = condition(module.MODEL, values).nodes
    for site, dims in module.MODEL.dims.items():
        assert len(dims) == nodes[site]["fn"].event_dim
        for dim, size in zip(dims, nodes[site]["value"].shape[-len(dims) :], strict=True):
            assert len(module.MODEL.coords.get(dim, range(size))) == size


@pytest.fixture
def draws(module, reference):
    """K points around the reference mean, constrained."""
    mean, sd = (torch.tensor(reference["unconstrained"][key]) for key in ("mean", "sd"))
    generator = torch.Generator().manual_seed(0)
    points = mean + 0.5 * sd * torch.randn(K, len(mean), generator=generator)
    return [unpack(module.MODEL, module.UNCONSTRAINED, z)[0] for z in points]


def test_vmap_agrees_with_a_loop(module, draws):
    def log_joint(values):
        return condition(module.MODEL, values).log_prob_sum()

    expected = torch.stack([log_joint(draw) for draw in draws])
    stacked = {site: torch.stack([draw[site] for draw in draws]) for site in draws[0]}
    with pyro.validation_enabled(False):
        batched = torch.func.vmap(log_joint)(stacked)
    torch.testing.assert_close(batched, expected, rtol=1e-10, atol=1e-10)


def test_vectorised_particles_agree_with_a_loop(module, draws):
    traces = [condition(module.MODEL, draw) for draw in draws]
    frames = [
        frame for site in traces[0].nodes.values() for frame in site.get("cond_indep_stack", ())
    ]
    nesting = max((-frame.dim for frame in frames), default=0)

    def batch(site):
        value = torch.stack([draw[site] for draw in draws])
        event_dim = traces[0].nodes[site]["fn"].event_dim
        own = value.shape[1 : value.dim() - event_dim]
        event = value.shape[value.dim() - event_dim :]
        return value.reshape(K, *[1] * (nesting - len(own)), *own, *event)

    def vectorised():
        with pyro.plate("particles", K, dim=-1 - nesting):
            return module.MODEL()

    nodes = condition(vectorised, {site: batch(site) for site in draws[0]})
    nodes.compute_log_prob()
    log_joint = torch.zeros(K)
    for site in nodes.nodes.values():
        if site["type"] == "sample" and not site_is_subsample(site):
            log_joint = log_joint + site["log_prob"].reshape(K, -1).sum(-1)
    expected = torch.stack([single.log_prob_sum() for single in traces])
    torch.testing.assert_close(log_joint, expected, rtol=1e-10, atol=1e-10)


def test_it_runs_with_float32_defaults(module, reference):
    """float64 data beside float32 literals: nothing but a few 1e-6 of rounding."""
    z = torch.tensor(reference["unconstrained"]["mean"])
    values, _ = unpack(module.MODEL, module.UNCONSTRAINED, z)
    expected = condition(module.MODEL, values).log_prob_sum()
    torch.set_default_dtype(torch.float32)
    log_joint = condition(module.MODEL, values).log_prob_sum()
    torch.testing.assert_close(log_joint.double(), expected, rtol=0, atol=1e-5)


def test_an_absent_folder_is_named_with_its_remedy(monkeypatch, tmp_path):
    monkeypatch.setenv("PYRO_VI_KIT_POSTERIORDB", str(tmp_path))
    with pytest.raises(FileError, match="set PYRO_VI_KIT_POSTERIORDB to the folder"):
        load(FILES / "sblri_blr.py")


def test_each_is_a_model_file(module):
    assert isinstance(module.MODEL, vi.Model)
    assert module.MODEL.name == module.POSTERIOR
    assert "What is hard: " in module.__doc__
    readme = (FILES / "README.md").read_text(encoding="utf-8")
    assert f"| {Path(module.__file__).stem} |" in readme
