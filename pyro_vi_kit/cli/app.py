"""``vi-kit``: the commands, and what every one of them does with errors.

Nothing heavy is imported here or by the modules that define the commands, so that ``--help`` is
quick; each command imports what it runs.
"""

from __future__ import annotations

import errno
import traceback
from typing import Any

import click

from pyro_vi_kit.cli.listing import estimators_command, guides_command, objectives_command
from pyro_vi_kit.cli.many_fits import bench_command, compare_command
from pyro_vi_kit.cli.one_model import calibrate_command, check_command, fit_command, nuts_command
from pyro_vi_kit.cli.options import common_options, debugging
from pyro_vi_kit.cli.output import in_options, warnings_as_messages
from pyro_vi_kit.core.errors import ViError
from pyro_vi_kit.core.stopping import TERMINATED, sigterm_as_interrupt
from pyro_vi_kit.core.version import __version__

FAILED, WRONG_REQUEST, INTERRUPTED = 1, 2, 130

_HELP = """Variational inference for Pyro models.

A MODEL is a Python file with one MODEL = vi.Model(function, *data).

Results go to stdout, progress and messages to stderr.

Exit codes: 0 done; 1 a run failed; 2 the request was wrong; 3 fit finished, but its verdict is
"reject", the chains of nuts did not converge, or calibrate's verdict is "not calibrated"; 130
interrupted; 143 terminated.
"""


class Commands(click.Group):
    """The commands, with one message and an exit code for whatever one of them raises."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        with sigterm_as_interrupt() as received:
            try:
                return self._run(ctx)
            except click.exceptions.Exit as end:
                if received and end.exit_code == INTERRUPTED:
                    click.echo("terminated (SIGTERM)", err=True)
                    ctx.exit(TERMINATED)
                raise

    def _run(self, ctx: click.Context) -> Any:
        try:
            with warnings_as_messages():
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except (KeyboardInterrupt, click.Abort) as error:
            _explain(ctx, error, "interrupted")
            ctx.exit(INTERRUPTED)
        except ViError as error:
            called = self.commands.get(ctx.invoked_subcommand or "", self)
            _explain(ctx, error, f"error: {in_options(str(error), called)}")
            ctx.exit(WRONG_REQUEST)
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # click ends quietly when the reader of a pipe has gone
            words = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            _explain(ctx, error, f"error: {words} (unexpected; --debug shows where)")
            ctx.exit(FAILED)


def _explain(ctx: click.Context, error: BaseException, message: str) -> None:
    if debugging(ctx):
        click.echo("".join(traceback.format_exception(error)), err=True, nl=False)
    click.echo(message, err=True)


@click.group(
    "vi-kit",
    cls=Commands,
    help=_HELP,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "show_default": True,
    },
)
@click.version_option(__version__, prog_name="vi-kit")
@common_options
def main() -> None:
    """Run the command line."""


for _command in (
    check_command,
    fit_command,
    nuts_command,
    compare_command,
    bench_command,
    calibrate_command,
    guides_command,
    objectives_command,
    estimators_command,
):
    main.add_command(_command)
