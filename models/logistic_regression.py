"""Logistic regression: is a breast tumour malignant, given 30 measurements of its cells?

Data: scikit-learn's breast-cancer set (Wolberg, Street and Mangasarian 1995), 569 patients, each
measurement standardised to mean 0 and standard deviation 1. scikit-learn codes malignant as 0;
here y = 1 means malignant.

What is hard: the measurements are nearly collinear (radius, perimeter and area correlate above
0.98) and separate the classes almost perfectly, so the likelihood leaves whole directions to the
prior: strong posterior correlations among 31 dimensions, and some skewness.

The patients are exchangeable given the coefficients, so the plate may be subsampled.
"""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_breast_cancer

import pyro_vi_kit as vi


def logistic_regression(X, y=None):
    beta = pyro.sample("beta", dist.Normal(X.new_zeros(X.shape[-1]), 1.0).to_event(1))
    intercept = pyro.sample("intercept", dist.Normal(0.0, 5.0))
    with pyro.plate("patient", len(X)) as index:
        X = X[index]
        # X @ beta, in a form that also takes the [K, 1, D] of Pyro's vectorised particles.
        effect = (beta @ X.T).reshape(beta.shape[:-2] + X.shape[:1])
        malignant = dist.Bernoulli(logits=intercept + effect)
        return pyro.sample("y", malignant, obs=None if y is None else y[index])


def load():
    data: Any = load_breast_cancer()
    dtype = torch.get_default_dtype()
    X = (data.data - data.data.mean(0)) / data.data.std(0)
    y = 1 - data.target
    return torch.tensor(X, dtype=dtype), torch.tensor(y, dtype=dtype), data.feature_names.tolist()


X, Y, FEATURES = load()

MODEL = vi.Model(
    logistic_regression,
    X,
    Y,
    dims={"beta": ["feature"]},
    coords={"feature": FEATURES},
)
