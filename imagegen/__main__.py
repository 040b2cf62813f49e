"""`imagegen` and `python -m imagegen`: the command line's own process."""

import atexit
import contextlib
import os
import sys

from imagegen.startup import stop_as_by_control_c, stopped_at_once


def main() -> None:
    """Run the command line and leave with its exit code."""
    # Libraries' own notices would break "one line on stderr"; a user's setting wins.
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    stop_as_by_control_c()
    with stopped_at_once():
        from imagegen import cli

    leave(cli.run(sys.argv[1:]))


def leave(code: int) -> None:
    """End the process now: taking a loaded torch apart piece by piece takes most of a second."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a closed pipe has nobody to tell
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
