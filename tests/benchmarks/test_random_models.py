"""A hundred random models of the grammar; `python -m benchmarks.random_models --count 1000` has more."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_vi_kit as vi
from benchmarks.lib.grammar import LATENTS, OBSERVED, WRITES, Grammar
from benchmarks.random_models import compared, problem_of
from pyro_vi_kit.model.log_density import Density

COUNT, STEP = 100, 10


@pytest.mark.filterwarnings("ignore")  # of what random models are, mask and scale among it
@pytest.mark.parametrize("first", range(0, COUNT, STEP))
def test_the_density_is_that_of_plain_pyro(first, cache):
    for seed in range(first, first + STEP):
        # Recordings of every tenth; C and a file of one.
        assert not problem_of(seed, thorough=seed == 3, recorded=seed % 10 == 3)


def test_the_grammar_says_everything_that_it_can():
    words = "\n".join(str(Grammar(seed).program()) for seed in range(COUNT))
    for part in (*LATENTS, *OBSERVED, *WRITES, "obs_mask", "subsampled {'a'", "[b, a]", "states"):
        assert part in words


def test_a_disagreement_is_found(monkeypatch):
    """The comparison can fail: the oracle's model has other data than the density's."""
    programs = (Grammar(seed).program() for seed in range(COUNT))
    program = next(p for p in programs if all(v.is_floating_point() for v in p.data.values()))
    right = type(program).run

    def wrong(self, data, double):
        moved = {n: v * 0.9 + 0.1 if v.is_floating_point() else v for n, v in data.items()}
        return right(self, moved if double else data, double)

    monkeypatch.setattr(type(program), "run", wrong)
    assert "in Pyro's trace" in compared(program, thorough=False, recorded=False)


def test_a_scalar_site_under_a_scalar_mask_is_shown_or_hidden():
    """Found by seed 150: a file of such a model could not be written."""
    for mask in (torch.tensor(True), torch.tensor(False)):

        def model(y, mask=mask):
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=mask):
                pyro.sample("y", dist.Normal(b, 1.0), obs=y)

        density = Density(vi.Model(model, torch.tensor(0.5)))
        visits, _ = density.visits(density.block.unpack(torch.zeros(1, 1).double()))
        site = density.structure.sites["y"]
        assert bool(visits["y"].shown(site.batch_shape, site.event_shape)) == bool(mask)
