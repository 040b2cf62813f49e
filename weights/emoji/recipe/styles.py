"""Train the judge of styles: a small classifier that says from which set of emoji a 64x64 picture might be.

As `judge.py`, on the four styles that captions name; one picture in five, whichever its concept, is left out of its
training and measures it. What tells flat from shaded is faint: nothing is recoloured, covered or made noisy. Writes
`styles/` into the work folder.
"""

import argparse
import hashlib
from pathlib import Path

import torch
from build_data import default_work
from judge import (
    BATCH,
    Judge,
    Training,
    accuracy,
    judge_pictures,
    load_judge,
    move,
    put_on_backgrounds,
    small_icons,
    soften,
    write_judge,
)
from pictures import Pictures
from rich.progress import track

STYLES = ("fluent", "flat", "noto", "blob")
TEST_SHARE = 5  # one picture in so many


def is_tested(row: dict) -> bool:
    """Say whether a picture measures the judge."""
    return int(hashlib.sha256(f"{row['name']}|{row['set']}".encode()).hexdigest(), 16) % TEST_SHARE == 0


def draw_batch(icons: torch.Tensor, labels: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the step's own pictures, (64, 3, 64, 64) in [-1, 1], and labels (64,)."""
    chance = torch.Generator().manual_seed(7_000_003 + step)
    picked = torch.randint(len(icons), (BATCH,), generator=chance)
    pictures = soften(put_on_backgrounds(move(icons[picked].float(), chance), chance), chance) * 2 - 1
    return pictures.to(memory_format=torch.channels_last), labels[picked]


def train(work: Path, num_steps: int) -> None:
    """Train, or go on training, measure on the pictures left out, and write the result."""
    pictures, folder = Pictures(work, ("concept",)), work / "styles"
    folder.mkdir(exist_ok=True)
    rows = pictures.rows
    labels = torch.tensor([STYLES.index(row["set"]) if row["set"] in STYLES else -1 for row in rows])
    tested = torch.tensor([is_tested(row) for row in rows])
    learned = (labels >= 0) & ~tested
    icons = small_icons(pictures.rgba)[learned]
    training = Training(folder, len(STYLES), num_steps)
    for step in track(range(training.step, num_steps), description="styles"):
        training.advance(*draw_batch(icons, labels[learned], step))
        if training.step % 250 == 0 or training.step == num_steps:
            training.save()
    judge = Judge(len(STYLES))
    judge.load_state_dict(training.average)
    wanted = ((labels >= 0) & tested).nonzero().flatten()
    canvases = torch.stack([pictures.canvas(index) for index in wanted.tolist()])
    right = accuracy(judge_pictures(judge.eval(), canvases), labels[wanted])["top1"]
    facts = {
        "accuracy": right,
        "num_tested": len(wanted),
        "num_steps": num_steps,
        "channels": (48, 96, 160, 256),
        "names": list(STYLES),
    }
    write_judge(folder, training.average, facts)
    print(f"{len(wanted)} pictures that it never saw: {right:.1%}")


def load_style_judge(work: Path) -> tuple[Judge, dict]:
    """Return the judge of styles and its facts."""
    return load_judge(work, "styles")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=default_work())
    parser.add_argument("--steps", type=int, default=1500)
    arguments = parser.parse_args()
    train(arguments.work, arguments.steps)
