"""A fit beside something else: NUTS, other fits, simulated data, a whole suite of models."""
