"""Mixtures of Gaussians, and gradients of their draws."""
