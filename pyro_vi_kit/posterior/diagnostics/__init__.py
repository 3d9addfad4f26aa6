"""Whether to believe a fit: signals, the verdict and its words; and the model against the data.

Corrections that give another posterior are in `posterior.corrections`.
"""
