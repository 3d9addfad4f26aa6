"""How parameters move."""

NAMES = ("auto", "lbfgs", "stochastic")
