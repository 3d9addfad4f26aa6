"""How parameters move."""

NAMES = ("auto", "cavi", "lbfgs", "moments", "stochastic")
