"""The command line, ``vi-kit``."""

from pyro_vi_kit.cli.app import main

__all__ = ["main"]
