"""The command line: what each command is given and prints.

python -m elva_core run smoke
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from elva_core.cli import evaluate, use, workbook  # noqa: F401  their commands join the app
from elva_core.cli.options import app
from elva_core.experiments import chain, lock, stages

# what ends a command with one line
EXPECTED = (chain.ChainError, stages.MissingStageError, lock.LockedError, OSError, ValueError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status of one command: 1 for what went wrong, in one line; 2 for a wrong one; 130 interrupted."""
    try:
        status = _status(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # who reads has read enough, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if status == 130:
        print("interrupted", file=sys.stderr)
    return status


def _status(arguments: Sequence[str] | None) -> int:
    try:
        app(args=arguments)
    except SystemExit as end:
        return end.code or 0
    except EXPECTED as error:
        if isinstance(error, BrokenPipeError):
            raise
        known = isinstance(error, OSError) and error.filename is not None
        print(f"error: {f'{error.filename}: {error.strerror}' if known else error}", file=sys.stderr)
    return 1
