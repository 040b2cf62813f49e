"""Prompts to measure with, for each kind of model: some to search plans on, others, unseen, to confirm them."""

import json
from functools import cache
from pathlib import Path

from imagegen.request import DataError


@cache
def _known() -> dict[str, dict[str, list[str]]]:
    return json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


def search_prompts(family: str) -> list[str]:
    """Return the prompts to search on."""
    return list(_known().get(family, _known()["photo"])["search"])


def confirm_prompts(family: str) -> list[str]:
    """Return thirty others, to confirm what a search found and to record references of."""
    return list(_known().get(family, _known()["photo"])["confirm"])


def training_prompts(family: str) -> tuple[str, ...]:
    """Return prompts to distil on: captions of the embedded model's own training, or any there are for other kinds."""
    file = Path(__file__).with_name(f"prompts-{family}.txt")
    return tuple(read_prompts(file)) if file.exists() else (*search_prompts(family), *confirm_prompts(family))


def read_prompts(path: str | Path) -> list[str]:
    """Read a text file of prompts, one a line; empty lines and those that begin with # are left out.

    Raises:
        DataError: it cannot be read, or holds none.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the prompts {str(path)!r}: {error}") from None
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise DataError(f"{str(path)!r} holds no prompts: write one a line")
    return found
