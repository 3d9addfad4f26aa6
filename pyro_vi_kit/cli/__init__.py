"""The command line, ``vi-kit``: options, messages and exit codes around the functions of the package.

A command does nothing that a user of `pyro_vi_kit` could not do.
"""

from pyro_vi_kit.cli.app import main

__all__ = ["main"]
