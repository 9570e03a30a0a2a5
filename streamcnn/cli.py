"""The command line: `streamcnn`, also `python -m streamcnn`.

The result of a command goes to standard output, progress, notices and errors to standard error; `--json` prints one object on standard
output, and all that is for people on standard error. Exit codes: 0 done, 1 an error of ours in one clear line, 2 usage, 130 interrupted
and resumable.
"""

import argparse
import errno
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from streamcnn.arguments import build_parser, parse
from streamcnn.errors import StreamCNNError

Command = Callable[[argparse.Namespace], dict[str, Any]]
# where commands are that are not in `commands`
_MODULES = dict.fromkeys(("verify", "info", "report"), "upkeep") | dict.fromkeys(("demo", "reproduce", "bench", "warmup"), "tryouts")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started this, or a Windows program without a console
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    parsed = parse(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # as standard error: a name that it has no letters for must not end a run
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    logging.getLogger("streamcnn").setLevel(logging.INFO)
    try:
        # numba and scikit-learn take a second to import, which --help should not
        from streamcnn.progress import interruptible

        command: Command = getattr(import_module(f"streamcnn.{_MODULES.get(parsed.command, 'commands')}"), parsed.command)
        with interruptible(), warnings.catch_warnings():
            warnings.showwarning = _show_warning
            result = command(parsed)
            if parsed.json:
                sys.stdout.write(json.dumps(result) + "\n")
            sys.stdout.flush()
    except StreamCNNError as error:
        sys.stderr.write(f"streamcnn: {error}\n")
        return 1
    except KeyboardInterrupt as error:
        sys.stderr.write(f"streamcnn: {str(error) or 'interrupted'}\n")
        return 130
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        # the reader of standard output has gone, as `| head` does, or its disk is full; others name their file
        if error.errno == errno.ENOSPC:
            sys.stderr.write("streamcnn: standard output cannot be written (its disk is full): make room there\n")
        # what is left to write would be complained of at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    sys.stderr.write(f"streamcnn: warning: {message}\n")


__all__ = ["build_parser", "main"]
