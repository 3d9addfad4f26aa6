"""Families by the support of each latent (Gamma, Beta, Dirichlet, von Mises), site by site."""
