"""Searches without noise: modes, L-BFGS on fixed draws, Laplace, Pathfinder, moments, CAVI."""
