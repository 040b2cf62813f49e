"""Janus-Pro on disk: the official layout and that of transformers, told in the words of one.

Knows configurations and the names of tensors, and opens no file.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PATCH = 16  # pixels along a code's side
Configs = tuple[dict[str, Any], dict[str, Any]]  # of the language model and of the autoencoder, in transformers' words


def converted_config(config: dict[str, Any]) -> Configs:
    """Return both configurations as they stand in transformers' layout."""
    vision = config.get("vision_config", {})
    patches = vision.get("image_size", 384) // vision.get("patch_size", PATCH)
    return config["text_config"], config.get("vq_config", {}) | {"num_patches": patches}


def official_config(config: dict[str, Any]) -> Configs:
    """Return the language model's configuration and the autoencoder's, in transformers' words; published files leave out most."""
    language, head = config["language_config"], config["gen_head_config"]["params"]
    params, aligner = config["gen_vision_config"]["params"], config["gen_aligner_config"]["params"]
    vq = {
        "num_embeddings": params["image_token_size"],
        "embed_dim": params["n_embed"],
        "latent_channels": params.get("z_channels", 256),
        "base_channels": params.get("ch", 128),
        "channel_multiplier": params.get("ch_mult", [1, 1, 2, 2, 4]),
        "num_res_blocks": params.get("num_res_blocks", 2),
        "projection_dim": aligner["n_embed"],
        "num_hidden_layers": aligner["depth"],
        "image_token_embed_dim": head["n_embed"],
        "num_patches": config["vision_config"]["params"]["image_size"] // PATCH,
    }
    return language, vq


UNUSED = re.compile(r"vqmodel\.(encoder|quant_conv)\.")
# Official names, and what they are here; the order matters.
RENAMED = (
    (r"^language_model\.model\.", "language_model."),
    (r"^gen_vision_model\.", "vqmodel."),
    (r"^gen_aligner\.layers\.0\.", "generation_aligner.fc1."),
    (r"^gen_aligner\.layers\.(\d+)\.", lambda found: f"generation_aligner.hidden_layers.{int(found[1]) // 2 - 1}."),
    (r"^gen_head\.output_mlp_projector\.", "generation_head.proj_out."),
    (r"^gen_head\.", "generation_head."),
    (r"^gen_embed\.", "generation_embeddings."),
    (r"\.decoder\.conv_blocks\.", ".decoder.up."),
    (r"\.res\.(\d+)\.", r".block.\1."),
    (r"\.mid\.0\.", ".mid.block_1."),
    (r"\.mid\.1\.", ".mid.attn_1."),
    (r"\.mid\.2\.", ".mid.block_2."),
)
WANTED = ("language_model.", "vqmodel.", "generation_")


def official_name(name: str) -> str | None:
    """Return an official tensor's name here; None for what understands pictures or writes text."""
    if name.startswith("language_model.lm_head.") or name.endswith(".codebook_used"):
        return None
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name if name.startswith(WANTED) and not UNUSED.match(name) else None


def converted_name(name: str) -> str | None:
    """Return the name here of a tensor in transformers' layout; None for what is not needed to draw."""
    name = name.removeprefix("model.")
    return name if name.startswith(WANTED) and not UNUSED.match(name) else None


@dataclass(frozen=True)
class Layout:
    """How one layout is read.

    Attributes:
        configs: from `config.json` to both configurations.
        name_here: from a tensor's name to its name here, those of the autoencoder after `vqmodel.`; to None if it is
            not needed to draw.
    """

    configs: Callable[[dict[str, Any]], Configs]
    name_here: Callable[[str], str | None]


OFFICIAL = Layout(official_config, official_name)
CONVERTED = Layout(converted_config, converted_name)
