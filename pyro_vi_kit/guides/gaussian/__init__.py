"""Families that are Gaussian in unconstrained space, points and Student-t among them."""
