"""What a picture may be called: captions with article, name or description, tags, style word and background.

The evaluation's prompts (`a NAME`, and `a NAME on a COLOUR background`) are ordinary sentences, so
some captions read the same; the seeds and the pictures asked for are the evaluation's own.
"""

import random
from collections import Counter
from functools import cache
from pathlib import Path

FRAMES = ("{}", "{}", "{}", "{}", "an emoji of {}", "a picture of {}", "a drawing of {}", "an icon of {}")
BACKGROUND_PHRASES = ("{} on {} background", "{} on {} background", "{} with {} background")
PLURAL = ("grapes", "cherries", "blueberries", "peanuts", "pancakes", "french fries", "popcorn", "bread", "fireworks", "glasses")
PLURAL += (
    "sunglasses",
    "jeans",
    "socks",
    "scissors",
    "books",
    "paw prints",
    "cooked rice",
    "spaghetti",
    "fork and knife",
    "soap",
)


def with_article(name: str) -> str:
    """Put `a` or `an` before a name, and nothing before what is no countable thing."""
    if name in PLURAL:
        return name
    return f"an {name}" if name[0] in "aeiou" and not name.startswith(("uni", "eu")) else f"a {name}"


def telling_tags(rows: list[dict]) -> dict[str, list[str]]:
    """Return, per name, the tags that no other name of the training set carries."""
    tags_of = {row["name"]: set(row["tags"]) for row in rows}
    count = Counter(tag for tags in tags_of.values() for tag in tags)
    return {name: sorted(tag for tag in tags if count[tag] == 1 and tag not in name.split()) for name, tags in tags_of.items()}


@cache
def descriptions() -> dict[str, list[str]]:
    """Return what `descriptions.txt` calls every concept besides its name."""
    lines = (Path(__file__).parent / "descriptions.txt").read_text().splitlines()
    pairs = (line.split(" = ", 1) for line in lines if not line.startswith("#"))
    return {name: texts.split("; ") for name, texts in pairs}


def descriptions_for_text() -> dict[str, list[str]]:
    """Return the five sixths of every concept's descriptions that the text encoder is taught."""
    return {name: [text for index, text in enumerate(texts) if index % 6 != 5] for name, texts in descriptions().items()}


def descriptions_for_denoiser() -> dict[str, list[str]]:
    """Return the other sixth, of which the text encoder is as unsure as of anybody's words.

    So the denoiser learns what to do then: to draw one thing that may be meant, not the mean of several.
    """
    return {name: texts[5::6] for name, texts in descriptions().items()}


def caption(
    row: dict,
    background: str,
    telling: dict[str, list[str]],
    described: dict[str, list[str]],
    style: str | None,
    chance: random.Random,
) -> str:
    """Write one caption for a picture on a background.

    Args:
        row: the picture's row of `pictures.json` (`name`, `tags`).
        background: a key of `pictures.BACKGROUNDS`.
        telling: what `telling_tags` returned.
        described: the descriptions of every concept that may be said.
        style: the word to say, if any.
        chance: the source of every choice.
    """
    name = row["name"]
    if described.get(name) and chance.random() < 0.6:
        text = dress(chance.choice(described[name]), chance)
        return on_background(f"{text}, {style} style" if style else text, background, chance)
    if telling[name] and chance.random() < 0.1:
        name = chance.choice(telling[name])
    first = style and chance.random() < 0.4
    if first:
        text = with_article(f"{style} {name}") if name not in PLURAL else f"{style} {name}"
    else:
        text = with_article(name) if chance.random() < 0.75 else name
    text = dress(text, chance)
    if style and not first:
        text = f"{text}, {style} style"
    if row["tags"] and chance.random() < 0.12:
        text = f"{text}, {chance.choice(row['tags'])}"
    return on_background(text, background, chance)


def dress(text: str, chance: random.Random) -> str:
    """Say sometimes that it is a picture, and of what kind."""
    return chance.choice(FRAMES).format(text)


def on_background(text: str, background: str, chance: random.Random) -> str:
    """Say which background there is; white only now and then."""
    if background != "white" or chance.random() < 0.15:
        if chance.random() < 0.25:
            return f"{text}, {background} background"
        text = chance.choice(BACKGROUND_PHRASES).format(text, with_article(background))
    return text
