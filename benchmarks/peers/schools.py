"""The data of models/eight_schools.py, for those that load neither torch nor this package."""

SIGMA = [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]
Y = [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]

# `affine_coupling` with its defaults, for those that build it themselves.
LAYERS, WIDTH = 8, 32
