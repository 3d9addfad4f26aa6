"""Normalizing flows over a Gaussian, and their layers."""
