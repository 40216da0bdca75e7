"""Two kinds of failure, told apart by exit code.

`UserError` (exit 2): the input was wrong; the message names what, where and the remedy.
`RunError` (exit 1): the input was fine and the run still could not go on.
The command line prints either as one message without a traceback; anything else is a bug and keeps its traceback.
"""


class UserError(Exception):
    """A mistake in what the user gave: config, data, path, option."""

    exit_code = 2


class RunError(Exception):
    """A failure while running: disk full, lost server, diverged loss."""

    exit_code = 1
