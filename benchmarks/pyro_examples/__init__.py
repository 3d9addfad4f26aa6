"""The models of Pyro's own examples and tutorials, run through the kit."""
