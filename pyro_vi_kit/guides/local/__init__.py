"""A distribution for every datum: stored row by row, or encoded from what the datum holds."""
