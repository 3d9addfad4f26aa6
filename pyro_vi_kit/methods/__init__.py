"""How parameters move."""

NAMES = ("auto", "lbfgs", "moments", "stochastic")
