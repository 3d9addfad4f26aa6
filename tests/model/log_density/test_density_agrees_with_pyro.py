"""The log weights of a Density are those of Pyro's own traces, for every model and guide."""

import importlib.util
from pathlib import Path

import pyro
import pytest
import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites

from pyro_vi_kit import guides
from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.guides import Draw
from pyro_vi_kit.model.log_density import Density

pytestmark = pytest.mark.usefixtures("float64", "own_param_store")

MODELS = Path(__file__).parents[3] / "models"
NAMES = sorted(path.stem for path in MODELS.glob("*.py"))
# A dense factor of the covariance has D^2 numbers.
DENSE = set(guides.names()) - {"delta", "mean_field", "low_rank", "amortized"}
LARGEST_DENSE = 500
# With full covariances for each component.
LARGEST_MIXTURE = 200


def load(name):
    if name in ("logistic_regression", "vae"):
        pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location(f"density_model_{name}", MODELS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MODEL


def pyro_log_weight(model, guide):
    """log p - log q of one draw by Pyro's traces, and the guide's trace."""
    guide_trace = poutine.trace(guide).get_trace(*model.args, **model.kwargs)
    replayed = poutine.replay(model.fn, trace=guide_trace)
    model_trace = poutine.trace(replayed).get_trace(*model.args, **model.kwargs)
    guide_trace.compute_log_prob()
    log_q = prune_subsample_sites(guide_trace).log_prob_sum()
    log_p = prune_subsample_sites(model_trace).log_prob_sum()
    return log_p - log_q, guide_trace


def same_draw(guide, trace):
    """What the guide's trace drew, as the guide's own `draw` gives it, and the minibatch."""
    z, shared, local, index = {}, torch.zeros(1), {}, {}
    for block in guide.blocks:
        node = trace.nodes[f"{guide._pyro_name}_{block.name}"]
        z |= block.unpack(node["value"].detach()[None])
        log_q = node["fn"].log_prob(node["value"]).detach()[None]
        if block.plate is None:
            shared = shared + log_q
        else:
            local[block.plate.name] = log_q
            index[block.plate.name] = trace.nodes[block.plate.name]["value"]
    return Draw(z, shared, local), index


def guides_for(density):
    """The registry's guides that fit the model, untrained."""
    for name in guides.names():
        if name in DENSE and density.dim > LARGEST_DENSE:
            continue
        if name == "mixture" and density.dim > LARGEST_MIXTURE:
            continue
        if name == "amortized" and not any(site.plates for site in density.latents):
            continue
        yield name


# Trace_ELBO does not sum out discrete sites: test_enumeration.py compares them with what does.
DISCRETE = ("mixture_clusters", "hmm", "kl_direction")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in DISCRETE])
def test_log_weights_of_every_guide(name):
    model = load(name)
    density = Density(model)
    tried = []
    for guide_name in guides_for(density):
        try:
            guide = guides.make(guide_name, density)
        except OptionError:
            # Latents in a plate that holds no data: nothing for an encoder to read.
            assert guide_name == "amortized"
            continue
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        expected, trace = pyro_log_weight(model, guide)
        draw, index = same_draw(guide, trace)
        with torch.no_grad():
            found = guide.weigh(draw, index=index).joint()[0]
        if name == "missing_data":
            # Where a row was observed, its latent stands idle and gets a density of its own.
            idle = draw.z["y_unobserved"][0][model.args[1] > 0]
            expected = expected + torch.distributions.Normal(0.0, 1.0).log_prob(idle).sum()
        # Sums of up to 10^5 terms in float64, in another order.
        torch.testing.assert_close(found, expected.detach(), rtol=1e-10, atol=1e-10)
        tried.append(guide_name)
    assert {"delta", "mean_field"} <= set(tried)


@pytest.mark.parametrize("batch_size", [1, 100])
def test_log_weights_of_a_minibatch(batch_size):
    model = load("vae")
    density = Density(model)
    guide = guides.make("amortized", density)
    guide.batch_size = batch_size
    pyro.set_rng_seed(1)
    expected, trace = pyro_log_weight(model, guide)
    draw, index = same_draw(guide, trace)
    assert index["digit"].shape == (batch_size,)
    weights = guide.weigh(draw, index=index)
    assert weights.scale == {"digit": 1437 / batch_size}
    torch.testing.assert_close(weights.joint()[0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_the_particles_of_a_draw_are_those_of_single_draws(name):
    density = Density(load(name))
    guide = guides.make("mean_field", density)
    with torch.no_grad():
        draw = guide.draw(3)
        together = guide.weigh(draw).joint()
        for k in range(3):
            one = Draw(
                {site: value[k : k + 1] for site, value in draw.z.items()},
                draw.shared[k : k + 1],
                {plate: rows[k : k + 1] for plate, rows in draw.local.items()},
            )
            torch.testing.assert_close(guide.weigh(one).joint()[0], together[k])
