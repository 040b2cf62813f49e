"""The shell's edge: `imagegen COMMAND`. Knows nothing of torch until a command needs a model.

Exit codes: 0 done, 1 a check said no, 2 bad use (one line on stderr), 130 stopped by Ctrl-C or SIGTERM.
"""

import difflib
import json
import sys
from collections.abc import Sequence
from typing import Any

import typer

from imagegen.cli import batches, models, pictures, plans, serving, training
from imagegen.cli.shell import CheckFailed, app
from imagegen.request import FOREIGN_NAMES, Error
from imagegen.startup import STOPPED

# Options in other tools' words, by the option that means the same here.
FOREIGN_OPTIONS = {
    "num_steps": "--steps",
    "num_images": "--num",
    "negative_prompt": "--negative",
    "width and height": "--size WxH",
    "width": "--size WxH",
    "height": "--size WxH",
}


# Typer carries its own copy of click: the base of its errors is reached through a public one.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; every error is one line on stderr."""
    as_json = "--json" in arguments
    try:
        left_with = app(args=list(arguments), standalone_mode=False)
    except CheckFailed:
        return 1
    except (KeyboardInterrupt, typer.Abort):
        return _fail("stopped", as_json, STOPPED)
    except UsageError as error:
        given = getattr(error, "option_name", None)  # an unknown option names itself
        return _fail(_explain_option(given) if type(error).__name__ == "NoSuchOption" and given else _say(error), as_json)
    except Error as error:
        return _fail(str(error), as_json)
    except OSError as error:
        return _fail(f"{error.strerror or error}: {error.filename or 'no file named'}", as_json)
    if left_with == STOPPED:  # Typer turns Ctrl-C into this code
        return _fail("stopped", as_json, STOPPED)
    return left_with if isinstance(left_with, int) else 0


def _say(error: Any) -> str:
    """Return a usage error's message; a command group without a command prints its help as its message."""
    message = error.format_message()
    return message if message.strip() else "no command given: see --help"


def _fail(message: str, as_json: bool, code: int = 2) -> int:
    line = " ".join(message.split())
    if as_json:
        print(json.dumps({"error": line}))
    print(f"imagegen: {line}", file=sys.stderr)
    return code


def _explain_option(given: str) -> str:
    """Say what an unknown option is called here."""
    name = given.lstrip("-").replace("-", "_")
    setting = FOREIGN_NAMES.get(name, name)
    options = ("seed", "num", "steps", "guidance", "size", "scheduler", "negative", "image", "strength", "mask", "out")
    if setting in FOREIGN_OPTIONS or setting in options:
        return f"no option {given}: it is {FOREIGN_OPTIONS.get(setting, '--' + setting)} here"
    near = difflib.get_close_matches(name, options, n=1)
    return f"no option {given}: did you mean --{near[0]}?" if near else f"no option {given}: see --help"


__all__ = ["app", "batches", "models", "pictures", "plans", "run", "serving", "training"]
