"""`omni-fast`: the command line. The commands are in `commands/`.

Exit codes: 0 done, 2 a mistake in what was given, 1 a failure, 130 stopped by the user. The first two print one message and no
traceback; a traceback is a bug of ours.
"""

from __future__ import annotations

import sys

import typer

from omni_fast.commands import check, engine, say, scale, stderr, study, train
from omni_fast.errors import RunError, UserError

app = typer.Typer(
    help="Multi-task GRPO: hybrid rewards, tasks in the order that measured backward transfer says forgets least.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for part in (train.app, study.app, check.app, scale.app):
    app.add_typer(part)
app.add_typer(engine.app, name="engine")


def main() -> None:
    """Entry point: one message and an exit code for what is not a bug."""
    try:
        app()
    except (UserError, RunError) as error:
        say(f"{'error: ' if error.exit_code != 130 else ''}{error}", to=stderr)
        sys.exit(error.exit_code)
    except OSError as error:  # what no caller could say more about: a full or broken disk
        where = f" ({error.filename})" if error.filename else ""
        say(f"error: {error.strerror or error}{where}; nothing saved is lost, the same command resumes", to=stderr)
        sys.exit(1)
