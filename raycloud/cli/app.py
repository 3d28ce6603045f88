"""Entry point of ``raycloud <verb>``: runs the verb and turns errors into one line and an exit status."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any

_USER_ERRNOS = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EEXIST,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.ENOTEMPTY,
    errno.EPERM,
    errno.EROFS,
}
"""Errors of the operating system about a path that the user can fix, for example by giving another path."""
_INTERRUPTED = 130


def main(before: Sequence[str] = ()) -> None:
    """Run the command line and exit; an error is printed as one line.

    The exit status is 0 on success, 2 for an error that the user can fix in the command or in files, 130 after Ctrl-C,
    and 1 for any other error.

    Args:
        before: arguments put before those of the process.
    """
    options = None
    try:
        # Inside the try block, because Ctrl-C may also come while modules are imported.
        from raycloud.cli.verbs import RootOptions, run

        options = RootOptions()
        status = run([*before, *sys.argv[1:]], options)
        sys.stdout.flush()
        if status == _INTERRUPTED:
            _print_error("stopped")
    except SystemExit:
        raise
    except BrokenPipeError:  # the reader of the output, such as ``head``, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = 1
    except BaseException as error:
        status, line = _status_and_line(error)
        if options is not None and options.debug and status != _INTERRUPTED:
            traceback.print_exception(error)
        elif status == 1 and not hasattr(error, "exit_code"):
            line += " (--debug shows the traceback)"
        _print_error(line)
    if status == _INTERRUPTED:
        # Cleanup at exit may take a while: a second Ctrl-C ends the process at once, without a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(status)


def _status_and_line(error: BaseException) -> tuple[int, str]:
    """Return the exit status of an error and the line to print."""
    code: int | None = getattr(error, "exit_code", None)  # errors of this package, and typer's errors of usage
    if code is not None:
        return code, f"error: {_usage(error) if hasattr(error, 'format_message') else error}"
    if _is_interrupt(error):
        return _INTERRUPTED, "stopped"
    if isinstance(error, OSError) and error.errno is not None:
        line = f"error: {error.filename or 'input/output'}: {error.strerror or error}"
        return (2 if error.errno in _USER_ERRNOS else 1), line
    cause = getattr(error, "cause", None)  # the original error, if Ray wraps it in one whose text is a traceback
    error = cause if isinstance(cause, BaseException) else error
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return 1, f"error: {type(error).__name__}" + (f": {first}" if first else "")


def _usage(error: Any) -> str:
    """Describe a usage error and name the command that prints help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return "a command is missing"
    context = getattr(error, "ctx", None)
    hint = f" (see: {context.command_path} --help)" if context is not None else ""
    return " ".join(error.format_message().split()) + hint


def _is_interrupt(error: BaseException | None) -> bool:
    """Tell whether Ctrl-C caused an error: an interrupted import may end in an error of another type."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def _print_error(line: str) -> None:
    try:
        print(line, file=sys.stderr, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
