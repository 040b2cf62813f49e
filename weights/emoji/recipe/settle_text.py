"""Teach the text encoder to settle: two more layers turn what may mean several things into what one thing's name is.

The taught encoder puts a description between the names of what it may mean, and the denoiser draws what lies between two
animals as something between them. The added layers begin as the identity, everything below them stays. They learn that
captions of scenes stay what they are; that every token of a described thing becomes what the tokens of its concept's name
are; and every token of a text that nobody has labelled what those of the name are that it is nearest to: WordNet's glosses
of anything, and beginnings and ends of two descriptions.

Reads and writes `text_encoder/` of the work folder.
"""

import argparse
import os
import random
import shutil
from pathlib import Path

import torch
from build_data import default_work
from captions import descriptions_for_denoiser, descriptions_for_text, dress, with_article
from precision import fast_autocast
from rich.progress import track
from text import MAX_TOKENS, embed, load_text_encoder
from torch import nn
from torch.nn import functional as F
from train_text import Captions, read_glosses
from transformers import BertModel

NUM_ADDED = 1  # layers
RAMP = ((0.28, 1.0), (0.45, -2.0), (0.62, 1.0))  # where a unit's slope changes, along the way from the middle to a name, and how
SHARPNESS = 25.0  # of those changes
GAIN = 2.0  # of what is added, in names per unit of the way
NUM_EACH = 40  # captions, described things and unlabelled texts of a step
LEARNING_RATE = 5e-4
STAYING = 2.0  # weight of captions that stay what they are


def with_more_layers(model: BertModel) -> BertModel:
    """Return the encoder with layers that change next to nothing, the only ones that learn."""
    before = len(model.encoder.layer)
    model.config.num_hidden_layers = before + NUM_ADDED
    taller = BertModel(model.config)
    taller.load_state_dict(model.state_dict(), strict=False)
    taller.config.use_attention_mask = True
    taller.requires_grad_(False)
    with torch.no_grad():
        for layer in taller.encoder.layer[before:]:
            layer.requires_grad_(True)
            for part in (layer.attention.output, layer.output):
                part.dense.weight.mul_(0.1)
                part.dense.bias.zero_()
    return taller.eval()  # no dropout


@torch.no_grad()
def remember_names(taller: BertModel, names: torch.Tensor) -> None:
    """Let the added layers push what lies between the middle and a name towards the name, and leave alone what is there.

    Each name has three hidden units, the corners of a bump: Hopfield's associative memory in a feed-forward layer, as
    Ramsauer et al. (2020) read it, https://arxiv.org/abs/2008.02217.
    """
    ways = names - names.mean(0)
    lengths = ways.norm(dim=-1, keepdim=True)
    seen = ways / lengths / lengths.mean()  # what it is held against: 1 at the name
    for layer in taller.encoder.layer[-NUM_ADDED:]:
        into, out = layer.intermediate.dense, layer.output.dense
        for number, (corner, slope) in enumerate(RAMP):
            units = slice(number * len(names), (number + 1) * len(names))
            into.weight[units] = SHARPNESS * seen
            into.bias[units] = -SHARPNESS * (seen @ names.mean(0) + corner)
            out.weight[:, units] = slope * GAIN / SHARPNESS * ways.T


@torch.no_grad()
def fit_norms(taller: BertModel, below: torch.Tensor) -> None:
    """Let the added layers' norms give back what comes from below, (B, T, 384), as they normalise it."""
    flat = below.flatten(0, 1)
    normal = F.layer_norm(flat, flat.shape[1:])
    slope = ((flat - flat.mean(0)) * (normal - normal.mean(0))).mean(0) / normal.var(0, correction=0)
    for layer in taller.encoder.layer[-NUM_ADDED:]:
        for norm in (layer.attention.output.LayerNorm, layer.output.LayerNorm):
            norm.weight.copy_(slope)
            norm.bias.copy_(flat.mean(0) - slope * normal.mean(0))


def join(first: str, second: str, chance: random.Random) -> str:
    """Return the beginning of one text and the end of another."""
    first_words, second_words = first.split(), second.split()
    return " ".join(first_words[: chance.randint(1, len(first_words))] + second_words[chance.randrange(len(second_words)) :])


def embed_all(encoder: tuple, texts: list[str]) -> torch.Tensor:
    """Return the mean over the tokens of each text: (B, 384)."""
    return torch.cat([embed(encoder, texts[start : start + 64]).mean(1) for start in range(0, len(texts), 64)])


def nearest_names(means: torch.Tensor, names: torch.Tensor) -> torch.Tensor:
    """Return the cosines, about the names' mean, of texts (B, 384) and names (K, 384): (B, K)."""
    middle = names.mean(0)
    return F.normalize(means - middle, dim=-1) @ F.normalize(names - middle, dim=-1).T


def measure(encoder: tuple, names: torch.Tensor, pairs: list[tuple[int, str]]) -> str:
    """Say how often a description is nearest to the name of its concept, and how near it is to the nearest two names."""
    cosines = nearest_names(embed_all(encoder, [text for _, text in pairs]), names)
    right = cosines.topk(5).indices == torch.tensor([concept for concept, _ in pairs])[:, None]
    first, second = cosines.topk(2).values.median(0).values
    shares = f"top-1 {right[:, 0].float().mean():.1%}, top-5 {right.any(1).float().mean():.1%}"
    return f"{len(pairs)} descriptions: {shares}, cosine to the nearest name {first:.2f}, to the second {second:.2f}"


def settle(work: Path, num_steps: int) -> None:
    """Train the added layers, say every 100 steps how they fare on descriptions that no encoder was taught, and write all."""
    torch.manual_seed(0)
    tokenizer, model = load_text_encoder(work)
    captions = Captions(work)
    names = embed_all((tokenizer, model), [with_article(name) for name in captions.names])
    middle = names.mean(0)
    unit = (names - middle).square().mean()
    untaught = descriptions_for_denoiser().items()
    unseen = [(captions.names.index(name), text) for name, texts in untaught for text in texts][::11]
    print("before: " + measure((tokenizer, model), names, unseen), flush=True)
    described, glosses = read_glosses(work, captions.names)
    described += [(text, captions.names.index(name)) for name, texts in descriptions_for_text().items() for text in texts]
    taller = with_more_layers(model)
    remember_names(taller, names)
    learning = [weight for weight in taller.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(learning, LEARNING_RATE, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, num_steps, pct_start=0.1)
    for step in track(range(num_steps), description="settling"):
        chance = random.Random(8_000_009 + step)
        scenes = [captions.scenes.describe(captions.scenes.draw(chance), chance) for _ in range(NUM_EACH)]
        labelled = chance.choices(described, k=NUM_EACH)
        joined = [join(chance.choice(described)[0], chance.choice(described)[0], chance) for _ in range(NUM_EACH // 2)]
        others = [text for text, _ in labelled] + chance.choices(glosses, k=NUM_EACH - len(joined)) + joined
        texts = scenes + [dress(text, chance) for text in others]
        tokens = tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
        with fast_autocast():
            states = taller(tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True).hidden_states
        below, out = states[-1 - NUM_ADDED].float(), states[-1].float()
        if step == 0:
            fit_norms(taller, below)
            continue
        concepts = [concept for _, concept in labelled] + nearest_names(below[2 * NUM_EACH :].mean(1), names).argmax(-1).tolist()
        moved = (out[:NUM_EACH] - below[:NUM_EACH]).square().mean() / unit
        apart = (out[NUM_EACH:] - names[concepts, None]).square().mean((1, 2)) / unit
        optimiser.zero_grad(set_to_none=True)
        (STAYING * moved + apart.mean()).backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 99 or step == num_steps - 1:
            first, second = apart.chunk(2)
            told = f"captions moved {moved.item():.3f}, apart {first.mean().item():.3f}, unlabelled {second.mean().item():.3f}"
            print(f"step {step + 1}: {told}\n  " + measure((tokenizer, taller), names, unseen), flush=True)
    part = work / "text_encoder.part"
    taller.half().save_pretrained(part)
    shutil.rmtree(work / "text_encoder", ignore_errors=True)
    os.replace(part, work / "text_encoder")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=default_work())
    parser.add_argument("--steps", type=int, default=800)
    arguments = parser.parse_args()
    settle(arguments.work, arguments.steps)
