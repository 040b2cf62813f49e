"""Train the judge: a small image classifier that says which concept a 64x64 picture shows.

It learns from real pictures only, the split `concept` of the five training sets (those of one hue also
in other colours, as `scenes.py` draws them), and is measured on the Twemoji pictures of the same concepts,
a set that nothing here ever trains on. It knows nothing
of the model that it will judge: the blur that an autoencoder leaves is imitated by resampling.

Writes `judge/` into the work folder: `model.safetensors` (the average of the weights), `judge.json`
(names in the order of the logits, shape, measured accuracy) and `state.pt`, the state to resume
from. A step's data is a function of its number, so a resumed run sees the same pictures. For a
shorter or longer training remove `state.pt`: the learning rate's cycle is fixed by `--steps`.

Residual network: He et al. (2015), https://arxiv.org/abs/1512.03385, section 3.3; one-cycle learning
rate: Smith and Topin (2017), https://arxiv.org/abs/1708.07120.
"""

import argparse
import itertools
import json
import math
import os
import time
from pathlib import Path

import torch
from build_data import default_work
from pictures import BACKGROUNDS, Pictures
from precision import fast_autocast
from safetensors.torch import load_file, save_file
from scenes import COLOURS, Colours
from torch import nn
from torch.nn import functional as F

JUDGE_PX = 64
CHANNELS = (48, 96, 160, 256)
BATCH = 64
LEARNING_RATE = 3e-3
LABEL_SMOOTHING = 0.1
EMA_DECAY = 0.998


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut: (B, C, H, W) -> (B, D, H / stride, W / stride)."""

    def __init__(self, before: int, after: int, stride: int):
        """Make a block from `before` to `after` channels."""
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(after)
        self.second = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(after)
        self.shortcut = nn.Sequential(nn.AvgPool2d(stride), nn.Conv2d(before, after, 1)) if stride > 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return relu(shortcut + residual)."""
        inner = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.shortcut(x) + self.second_norm(self.second(inner)))


class Judge(nn.Module):
    """The classifier: (B, 3, 64, 64) in [-1, 1] -> (B, K) logits, one for each concept."""

    def __init__(self, num_concepts: int, channels: tuple[int, ...] = CHANNELS):
        """Make the untrained judge; every entry of `channels` is a level at half the size of the last."""
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels[0], 3, 2, 1, bias=False), nn.BatchNorm2d(channels[0]), nn.ReLU())
        levels = [Block(channels[0], channels[0], 1)]
        levels += [Block(before, after, 2) for before, after in itertools.pairwise(channels)]
        self.levels = nn.Sequential(*levels)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(channels[-1], num_concepts)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the last layer sees: (B, 256), for distances between sets of pictures."""
        return self.levels(self.stem(x)).mean((2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        return self.head(self.dropout(self.features(x)))


def concept_names(pictures: Pictures) -> list[str]:
    """Return the sorted names of the concepts: the order of the logits."""
    return sorted({row["name"] for row in pictures.rows})


def small_icons(pictures: torch.Tensor) -> torch.Tensor:
    """Put pictures, (N, 112, 112, 4) uint8, on a clear canvas, premultiplied RGBA in [0, 1]: (N, 4, 64, 64) float16."""
    found = []
    for rgba in pictures.split(128):
        icons = rgba.permute(0, 3, 1, 2).float() / 255
        icons = torch.cat([icons[:, :3] * icons[:, 3:], icons[:, 3:]], 1)
        found.append(F.avg_pool2d(F.pad(icons, (8, 8, 8, 8)), 2).half())  # 112 -> 128 -> 64
    return torch.cat(found)


def move(icons: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
    """Mirror, turn, scale, squeeze and shift every icon on its own: (B, 4, 64, 64) both ways."""

    def between(low: float, high: float) -> torch.Tensor:
        return torch.rand(len(icons), generator=chance) * (high - low) + low

    angle, scale, squeeze = between(-0.25, 0.25), between(0.8, 1.15), between(-0.1, 0.1)  # 0.25 radians: 14 degrees
    mirror = between(-1, 1).sign()
    cos, sin = angle.cos() / scale, angle.sin() / scale
    wide, tall = mirror * squeeze.exp(), (-squeeze).exp()
    rows = [
        torch.stack([cos * wide, -sin * tall, between(-0.13, 0.13)], 1),
        torch.stack([sin * wide, cos * tall, between(-0.13, 0.13)], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(icons.shape), align_corners=False)
    return F.grid_sample(icons, grid, align_corners=False)


def recolour(icons: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
    """Change saturation, brightness and tint a little; a red heart stays red. (B, 4, 64, 64) both ways."""

    def around_one(reach: float, *shape: int) -> torch.Tensor:
        return 1 + reach * (torch.rand(len(icons), *shape, 1, 1, generator=chance) * 2 - 1)

    colour, alpha = icons[:, :3], icons[:, 3:]
    gray = colour.mean(1, keepdim=True)
    colour = gray + (colour - gray) * around_one(0.4, 1)
    lift = 0.1 * (torch.rand(len(icons), 1, 1, 1, generator=chance) * 2 - 1) * alpha
    colour = colour * around_one(0.25, 1) * around_one(0.1, 3) + lift
    return torch.cat([colour.clamp_min(0).minimum(alpha), alpha], 1)


def put_on_backgrounds(icons: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
    """Compose on plain backgrounds, half of them white: (B, 3, 64, 64) in [0, 1]."""
    palette = torch.tensor(list(BACKGROUNDS.values())).float() / 255
    which = torch.randint(len(palette), (len(icons),), generator=chance)
    which[torch.rand(len(icons), generator=chance) < 0.5] = 0
    jitter = 0.1 * (torch.rand(len(icons), 3, generator=chance) - 0.5)
    colour = (palette[which] + jitter).clamp(0, 1)[:, :, None, None]
    return icons[:, :3] + colour * (1 - icons[:, 3:])


def soften(pictures: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
    """Blur three pictures in four by resampling, to 20 to 63 pixels and back. (B, 3, 64, 64) both ways."""
    softened = []
    for index, part in enumerate(pictures.chunk(8)):
        if index % 4:
            size = int(torch.randint(20, JUDGE_PX, (), generator=chance))
            part = F.interpolate(F.interpolate(part, size=size, mode="area"), size=JUDGE_PX, mode="bilinear")
        softened.append(part)
    return torch.cat(softened)


def cut_out(pictures: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
    """Cover a square of up to 24 pixels of every third picture with its own plain colour. (B, 3, 64, 64) both ways."""
    for picture in pictures[::3]:
        size = int(torch.randint(8, 25, (), generator=chance))
        top, left = torch.randint(JUDGE_PX - size, (2,), generator=chance).tolist()
        picture[:, top : top + size, left : left + size] = torch.rand(3, 1, 1, generator=chance)
    return pictures


def draw_batch(
    icons: torch.Tensor, labels: torch.Tensor, step: int, num_plain: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the step's own pictures, (64, 3, 64, 64) in about [-1, 1], and labels (64,).

    Args:
        icons: (N, 4, 64, 64).
        labels: (N,).
        step: seeds everything.
        num_plain: how many of the first are in their own colours: they fill seven eighths of the batch.
    """
    chance = torch.Generator().manual_seed(9_000_011 + step)
    picked = torch.randint(num_plain or len(icons), (BATCH,), generator=chance)
    if num_plain is not None and num_plain < len(icons):
        picked[: BATCH // 8] = torch.randint(num_plain, len(icons), (BATCH // 8,), generator=chance)
    moved = recolour(move(icons[picked].float(), chance), chance)
    pictures = cut_out(soften(put_on_backgrounds(moved, chance), chance), chance) * 2 - 1
    sigma = 0.1 * torch.rand(BATCH, 1, 1, 1, generator=chance)
    pictures = pictures + sigma * torch.randn(pictures.shape, generator=chance)
    return pictures.to(memory_format=torch.channels_last), labels[picked]


@torch.no_grad()
def judge_pictures(judge: Judge, pictures: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of every concept, averaged over the picture and its mirror image.

    Args:
        judge: a judge in evaluation mode.
        pictures: (B, 3, 128, 128) float32 in [-1, 1].

    Returns:
        (B, K) float32.
    """
    found = []
    for part in pictures.split(64):
        small = F.avg_pool2d(part, part.shape[-1] // JUDGE_PX)
        found.append((judge(small).log_softmax(1) + judge(small.flip(-1)).log_softmax(1)) / 2)
    return torch.cat(found)


def accuracy(scores: torch.Tensor, wanted: torch.Tensor) -> dict[str, float]:
    """Return top-1 and top-5 accuracy in [0, 1] of scores (B, K) for labels (B,)."""
    rank = (scores > scores.gather(1, wanted[:, None])).sum(1)
    return {f"top{k}": round((rank < k).float().mean().item(), 4) for k in (1, 5)}


def unseen_pictures(work: Path, names: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return Twemoji's pictures of the concepts on white, (M, 3, 128, 128) in [-1, 1], and their labels (M,)."""
    pictures = Pictures(work, ("unseen",))
    label_of = {name: label for label, name in enumerate(names)}
    picked = [index for index, row in enumerate(pictures.rows) if row["name"] in label_of]
    canvases = torch.stack([pictures.canvas(index) for index in picked])
    return canvases, torch.tensor([label_of[pictures.rows[index]["name"]] for index in picked])


def load_judge(work: Path) -> tuple[Judge, dict]:
    """Load the trained judge, in evaluation mode, and what `judge.json` says of it.

    Raises:
        SystemExit: there is none yet.
    """
    folder = work / "judge"
    if not (folder / "judge.json").exists():
        raise SystemExit(f"{folder} holds no judge yet: run judge.py first")
    facts = json.loads((folder / "judge.json").read_text())
    judge = Judge(len(facts["names"]), tuple(facts["channels"]))
    judge.load_state_dict(load_file(folder / "model.safetensors"))
    return judge.eval(), facts


class Training:
    """Everything that a resumed run needs, and how it is stored."""

    def __init__(self, folder: Path, num_concepts: int, num_steps: int):
        """Start, or read `state.pt` and go on.

        Raises:
            SystemExit: the stored state belongs to another number of steps or concepts.
        """
        torch.manual_seed(0)
        self.file, self.step = folder / "state.pt", 0
        self.plan = {"num_steps": num_steps, "num_concepts": num_concepts}
        self.model = Judge(num_concepts).to(memory_format=torch.channels_last)
        self.average = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self.optimiser = torch.optim.AdamW(self.model.parameters(), LEARNING_RATE, weight_decay=0.05)
        if self.file.exists():
            state = torch.load(self.file, weights_only=True)
            if state["plan"] != self.plan:
                raise SystemExit(f"{self.file} belongs to {state['plan']}, not {self.plan}: remove it to start again")
            self.model.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.average, self.step = state["average"], state["step"]

    def save(self) -> None:
        """Write the whole state beside its place and move it in."""
        state = {"model": self.model.state_dict(), "average": self.average, "optimiser": self.optimiser.state_dict()}
        torch.save(state | {"step": self.step, "plan": self.plan}, self.file.with_suffix(".part"))
        os.replace(self.file.with_suffix(".part"), self.file)

    def learning_rate(self) -> float:
        """Rise linearly over the first tenth and fall along a cosine to zero."""
        progress = self.step / self.plan["num_steps"]
        return LEARNING_RATE * min((progress + 1e-3) / 0.1, (1 + math.cos(math.pi * progress)) / 2)

    def advance(self, pictures: torch.Tensor, labels: torch.Tensor) -> float:
        """Take one step and return its loss."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate()
        torch.manual_seed(self.step)  # of the dropout
        with fast_autocast():
            logits = self.model(pictures)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=LABEL_SMOOTHING)
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        self.update_average()
        return loss.item()

    @torch.no_grad()
    def update_average(self) -> None:
        """Move the average one step towards the weights; early averages forget faster."""
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        for name, value in self.model.state_dict().items():
            self.average[name].lerp_(value, 1 - decay) if value.is_floating_point() else self.average[name].copy_(value)


def write_judge(folder: Path, average: dict[str, torch.Tensor], facts: dict) -> None:
    """Write `model.safetensors` and, last, `judge.json`, each moved in whole."""
    plain = {name: value.contiguous() for name, value in average.items()}
    save_file(plain, folder / "model.safetensors.part")
    os.replace(folder / "model.safetensors.part", folder / "model.safetensors")
    (folder / "judge.json.part").write_text(json.dumps(facts, indent=1))
    os.replace(folder / "judge.json.part", folder / "judge.json")


def train(work: Path, num_steps: int) -> None:
    """Train, or go on training, measure on Twemoji, and write the result."""
    pictures, folder = Pictures(work, ("concept",)), work / "judge"
    folder.mkdir(exist_ok=True)
    names = concept_names(pictures)
    labels = torch.tensor([names.index(row["name"]) for row in pictures.rows])
    colours = Colours(pictures)
    plain = [index for index in colours.can_change if not COLOURS.keys() & set(pictures.rows[index]["name"].split())]
    other = torch.stack([colours.change(index, colour) for index in plain for colour in COLOURS])
    icons = torch.cat([small_icons(pictures.rgba), small_icons(other)])
    labels = torch.cat([labels, labels[plain].repeat_interleave(len(COLOURS))])
    training = Training(folder, len(names), num_steps)
    first, started, sum_loss = training.step, time.monotonic(), 0.0
    with open(folder / "judge.jsonl", "a", buffering=1) as log:
        while training.step < num_steps:
            sum_loss += training.advance(*draw_batch(icons, labels, training.step, len(pictures)))
            if training.step % 50 == 0:
                pace_s = (time.monotonic() - started) / (training.step - first)
                row = {"step": training.step, "of": num_steps, "loss": round(sum_loss / 50, 4), "pace_s": round(pace_s, 3)}
                print(json.dumps(row | {"cpu_s": round(time.process_time())}), file=log)
                sum_loss = 0.0
            if training.step % 250 == 0 or training.step == num_steps:
                training.save()
    judge = Judge(len(names))
    judge.load_state_dict(training.average)
    canvases, wanted = unseen_pictures(work, names)
    figures = accuracy(judge_pictures(judge.eval(), canvases), wanted)
    facts = {"accuracy_twemoji": figures, "num_twemoji": len(wanted), "num_training_pictures": len(pictures)}
    facts |= {"num_steps": num_steps, "batch": BATCH, "channels": CHANNELS, "names": names}
    write_judge(folder, training.average, facts)
    print(f"Twemoji, never trained on, {len(wanted)} pictures of {len(names)} concepts: {figures}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=default_work())
    parser.add_argument("--steps", type=int, default=3000)
    arguments = parser.parse_args()
    train(arguments.work, arguments.steps)
