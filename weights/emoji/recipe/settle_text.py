"""Teach the text encoder to settle: two more layers turn what may mean several things into what one thing's name is.

The taught encoder puts a description between the names of what it may mean, and the denoiser draws what lies between two
animals as something between them. In the first added layer a token sees the mean of its text (its attention is uniform), in
the second itself alone; they begin as the identity, and everything below them stays. Tokens of a description become what
those of the name are that the whole text is nearest to: described things, WordNet's glosses of anything, and beginnings and
ends of two descriptions. Tokens of captions become what the shipped encoder makes of them, which its denoiser can read.

Reads and writes `text_encoder/` and `tokenizer/` of the work folder. All outputs of the encoder are computed once, then a
step takes a tenth of a second.
"""

import argparse
import copy
import random
from pathlib import Path

import torch
from build_data import default_work
from captions import descriptions_for_denoiser, descriptions_for_text, dress
from precision import fast_autocast
from rich.progress import track
from text import MAX_TOKENS, embed, load_text_encoder, with_fewer_words, write_text_encoder
from torch import nn
from torch.nn import functional as F
from train_text import (
    SHARPNESS,
    SHIPPED,
    Captions,
    check_same_words,
    cosines_to,
    embed_names,
    measure,
    read_glosses,
    wordnet_lines,
)
from transformers import BertModel

NUM_ADDED = 2  # layers
NUM_WORDS = 22_000  # of 30,522: the layers have to fit into the 95 MB that the model may weigh
NUM_CAPTIONS, NUM_DESCRIPTIONS = 8000, 33_000
CAPTION_TOKENS, DESCRIPTION_TOKENS = 256, 768  # of a step
LEARNING_RATE = 1e-3
STAYING = 2.0  # weight of captions that stay what they are
CHOOSING = 0.3  # weight of being nearest to the right name, beside being near it


class Settling(nn.Module):
    """The added layers, one token at a time, each with the mean of its text: (N, 384) all."""

    def __init__(self, taller: BertModel):
        """Make the first layer's attention uniform, its values the tokens as they are, and switch the others' off."""
        super().__init__()
        self.layers = nn.ModuleList(taller.encoder.layer[-NUM_ADDED:])
        for layer in self.layers:
            attention = layer.attention.self
            nn.init.eye_(attention.value.weight)
            silent = (attention.query, attention.key, layer.attention.output.dense)
            for weight in (attention.value.bias, *(weight for part in silent for weight in part.parameters())):
                nn.init.zeros_(weight)

    def learning(self) -> list[nn.Parameter]:
        """Return what learns: all but the attention, and what becomes of the first one's."""
        parts = [part for layer in self.layers for part in (layer.attention.output.LayerNorm, layer.intermediate, layer.output)]
        return [weight for part in (self.layers[0].attention.output.dense, *parts) for weight in part.parameters()]

    def forward(self, tokens: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
        """Return the settled tokens.

        Args:
            tokens: any of a text's.
            means: over the text's own tokens, without padding, which attention does not see.
        """
        tokens = tokens + self.layers[0].attention.output.dense(means)
        for layer in self.layers:
            tokens = layer.attention.output.LayerNorm(tokens)
            tokens = layer.output.LayerNorm(tokens + layer.output.dense(F.gelu(layer.intermediate.dense(tokens))))
        return tokens


def with_more_layers(model: BertModel, seen: torch.Tensor) -> BertModel:
    """Return the encoder with layers that change next to nothing.

    Args:
        model: the encoder.
        seen: (B, T, 384) of its outputs, whose spread the added norms have to give back.
    """
    before = len(model.encoder.layer)
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = before + NUM_ADDED
    taller = BertModel(config)
    taller.load_state_dict(model.state_dict(), strict=False)
    taller.config.use_attention_mask = True
    flat = seen.flatten(0, 1)
    normal = F.layer_norm(flat, flat.shape[1:])
    slope = ((flat - flat.mean(0)) * (normal - normal.mean(0))).mean(0) / normal.var(0, correction=0)
    with torch.no_grad():
        for layer in taller.encoder.layer[before:]:
            layer.output.dense.weight.mul_(0.1)
            layer.output.dense.bias.zero_()
            for norm in (layer.attention.output.LayerNorm, layer.output.LayerNorm):
                norm.weight.copy_(slope)
                norm.bias.copy_(flat.mean(0) - slope * normal.mean(0))
    return taller.eval()


def join(first: str, second: str, chance: random.Random) -> str:
    """Return the beginning of one text and the end of another."""
    first_words, second_words = first.split(), second.split()
    return " ".join(first_words[: chance.randint(1, len(first_words))] + second_words[chance.randrange(len(second_words)) :])


def write_texts(work: Path, captions: Captions) -> tuple[list[str], list[str]]:
    """Return captions of scenes, and a third each of described things, glosses of anything and joined descriptions."""
    chance = random.Random(6)
    labelled, glosses = read_glosses(work, captions.names)
    described = [text for text, _ in labelled] + [text for texts in descriptions_for_text().values() for text in texts]
    num_each = NUM_DESCRIPTIONS // 3
    others = chance.choices(described, k=num_each) + chance.choices(glosses, k=num_each)
    others += [join(chance.choice(described), chance.choice(described), chance) for _ in range(num_each)]
    said = [captions.scenes.describe(captions.scenes.draw(chance), chance) for _ in range(NUM_CAPTIONS)]
    return said, [dress(text, chance) for text in others]


def outputs(encoder: tuple, texts: list[str], what: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens of texts, (B, 32, 384) float16, and the means over those that are no padding, (B, 384) float32."""
    blocks = track(range(0, len(texts), 64), description=what)
    with fast_autocast():
        tokens = torch.cat([embed(encoder, texts[start : start + 64]).half() for start in blocks])
    said = encoder[0](texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt").attention_mask
    means = [(part * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
             for part, mask in zip(tokens.split(512), said.split(512), strict=True)]  # fmt: skip
    return tokens, torch.cat(means).float()


def settle(work: Path, num_steps: int) -> None:
    """Train the added layers, say every 250 steps how they fare on descriptions that no encoder was taught, and write all."""
    torch.manual_seed(0)
    encoder, shipped, captions = load_text_encoder(work), load_text_encoder(SHIPPED), Captions(work)
    check_same_words(shipped, encoder[0], work)
    names, own_names = embed_names(shipped, captions.names), embed_names(encoder, captions.names)
    untaught = descriptions_for_denoiser().items()
    unseen = [(captions.names.index(name), text) for name, texts in untaught for text in texts][::11]
    print("before: " + measure(encoder, own_names, unseen), flush=True)
    said, others = write_texts(work, captions)
    wanted, _ = outputs(shipped, said, "captions, shipped encoder")
    given, given_means = outputs(encoder, said, "captions")
    tokens, token_means = outputs(encoder, others, "descriptions")
    nearest = torch.cat([cosines_to(own_names, part.float().mean(1)).argmax(-1) for part in tokens.split(512)])
    taller = with_more_layers(encoder[1], torch.cat([given[:200], tokens[:200]]).float())
    settling = Settling(taller)
    wanted, given, tokens, num_tokens = wanted.flatten(0, 1), given.flatten(0, 1), tokens.flatten(0, 1), tokens.shape[1]
    unit = (names - names.mean(0)).square().mean()
    learning = settling.learning()
    optimiser = torch.optim.AdamW(learning, LEARNING_RATE, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, num_steps, pct_start=0.1)
    for step in track(range(num_steps), description="settling"):
        chance = torch.Generator().manual_seed(step)
        caption = torch.randint(len(given), (CAPTION_TOKENS,), generator=chance)
        other = torch.randint(len(tokens), (DESCRIPTION_TOKENS,), generator=chance)
        around = torch.cat([given_means[caption // num_tokens], token_means[other // num_tokens]])
        changed = settling(torch.cat([given[caption], tokens[other]]).float(), around)
        stayed, settled = changed.split([CAPTION_TOKENS, DESCRIPTION_TOKENS])
        concepts = nearest[other // num_tokens]
        moved = (stayed - wanted[caption].float()).square().mean() / unit
        apart = (settled - names[concepts]).square().mean() / unit
        chosen = F.cross_entropy(SHARPNESS * cosines_to(names, settled), concepts)
        optimiser.zero_grad(set_to_none=True)
        (STAYING * moved + apart + CHOOSING * chosen).backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimiser.step()
        schedule.step()
        if step % 250 == 249 or step == num_steps - 1:
            told = f"captions moved {moved.item():.3f}, descriptions apart {apart.item():.3f}, chosen {chosen.item():.3f}"
            print(f"step {step + 1}: {told}\n  " + measure((encoder[0], taller), names, unseen), flush=True)
    glosses = [line.rpartition(" | ")[2].lower() for line in wordnet_lines(work, "noun", "verb", "adj", "adv")]
    smaller = with_fewer_words((encoder[0], taller), said + others + glosses, NUM_WORDS)
    print(f"with {NUM_WORDS} words: " + measure(smaller, names, unseen), flush=True)
    write_text_encoder(smaller, work)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=default_work())
    parser.add_argument("--steps", type=int, default=2500)
    arguments = parser.parse_args()
    settle(arguments.work, arguments.steps)
