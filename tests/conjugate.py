"""Linear regression with known noise and a normal prior, in closed form: a test oracle."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal


def exact(X: Tensor, y: Tensor, prior_sd: float, noise_sd: float) -> tuple[Tensor, Tensor, float]:
    """Posterior mean [D], covariance [D, D] and log evidence of y ~ N(X beta, noise_sd).

    ``X`` is [N, D] (or [N], one column) and beta ~ N(0, prior_sd). Gelman et al., Bayesian Data
    Analysis, section 14.8; the evidence is the density of y ~ N(0, prior_sd^2 X X' + noise_sd^2 I).
    """
    X, y = X.double(), y.double()
    X = X.reshape(len(X), -1)
    N, D = X.shape
    precision = X.T @ X / noise_sd**2 + torch.eye(D, dtype=X.dtype) / prior_sd**2
    covariance = torch.linalg.inv(precision)
    mean = covariance @ (X.T @ y) / noise_sd**2
    marginal = prior_sd**2 * X @ X.T + noise_sd**2 * torch.eye(N, dtype=X.dtype)
    log_evidence = MultivariateNormal(torch.zeros_like(y), marginal).log_prob(y)
    return mean, covariance, float(log_evidence)
