"""References: make a picture again from its receipt, say whether it is the same, ask stock diffusers for it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagegen import fidelity
from imagegen.fit import HARMLESS
from imagegen.loader import load
from imagegen.measure import environment
from imagegen.model import Model
from imagegen.receipt import Receipt, describe_request, open_picture, pixels_sha256
from imagegen.request import PICTURES, SETTINGS, ReceiptError, Request, build_request
from imagegen.speed import EXACT, Plan

if TYPE_CHECKING:
    from PIL.Image import Image

# The drift between fp32 runs that should be equal: over batch sizes and thread counts of one CPU.
FLOOR_MAX_DIFFERENCE = 2  # of 255
FLOOR_PSNR_DB = 50.0
LESS_DB = 3.0  # a difference that halves, in power, without the levers is theirs


@dataclass(frozen=True)
class Verdict:
    """Whether a picture could be made again.

    Attributes:
        same: same pixels within the noise floor, and same weights.
        psnr_db: between the file and the new picture; infinite where they are equal.
        max_difference: of any channel of any pixel, 0 to 255.
        reasons: what differs, in words; empty where nothing does.
        image: the new picture.
    """

    same: bool
    psnr_db: float
    max_difference: int
    reasons: list[str]
    image: "Image"


def replay(
    picture: str | Path,
    *,
    image: "Image | str | Path | None" = None,
    mask: "Image | str | Path | None" = None,
    control: "Image | str | Path | None" = None,
    style_image: "Image | str | Path | None" = None,
    model: Model | None = None,
    device: str | None = None,
) -> Verdict:
    """Make a picture again from its receipt and compare.

    Args:
        picture: a PNG with a receipt.
        image: the picture it was made from, for image-to-image and inpainting.
        mask: the mask it was made with, for inpainting.
        control: the picture whose structure it followed.
        style_image: the picture whose style it followed.
        model: the model to use; by default the receipt's own is loaded.
        device: where to load it.

    Raises:
        ReceiptError: there is no receipt, or one that cannot be replayed.
        PlanError: a lever that the picture was made with cannot engage here.
        ModelError: the model is not here.
        RequestError: the receipt's settings are not possible.
    """
    stored, receipt = open_picture(picture)
    recorded = receipt.request
    if recorded.get("noise"):
        raise ReceiptError(f"{str(picture)!r} was made from noise given by the caller: it cannot be made again from its receipt")
    pictures = {"image": image, "mask": mask, "control": control, "style_image": style_image}
    for name, given in pictures.items():
        wanted = recorded.get(f"{name}_sha256")
        if wanted and given is None:
            raise ReceiptError(f"{str(picture)!r} was made with {name}=: give that picture again")
        if given is not None and not wanted:
            raise ReceiptError(f"{str(picture)!r} was made without {name}=: leave it out")
    used = model or load(receipt.model["source"], device=device, dtype=receipt.environment.get("dtype"), **receipt.where())
    if _by_content(receipt.loras) != _by_content(used.loras):
        wanted = ", ".join(f"{lora.get('name')} at {lora.get('weight')}" for lora in receipt.loras) or "no LoRA"
        raise ReceiptError(
            f"{str(picture)!r} was made with {wanted}: add just that to the model (add_lora, --lora), and replay again"
        )
    settings = {name: recorded[name] for name in SETTINGS if recorded.get(name) is not None} | {"num_images": 1}
    request = build_request(recorded["prompt"], used.family, settings | pictures)
    asked = settings | {name: getattr(request, name) for name in PICTURES}

    def make(plan: Plan) -> "Image":
        with used.plan_for_a_while(plan):
            return used.generate(request.prompt, **asked).images[0]

    plan = plan_of(receipt)
    remade = make(plan)
    reasons = _differences(receipt, used, describe_request(request, False), stored)
    if remade.size != stored.size:
        return Verdict(False, 0.0, 255, [*reasons, f"the picture is {stored.size}, the receipt makes {remade.size}"], remade)
    psnr_db, largest = fidelity.psnr_db(stored, remade), fidelity.max_difference(stored, remade)
    if largest > FLOOR_MAX_DIFFERENCE or psnr_db < FLOOR_PSNR_DB:
        reasons.append(f"the pixels differ by up to {largest}/255 ({psnr_db:.1f} dB), more than the noise floor allows")
        reasons += _changes(receipt, used)
        if plan.levers:
            without = fidelity.psnr_db(stored, make(EXACT))
            verdict = "they explain it" if without > psnr_db + LESS_DB else "they are not what explains it"
            reasons.append(
                f"without its levers ({', '.join(plan.levers)}) the picture is {without:.1f} dB from the file: {verdict}"
            )
    return Verdict(not reasons, psnr_db, largest, reasons, remade)


def plan_of(receipt: Receipt) -> Plan:
    """Return the plan that a picture was made with: its name, and the levers that were applied.

    Those that only make a model fit are left out: they change no picture, and may not be possible here.

    Raises:
        ReceiptError: the receipt's plan is damaged.
    """
    levers = receipt.plan.get("levers", [])
    if not isinstance(levers, list) or not all(isinstance(part, dict) and isinstance(part.get("lever"), str) for part in levers):
        raise ReceiptError("the receipt's plan has no usable list of levers: it is damaged")
    applied = tuple(part["lever"] for part in levers if "why_not" not in part and part["lever"] not in HARMLESS)
    return Plan(str(receipt.plan.get("name", "")), applied) if applied else EXACT


def _differences(receipt: Receipt, model: Model, described: dict, stored: "Image") -> list[str]:
    """Return what of the receipt no longer holds, pixels aside."""
    reasons = []
    if pixels_sha256(stored) != receipt.pixels_sha256:
        reasons.append("the file's pixels are not those that the receipt was written for")
    recorded, here = receipt.model["sha256"], model.hashes
    changed = sorted(name for name in recorded.keys() | here.keys() if recorded.get(name) != here.get(name))
    if changed:
        reasons.append(f"other weights than recorded: {', '.join(changed)}")
    for name in PICTURES:
        if described.get(f"{name}_sha256") != receipt.request.get(f"{name}_sha256"):
            reasons.append(f"the {name} given is not the one that was used")
    for name in ("control", "style"):
        if _contents(receipt.model.get(name)) != _contents(model.guides.get(name)):
            reasons.append(f"another {name} model than recorded is loaded")
    return reasons


def _contents(guide: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what identifies a guide: what its files hold, and not their names."""
    return {name: value for name, value in (guide or {}).items() if name != "name"}


def _by_content(loras: Sequence[Mapping[str, Any]]) -> list[tuple[str, float]]:
    """Return what identifies LoRAs: what their files hold and their weights, in no order."""
    return sorted((str(lora.get("sha256")), float(lora.get("weight", 1.0))) for lora in loras)


def _changes(receipt: Receipt, model: Model) -> list[str]:
    """Return what changed since the receipt was written, versions, device and dtype: it may explain a difference."""
    now = environment(model.device, model.dtype)
    return [
        f"made with {name} {receipt.environment[name]}, now {now[name]}"
        for name in now
        if receipt.environment.get(name, now[name]) != now[name]
    ]


def stock_request(model: Model, receipt: Receipt) -> Request:
    """Return what to ask of stock diffusers to get a receipt's picture.

    Raises:
        ReceiptError: the picture has no stock reference, or was made with other weights.
        RequestError: its settings are not possible.
    """
    recorded = receipt.request
    if recorded.get("mode") != "text-to-image" or recorded.get("noise") or receipt.loras:
        raise ReceiptError("stock diffusers is run for text-to-image pictures without LoRAs: give a reference of your own")
    if receipt.model["sha256"] != model.hashes:
        raise ReceiptError("this picture was made with other weights than those loaded here: give a reference of your own")
    names = ("negative_prompt", "seed", "num_steps", "guidance", "width", "height", "scheduler")
    return build_request(recorded["prompt"], model.family, {name: recorded.get(name) for name in names})
