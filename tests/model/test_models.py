"""Every file in models/ is a plain Pyro model: both dtypes, vectorised, vmapped, predicting."""

import importlib.util
import inspect
from pathlib import Path

import pyro
import pytest
import torch
from conjugate import exact
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from pyro.poutine.util import site_is_subsample
from torch.distributions import MultivariateNormal

import pyro_vi_kit as vi

pytestmark = pytest.mark.usefixtures("own_param_store")

MODELS = Path(__file__).parents[2] / "models"
NAMES = sorted(path.stem for path in MODELS.glob("*.py"))
NEEDS = {
    "sklearn": {"logistic_regression", "vae"},
    "statsmodels": {"poisson_glm", "gp_regression", "stochastic_volatility"},
}
# Prime and no size of the data, so that a batch dimension cannot be mistaken for one of theirs.
K = 3


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@pytest.fixture
def float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def load(name):
    for package, names in NEEDS.items():
        if name in names:
            pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location(f"model_file_{name}", MODELS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trace(model, seed=0, values=None):
    pyro.set_rng_seed(seed)
    conditioned = poutine.condition(model, data=values or {})
    return poutine.trace(conditioned).get_trace()


def latent_values(model, seed):
    return {
        name: site["value"].detach()
        for name, site in trace(model, seed).nodes.items()
        if site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
    }


def stacked_draws(model):
    """K prior draws, each as a dict of sites and all of them stacked along a new first axis."""
    draws = [latent_values(model, seed) for seed in range(K)]
    return draws, {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}


@pytest.mark.parametrize("name", NAMES)
def test_a_file_says_what_it_is_and_changes_nothing_on_import(name):
    rng, default = torch.get_rng_state(), torch.get_default_dtype()
    module = load(name)
    assert isinstance(module.MODEL, vi.Model)
    assert "Data: " in module.__doc__
    assert "What is hard: " in module.__doc__
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.get_default_dtype() is default
    assert not pyro.get_param_store().keys()


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_lists_it(name):
    assert f"[{name}]({name}.py)" in (MODELS / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_names_fit_the_sites(name):
    model = load(name).MODEL
    nodes = trace(model).nodes
    plates = {frame.name: frame.size for site in nodes.values() for frame in stack(site)}
    for site, dims in model.dims.items():
        assert len(dims) == nodes[site]["fn"].event_dim
        sizes = dict(zip(dims, nodes[site]["value"].shape[-len(dims) :], strict=True))
        plates.update(sizes)
    for dim, labels in model.coords.items():
        assert len(labels) == plates[dim]


def stack(site):
    return site.get("cond_indep_stack", ())


@pytest.mark.parametrize("name", NAMES)
def test_the_log_joint_is_finite_in_both_dtypes(name, dtype):
    model = load(name).MODEL
    nodes = trace(model)
    log_joint = nodes.log_prob_sum()
    tensors = [argument for argument in model.args if isinstance(argument, torch.Tensor)]
    assert all(tensor.dtype is dtype for tensor in tensors)
    assert log_joint.dtype is dtype
    assert torch.isfinite(log_joint)


# torch's Multinomial assigns through a mask, which vmap refuses: the package has another way for it.
NOT_FOR_VMAP = ("topic_model",)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NOT_FOR_VMAP])
def test_vmap_agrees_with_a_loop(name, float64):
    model = load(name).MODEL
    draws, stacked = stacked_draws(model)

    def log_joint(values):
        return trace(model, values=values).log_prob_sum()

    expected = torch.stack([log_joint(draw) for draw in draws])
    with pyro.validation_enabled(False):
        batched = torch.func.vmap(log_joint, randomness="different")(stacked)
    # Sums of at most 10^5 terms in float64.
    torch.testing.assert_close(batched, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_vectorised_particles_agree_with_a_loop(name, float64):
    model = load(name).MODEL
    draws, stacked = stacked_draws(model)
    nodes = trace(model).nodes
    for site, values in stacked.items():
        if not any(frame.vectorized for frame in stack(nodes[site])):
            stacked[site] = values.unsqueeze(1)

    def vectorised():
        with pyro.plate("particles", K, dim=-2):
            return model()

    vectorised_nodes = trace(vectorised, values=stacked)
    vectorised_nodes.compute_log_prob()
    log_joint = torch.zeros(K)
    for site in vectorised_nodes.nodes.values():
        if site["type"] == "sample" and not site_is_subsample(site):
            log_joint = log_joint + site["log_prob"].sum(-1)
    expected = torch.stack([trace(model, values=draw).log_prob_sum() for draw in draws])
    torch.testing.assert_close(log_joint, expected, rtol=1e-10, atol=1e-10)


# A mixture as a latent: Pyro's own guides have no map onto its support.
NOT_FOR_AUTOGUIDES = ("gaussian_mixture_target",)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NOT_FOR_AUTOGUIDES])
def test_it_runs_in_a_stock_svi(name):
    model = load(name).MODEL
    pyro.set_rng_seed(0)
    nodes = trace(model).nodes.values()
    discrete = [n["name"] for n in nodes if is_discrete_latent(n)]
    guide = AutoNormal(poutine.block(model.fn, hide=discrete))
    loss = TraceEnum_ELBO if discrete else Trace_ELBO
    elbo = loss(num_particles=K, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(config_enumerate(model.fn), guide, Adam({"lr": 0.01}), loss=elbo)
    losses = torch.tensor([svi.step(*model.args) for _ in range(2)])
    assert torch.isfinite(losses).all()


def is_discrete_latent(site):
    if site["type"] != "sample" or site["is_observed"] or site_is_subsample(site):
        return False
    return site["fn"].support.is_discrete


# The first predicts from codes, the second has a site for each day, and the others have no data.
WITHOUT_Y = ("vae", "hmm", "funnel", "banana", "gaussian_mixture_target", "kl_direction")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WITHOUT_Y])
def test_it_predicts_without_the_outcome(name, dtype):
    model = load(name).MODEL
    assert list(inspect.signature(model.fn).parameters)[-1] == "y"
    *inputs, y = model.args
    site = trace(model.with_args(*inputs)).nodes["y"]
    assert not site["is_observed"]
    assert site["value"].shape == y.shape
    assert site["value"].dtype is dtype


CONJUGATE = ["gaussian_regression", "gaussian_regression_2d", "linear_regression"]


@pytest.mark.parametrize("name", CONJUGATE)
def test_the_closed_form_satisfies_bayes_rule(name, float64):
    """log p(z, y) = log p(z | y) + log p(y) at any z."""
    module = load(name)
    X, y = module.MODEL.args
    if name == "gaussian_regression_2d":
        X = torch.stack([torch.ones_like(X), X], -1)
    mean, covariance, log_evidence = exact(X, y, module.PRIOR_SD, module.NOISE_SD)
    posterior = MultivariateNormal(mean, covariance)
    for seed in range(3):
        values = latent_values(module.MODEL, seed)
        z = torch.cat([value.reshape(-1) for value in values.values()])
        log_joint = trace(module.MODEL, values=values).log_prob_sum()
        expected = posterior.log_prob(z) + log_evidence
        torch.testing.assert_close(log_joint, expected, rtol=1e-9, atol=1e-9)


def test_both_eight_schools_are_one_posterior(float64):
    centred, non_centred = load("eight_schools_centered"), load("eight_schools")
    values = latent_values(non_centred.MODEL, seed=0)
    theta = values["mu"] + values["tau"] * values["theta_trans"]
    centred_values = {"mu": values["mu"], "tau": values["tau"], "theta": theta}
    log_jacobian = len(theta) * values["tau"].log()
    torch.testing.assert_close(
        trace(centred.MODEL, values=centred_values).log_prob_sum() + log_jacobian,
        trace(non_centred.MODEL, values=values).log_prob_sum(),
    )


def test_malignant_is_one():
    """212 of the 569 tumours are malignant, and they are the large ones."""
    module = load("logistic_regression")
    assert int(module.Y.sum()) == 212
    radius = module.X[:, module.FEATURES.index("mean radius")]
    assert radius[module.Y == 1].mean() > radius[module.Y == 0].mean()


def test_the_vae_finds_its_decoder_on_other_digits():
    module = load("vae")
    assert len(module.DIGITS) == 1437
    assert len(module.TEST) == 360
    nodes = trace(module.MODEL.with_args(module.TEST)).nodes
    assert nodes["z"]["value"].shape == (360, 8)
    assert sum(name.startswith("decoder$$$") for name in nodes) == 4
    assert torch.equal(load("vae").DIGITS, module.DIGITS)
    assert torch.equal(load("vae").DECODER[0].weight, module.DECODER[0].weight)
