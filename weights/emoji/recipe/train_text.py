"""Teach the text encoder what is meant: every token of a caption learns to say which thing it speaks of, and how it looks.

all-MiniLM-L6-v2 knows what words mean, but not what the denoiser has to know at each token: which of the things, in
which colour, how often and where. Linear heads read that off the output while its upper half learns, and are thrown away.
A second loss keeps their output near what it was. A third of the texts are captions of scenes; the others are descriptions,
WordNet's glosses of other things with the concept that is nearest (`glosses.txt`), and such sentences in words that evoke
another concept (`words.txt`): so words that no caption holds lead to a concept, too. Every token of a description learns to
be nearest to what the concept's name is (`names`).

Reads captions of scenes (`scenes.py`), no pictures are drawn; writes `text_encoder/` and `tokenizer/` into the work folder.
"""

import argparse
import random
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from build_data import WORDNET, default_work, npm_package
from captions import descriptions_for_denoiser, descriptions_for_text, dress, telling_tags, with_article
from pictures import BACKGROUNDS, Pictures
from precision import fast_autocast
from rich.progress import track
from scenes import COLOURS, DEFAULT_STYLE, STYLES, Colours, Scene, Scenes
from text import MAX_TOKENS, embed, load_text_encoder, write_text_encoder
from torch import nn
from torch.nn import functional as F

RECIPE = Path(__file__).resolve().parent
SHIPPED = RECIPE.parent  # its `text_encoder/` is what the shipped denoiser learned to read
BATCH = 96
LEARNING_RATE = 2e-4
NEARNESS = 1.0  # weight of captions that stay near what they were, in units of their variance
NUM_FROZEN = 3  # layers, the lower half
CAPTION_SHARE = 3  # one text in so many is a caption, the others are descriptions and glosses
NUM_NEAR = 2000  # descriptions of about one length, from which a batch's come: little of it is padding
PADDED_SHARE = 4  # one batch in so many is padded to the full length, as every prompt will be
FORGOTTEN = 0.1  # of a description's words
RETOLD = 0.3  # of the descriptions: the sentence stays, its words become such as evoke another concept
LINKING = {
    "that",
    "with",
    "from",
    "this",
    "what",
    "when",
    "your",
    "into",
    "over",
    "they",
    "them",
    "used",
    "like",
    "which",
    "where",
}
SHARPNESS = 16.0  # of the cosines to names, as logits
NOTHING = -100  # no answer is asked of this token
COLOUR_NAMES, BACKGROUND_NAMES, STYLE_NAMES = [None, *COLOURS], list(BACKGROUNDS), list(STYLES)
PLACES = [(0, 0), (0, -1), (0, 1), (-1, 0), (1, 0)]


Words = dict[int, list[tuple[str, float]]]  # concept: words that evoke it, and how much


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

    def draw(self, tokenizer, num: int, chance: random.Random) -> tuple[dict, dict]:
        """Return captions of scenes as tokens and, for each head, the answers (num, T)."""
        scenes = [self.scenes.draw(chance) for _ in range(num)]
        told = [self.scenes.describe_parts(scene, chance) for scene in scenes]
        tokens = tokenize(tokenizer, [text for text, _ in told], chance, return_offsets_mapping=True)
        answers = {head: torch.full(tokens["input_ids"].shape, NOTHING) for head in self.heads}
        offsets = tokens.pop("offset_mapping")
        for index, (scene, (text, parts)) in enumerate(zip(scenes, told, strict=True)):
            answers["style"][index] = STYLE_NAMES.index(scene.style or DEFAULT_STYLE)
            answers["background"][index] = BACKGROUND_NAMES.index(scene.background)
            for head, thing, span in self._spans(scene, text, parts):
                inside = self._inside(offsets[index], span) if span else slice(None)
                answers[head][index, inside] = thing
        return tokens, answers

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


def tokenize(tokenizer, texts: list[str], chance: random.Random, **options) -> dict[str, torch.Tensor]:
    """Return texts as tokens, padded to the longest of them or, now and then, as far as every prompt is."""
    padding = True if chance.randrange(PADDED_SHARE) else "max_length"
    tokens = tokenizer(texts, padding=padding, max_length=MAX_TOKENS, truncation=True, return_tensors="pt", **options)
    return {name: tokens[name] for name in ("input_ids", "attention_mask", "offset_mapping") if name in tokens}


def draw_described(
    tokenizer, num: int, others: list[tuple[str, int]], words: Words, chance: random.Random
) -> tuple[dict, torch.Tensor]:
    """Return `num` descriptions of about one length, some words of them forgotten, as tokens, and their concepts (num,).

    Args:
        tokenizer: the encoder's.
        num: how many.
        others: texts and their concepts, by length.
        words: that evoke each concept.
        chance: the source of every choice.
    """
    start = chance.randrange(-NUM_NEAR // 2, len(others) - NUM_NEAR // 2)
    near = others[max(start, 0) : start + NUM_NEAR]
    pairs = [retell(*pair, words, chance) for pair in chance.choices(near, k=num)]
    tokens = tokenize(tokenizer, [dress(text, chance) for text, _ in pairs], chance)
    return tokens, torch.tensor([concept for _, concept in pairs])


def retell(text: str, concept: int, words: Words, chance: random.Random) -> tuple[str, int]:
    """Return a description with some words forgotten, or the same kind of sentence about anything, in words that evoke it."""
    said = text.split()
    telling = [place for place, word in enumerate(said) if len(word) > 3 and word not in LINKING]
    if words and telling and chance.random() < RETOLD:
        concept = chance.choice(list(words))
        evoking, weights = zip(*words[concept], strict=True)
        for place in telling:
            said[place] = bent(chance.choices(evoking, weights)[0], chance)
    return " ".join(word for word in said if chance.random() >= FORGOTTEN) or " ".join(said), concept


def bent(word: str, chance: random.Random) -> str:
    """Return a word, or something like one of its other forms."""
    stem = word.removesuffix("e")
    return chance.choice((word, word, word, word + "s", stem + "ing", stem + "ed"))


def read_words(names: list[str]) -> Words:
    """Return which words evoke each concept, and how much."""
    found: Words = {}
    for line in (RECIPE / "words.txt").read_text().splitlines():
        if not line.startswith("#"):
            word, evoked = line.split(" = ")
            for place, name in enumerate(evoked.split("; "), 1):
                found.setdefault(names.index(name), []).append((word, 1 / place))
    return found


def read_glosses(work: Path, names: list[str]) -> tuple[list[tuple[str, int]], list[str]]:
    """Return WordNet's glosses: those with the concept that each is nearest to, as `glosses.txt` says, and all others."""
    nearest = dict(line.split("\t") for line in (RECIPE / "glosses.txt").read_text().splitlines() if not line.startswith("#"))
    found, others = [], []
    for line in wordnet_lines(work, "noun"):
        text = " ".join(re.sub(r"\(.*?\)", "", line.split(" | ", 1)[1]).split(";")[0].lower().split())
        if line[:8] in nearest:
            found.append((text, names.index(nearest[line[:8]])))
        elif text:
            others.append(text)
    return found, others


def check_same_words(shipped: tuple, tokenizer, work: Path) -> None:
    """Raise SystemExit where the shipped encoder and that of the work folder, compared token by token, know other words."""
    if shipped[0].get_vocab() != tokenizer.get_vocab():
        raise SystemExit(f"the encoders of {work} and of {SHIPPED} know other words: copy the latter's and its tokenizer over")


def wordnet_lines(work: Path, *kinds: str) -> Iterator[str]:
    """Yield the lines of WordNet's data files of these kinds of words, without the licence."""
    for kind in kinds:
        text = (npm_package(*WORDNET, work) / "dict" / f"data.{kind}").read_text(encoding="utf-8")
        yield from (line for line in text.splitlines() if line[:8].isdigit())


def start_learning(model: nn.Module) -> None:
    """Let the upper half learn; the rest stays, without dropout."""
    model.train()
    for part in (model.embeddings, *model.encoder.layer[:NUM_FROZEN]):
        part.eval().requires_grad_(False)


def embed_names(encoder: tuple, names: list[str]) -> torch.Tensor:
    """Return what each concept's name is to an encoder, the mean over the tokens: (K, 384)."""
    return means(encoder, [with_article(name) for name in names])


def means(encoder: tuple, texts: list[str]) -> torch.Tensor:
    """Return the mean over the tokens of each text: (B, 384)."""
    return torch.cat([embed(encoder, texts[start : start + 64]).mean(1) for start in range(0, len(texts), 64)])


def cosines_to(names: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """Return the cosines, about the middle of the names (K, 384), of texts (…, 384): (…, K)."""
    middle = names.mean(0)
    return F.normalize(texts - middle, dim=-1) @ F.normalize(names - middle, dim=-1).T


def measure(encoder: tuple, names: torch.Tensor, pairs: list[tuple[int, str]]) -> str:
    """Say how often a description is nearest to the name of its concept, and how near it is to the nearest two names."""
    encoder[1].eval()
    cosines = cosines_to(names, means(encoder, [text for _, text in pairs]))
    right = cosines.topk(5).indices == torch.tensor([concept for concept, _ in pairs])[:, None]
    first, second = cosines.topk(2).values.median(0).values
    shares = f"top-1 {right[:, 0].float().mean():.1%}, top-5 {right.any(1).float().mean():.1%}"
    return f"{len(pairs)} descriptions: {shares}, cosine to the nearest name {first:.2f}, to the second {second:.2f}"


def train(work: Path, num_steps: int, go_on: bool = False) -> None:
    """Train, and write the encoder; every 100 steps say how it fares on descriptions that it does not learn.

    Args:
        work: the folder with the drawn pictures.
        num_steps: how many batches.
        go_on: start from the work folder's encoder, and stay near the shipped one: its denoiser has less to learn anew.
    """
    torch.manual_seed(0)
    tokenizer, model = load_text_encoder(work if go_on else None)
    captions = Captions(work)
    untaught = descriptions_for_denoiser().items()
    unseen = [(captions.names.index(name), text) for name, texts in untaught for text in texts][::11]
    known = load_text_encoder(SHIPPED if go_on else None)
    check_same_words(known, tokenizer, work)
    names = embed_names(known, captions.names)
    others, _ = read_glosses(work, captions.names)
    others += [(text, captions.names.index(name)) for name, texts in descriptions_for_text().items() for text in texts]
    words = read_words(captions.names)
    others.sort(key=lambda pair: len(pair[0]))
    spread, num_captions = 0.0, BATCH // CAPTION_SHARE
    start_learning(model)
    heads = nn.ModuleDict({name: nn.Linear(model.config.hidden_size, size) for name, size in captions.heads.items()})
    parts = [
        {"params": [weight for weight in model.parameters() if weight.requires_grad], "lr": LEARNING_RATE},
        {"params": list(heads.parameters()), "lr": 10 * LEARNING_RATE},
    ]
    optimiser = torch.optim.AdamW(parts, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, [part["lr"] for part in parts], num_steps, pct_start=0.1)
    for step in track(range(num_steps), description="text encoder"):
        chance = random.Random(7_000_003 + step)
        tokens, answers = captions.draw(tokenizer, num_captions, chance)
        other_tokens, concepts = draw_described(tokenizer, BATCH - num_captions, others, words, chance)
        with fast_autocast():
            said, described = model(**tokens)[0].float(), model(**other_tokens)[0].float()
            with torch.no_grad():
                before = known[1](**tokens)[0].float()
        spread = spread or before.var().item()
        near = (said - before).square().mean() / spread
        losses = {name: F.cross_entropy(head(said).flatten(0, 1), answers[name].flatten()) for name, head in heads.items()}
        concepts = concepts[:, None].expand(described.shape[:2])
        named = F.cross_entropy(SHARPNESS * cosines_to(names, described).flatten(0, 1), concepts.flatten())
        loss = NEARNESS * near + sum(losses.values()) / len(losses) + 2 * named
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 99 or step == num_steps - 1:
            told = ", ".join(f"{name} {value.item():.3f}" for name, value in losses.items())
            print(f"step {step + 1}: near {near.item():.3f}, named {named.item():.3f}, {told}", flush=True)
            print("  " + measure((tokenizer, model), names, unseen), flush=True)
            start_learning(model)
    write_text_encoder((tokenizer, model), work)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=default_work())
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--go-on", action="store_true", help="start from the encoder in the work folder")
    arguments = parser.parse_args()
    train(arguments.work, arguments.steps, arguments.go_on)
