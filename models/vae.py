"""A variational autoencoder's model: handwritten digits from an 8-dimensional code.

Data: scikit-learn's digits (1,797 images of 8 x 8 pixels, intensities 0 to 16). Intensity / 16 is
the mean of a Bernoulli pixel; the binary images are drawn from these means once, with NumPy's
``default_rng(0)``, so that the likelihood is a proper one. The same generator then shuffles them
into 1,437 digits to train on (MODEL) and 360 held out (TEST).

What is hard: the codes are local latents, one for each digit (11,496 numbers), so the guide has to
be amortized or as large as the data; the decoder's 4,736 weights are trained along with it; and
the posterior of a code is not Gaussian.

The decoder's weights start from a fixed seed and belong to the model, not to its arguments: the
function finds them also when it is called with other digits.
"""

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_digits
from torch import nn

import pyro_vi_kit as vi

LATENT = 8
HIDDEN = 64
PIXELS = 64
TRAIN = 1437


def make_decoder(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, PIXELS))


DECODER = make_decoder()


def vae(x):
    decoder = pyro.module("decoder", DECODER)
    with pyro.plate("digit", len(x)) as index:
        z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1))
        pixels = dist.Bernoulli(logits=decoder(z)).to_event(1)
        return pyro.sample("x", pixels, obs=x[index])


def load(seed=0):
    rng = np.random.default_rng(seed)
    digits: Any = load_digits()
    means = digits.data / 16
    binary = rng.random(means.shape) < means
    binary = torch.tensor(binary[rng.permutation(len(binary))], dtype=torch.get_default_dtype())
    return binary[:TRAIN], binary[TRAIN:]


DIGITS, TEST = load()

MODEL = vi.Model(vae, DIGITS, dims={"z": ["latent"], "x": ["pixel"]})
