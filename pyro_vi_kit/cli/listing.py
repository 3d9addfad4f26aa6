"""``guides`` and ``objectives``: what can be named."""

from __future__ import annotations

from collections.abc import Mapping

import click

from pyro_vi_kit.cli.options import common_options, json_option
from pyro_vi_kit.cli.output import print_json


@click.command("guides")
@json_option
@common_options
def guides_command(as_json: bool) -> None:
    """List the guides, one line each."""
    from pyro_vi_kit import guides

    _print(guides.choices(), as_json)


@click.command("objectives")
@json_option
@common_options
def objectives_command(as_json: bool) -> None:
    """List the objectives, one line each."""
    from pyro_vi_kit import objectives

    _print(objectives.describe(), as_json)


def _print(described: Mapping[str, str], as_json: bool) -> None:
    if as_json:
        print_json(described)
        return
    width = max(map(len, described))
    for name, line in described.items():
        click.echo(f"{name:<{width}}  {line}")
