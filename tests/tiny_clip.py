"""A tiny Stable Diffusion with a CLIP text encoder and a tokenizer of its own, random weights: a folder in diffusers' layout."""

import json

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


def make_tokenizer(folder):
    """Return CLIP's tokenizer with letters for words."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def make_stable_diffusion(folder):
    """Write the model's folder and return it."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(folder / "letters")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = CLIPTextModel(
        CLIPTextConfig(vocab_size=54, max_position_embeddings=16, bos_token_id=52, eos_token_id=53, pad_token_id=53, **sizes)
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
    )
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    vae = AutoencoderKL(**kinds, block_out_channels=(8, 8, 8, 8), latent_channels=4, norm_num_groups=4, sample_size=64)
    parts = (vae, text, tokenizer, unet, PNDMScheduler(skip_prk_steps=True, steps_offset=1), None, None)
    pipeline = StableDiffusionPipeline(*parts, requires_safety_checker=False)
    pipeline.save_pretrained(folder / "model")
    return folder / "model"
