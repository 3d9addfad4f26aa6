"""Stochastic steps: their schedules, epochs, and when they stop."""
