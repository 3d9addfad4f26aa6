"""What everything else stands on: errors, contracts, options, process-wide state, files, progress.

Nothing in here knows a model, a guide or a posterior.
"""
