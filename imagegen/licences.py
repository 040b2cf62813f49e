"""What a model's licence says of training another model on what it makes, as data. Knows nothing of torch.

Three kinds, and a fourth for what is not here: allowed; allowed, and the new model carries the terms;
forbidden. A reading on the date given, of some texts as others quote them (Tencent's, OpenAI's), not legal advice:
the text at `url` decides.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from imagegen.request import DataError

ALLOWED, INHERITED, FORBIDDEN, UNKNOWN = "allowed", "allowed, terms inherited", "forbidden", "unknown"


@dataclass(frozen=True)
class Licence:
    """One licence.

    Attributes:
        name: SPDX's where it has one.
        kind: one of the four.
        terms: what it asks, in a sentence.
        url: of the text.
        read: date on which it was read, ISO 8601.
        names: patterns of the models under it, as receipts and other tools name them.
    """

    name: str
    kind: str
    terms: str
    url: str
    read: str
    names: tuple[str, ...] = ()


_RAIL = "a model distilled from it or trained on its outputs is a derivative, and carries the same restrictions of use"

LICENCES = {
    licence.name: licence
    for licence in (
        Licence(
            "Apache-2.0", ALLOWED, "no word on outputs", "https://www.apache.org/licenses/LICENSE-2.0", "2026-11-24",
            (r"flux.?1.?schnell", r"flux.?2.?klein.?4b", r"qwen.?image", r"(^|\W)z.?image", r"auraflow", r"^emoji$"),
        ),
        Licence("MIT", ALLOWED, "no word on outputs", "https://opensource.org/license/mit", "2026-11-24", (r"hidream",)),
        Licence(
            "CC-BY-SA-4.0", INHERITED, "what is made from the pictures names their authors and carries the same licence",
            "https://creativecommons.org/licenses/by-sa/4.0/", "2026-11-24",
        ),
        Licence(
            "CC-BY-4.0", INHERITED, "what is made from the pictures names their authors",
            "https://creativecommons.org/licenses/by/4.0/", "2026-11-24",
        ),
        Licence(
            "CreativeML-OpenRAIL-M", INHERITED, _RAIL,
            "https://huggingface.co/spaces/CompVis/stable-diffusion-license", "2026-11-24",
            (r"stable.?diffusion.?v?1", r"(^|\W)sd.?1\.?[45]", r"v1-5-pruned"),
        ),
        Licence(
            "CreativeML-OpenRAIL++-M", INHERITED, _RAIL,
            "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/blob/main/LICENSE.md", "2026-11-24",
            (r"sd.?xl(?!.?turbo)", r"stable.?diffusion.?xl(?!.?turbo)", r"stable.?diffusion.?2", r"pixart"),
        ),
        Licence(
            "DeepSeek-Model-License-1.0", INHERITED, _RAIL,
            "https://github.com/deepseek-ai/Janus/blob/main/LICENSE-MODEL", "2026-11-24", (r"janus",),
        ),
        Licence(
            "Stability-AI-Community-License", FORBIDDEN,
            "its outputs may not create or improve another foundational generative model",
            "https://stability.ai/community-license-agreement", "2026-11-24",
            (r"stable.?diffusion.?(3|xl.?turbo)", r"(^|\W)sd.?3", r"sd.?xl.?turbo", r"sd.?turbo"),
        ),
        Licence(
            "FLUX.1-dev-Non-Commercial-License", FORBIDDEN,
            "its outputs may not train, fine-tune or distil a model that competes with it",
            "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md", "2026-11-24",
            (r"flux.?1.?(dev|kontext|fill|krea)", r"flux.?2.?(dev|klein.?9b)"),
        ),
        Licence(
            "Tencent-Hunyuan-Community-License", FORBIDDEN, "its outputs may not improve any other AI model",
            "https://huggingface.co/Tencent-Hunyuan/HunyuanDiT/blob/main/LICENSE.txt", "2026-11-24", (r"hunyuan",),
        ),
        Licence(
            "OpenAI-Terms-of-Use", FORBIDDEN, "its outputs may not develop models that compete with OpenAI",
            "https://openai.com/policies/row-terms-of-use/", "2026-11-24", (r"dall.?e", r"gpt.?image", r"chatgpt", r"openai"),
        ),
    )
}  # fmt: skip


def unknown(name: str | None = None) -> Licence:
    """Return what stands for a licence that is not here."""
    return Licence(name or "unknown", UNKNOWN, "not in this version's list: read it yourself", "", "")


def licence_named(name: str | None) -> Licence:
    """Return the licence of that name, or what stands for one that is not here."""
    return LICENCES.get(name or "") or unknown(name)


def licence_of(model: str) -> Licence:
    """Return the licence of a model that is known by its name only, as in another tool's metadata."""
    for licence in LICENCES.values():
        if any(re.search(pattern, model, re.IGNORECASE) for pattern in licence.names):
            return licence
    return unknown()


def describe_right(fact: dict[str, str]) -> str:
    """Return a record of `check_right` in words."""
    read = f" ({fact['url']}, read {fact['read']})" if fact["url"] else ": read it yourself"
    return f"licence {fact['licence']}, {fact['kind']}{read}"


def record(used: Iterable[tuple[str, Licence]]) -> list[dict[str, str]]:
    """Return what to keep of the licences of what was used: `what`, `licence`, `kind`, `url` and `read`, sorted."""
    found = sorted(set(used), key=lambda pair: (pair[0], pair[1].name))
    return [{"what": what, "licence": own.name, "kind": own.kind, "url": own.url, "read": own.read} for what, own in found]


def check_right(used: Iterable[tuple[str, Licence]], i_have_the_right: bool) -> list[dict[str, str]]:
    """Return what to record of the models whose outputs are learned from, or refuse.

    Args:
        used: what is used, in words, with its licence.
        i_have_the_right: the user says that a forbidden use is theirs to make; it is recorded.

    Raises:
        DataError: a licence forbids the use, and nobody said to have the right.
    """
    used = list(used)
    for what, licence in used:
        if licence.kind == FORBIDDEN and not i_have_the_right:
            raise DataError(
                f"{what} is under {licence.name}: {licence.terms} ({licence.url}, read {licence.read}); leave it out, or "
                "say that you have the right with i_have_the_right=True, in the shell --i-have-the-right, which is recorded"
            )
    said = {"right": "the user says to have it"}
    return [fact | (said if fact["kind"] == FORBIDDEN else {}) for fact in record(used)]
