"""A Pyro model with its data and names: what is declared, read from files, checked, and evaluated.

`log_density` is the model as a batched density in unconstrained space, `data` streams of batches.
Guides and fits live elsewhere.
"""
