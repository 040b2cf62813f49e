"""Tiny checkpoints of every family, with random weights, written to a folder in diffusers' layout.

Each takes milliseconds to make, and draws a picture of 32 to 64 pixels in two steps. Tokenizers know single
letters, so that every prompt is read as it is written.
"""

import string

import diffusers
import torch
import transformers

LETTERS = string.ascii_letters + string.digits + string.punctuation
SIDE = 32  # of a text encoder's hidden states


def bytes_alphabet():
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def clip_tokenizer():
    letters = bytes_alphabet()
    names = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {name: number for number, name in enumerate(names)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def t5_tokenizer():
    names = ["<pad>", "</s>", "<unk>", "▁", *LETTERS]
    return transformers.T5Tokenizer(vocab=[(name, -float(n)) for n, name in enumerate(names)], extra_ids=0, model_max_length=512)


CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content if message.content is string else "
    "message.content[0].text }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen_tokenizer():
    names = [*bytes_alphabet(), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    names += ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    special = [transformers.AddedToken(name, special=True) for name in names[-6:]]
    tokenizer = transformers.Qwen2Tokenizer(vocab={name: n for n, name in enumerate(names)}, merges=[], model_max_length=4096)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = CHAT
    return tokenizer


def gemma_tokenizer():
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", "\n", *LETTERS]
    return transformers.GemmaTokenizer(vocab={name: n for n, name in enumerate(names)}, merges=[], model_max_length=512)


def clip_text(projection=False, side=SIDE):
    size = {"hidden_size": side, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    marks = {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513, "hidden_act": "gelu"}
    config = transformers.CLIPTextConfig(vocab_size=514, projection_dim=side, **size, **marks)
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return kind(config)


def t5_text(side=SIDE):
    size = {"d_model": side, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}
    return transformers.T5EncoderModel(transformers.T5Config(vocab_size=128, **size))


def gemma_text(side=SIDE):
    size = {"hidden_size": side, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Gemma2Config(vocab_size=128, head_dim=16, num_key_value_heads=2, **size)
    return transformers.Gemma2Model(config)


def qwen3_text(side=SIDE, layers=3):
    size = {"hidden_size": side, "intermediate_size": 37, "num_hidden_layers": layers, "num_attention_heads": 2}
    return transformers.Qwen3Model(transformers.Qwen3Config(vocab_size=300, head_dim=16, num_key_value_heads=2, **size))


def qwen_vision_text(side=SIDE):
    text = {"hidden_size": side, "intermediate_size": side, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 2, "vocab_size": 300}
    text["rope_parameters"] = {"mrope_section": [2, 2, 4], "rope_type": "default", "rope_theta": 1000000.0}
    vision = {"depth": 2, "hidden_size": side, "intermediate_size": side, "num_heads": 2, "out_hidden_size": side}
    marks = {"image_token_id": 261, "video_token_id": 262, "vision_start_token_id": 259, "vision_end_token_id": 260}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **marks)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def decoder(channels=4, blocks=4, **config):
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * blocks, "up_block_types": ["UpDecoderBlock2D"] * blocks}
    sizes = {"block_out_channels": [8] * blocks, "latent_channels": channels, "norm_num_groups": 4, "sample_size": 32}
    return diffusers.AutoencoderKL(**kinds, **sizes, **config)


def bare_decoder(channels=16, blocks=4):
    """As FLUX's, with a shift and without the convolutions on the latents."""
    return decoder(channels, blocks, shift_factor=0.1, scaling_factor=0.4, use_quant_conv=False, use_post_quant_conv=False)


def sd_scheduler(kind, **config):
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return getattr(diffusers, kind)(**noise, **config)


def flow_scheduler(**config):
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def sd_unet(**config):
    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    sizes = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 8}
    return diffusers.UNet2DConditionModel(**(blocks | sizes | {"cross_attention_dim": SIDE, "attention_head_dim": 8} | config))


def sd15():
    return diffusers.StableDiffusionPipeline(
        decoder(), clip_text(), clip_tokenizer(), sd_unet(), sd_scheduler("DDIMScheduler", steps_offset=1), None, None,
        requires_safety_checker=False,
    )  # fmt: skip


def sdxl():
    extra = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80}
    unet = sd_unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1), use_linear_projection=True, cross_attention_dim=2 * SIDE, **extra,
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        decoder(), clip_text(), clip_text(True), clip_tokenizer(), clip_tokenizer(), unet,
        sd_scheduler("EulerDiscreteScheduler", steps_offset=1, timestep_spacing="leading"), add_watermarker=False,
    )  # fmt: skip


def sd3():
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=2 * SIDE, caption_projection_dim=32, pooled_projection_dim=2 * SIDE, pos_embed_max_size=16,
    )  # fmt: skip
    clips = (clip_text(True), clip_tokenizer(), clip_text(True), clip_tokenizer())
    return diffusers.StableDiffusion3Pipeline(
        transformer, flow_scheduler(shift=3.0), bare_decoder(), *clips, t5_text(2 * SIDE), t5_tokenizer()
    )


def flux_transformer(**config):
    heads = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 4, 8)}
    layers = {"num_layers": 1, "num_single_layers": 1, "joint_attention_dim": SIDE, "pooled_projection_dim": SIDE}
    return diffusers.FluxTransformer2DModel(**({"patch_size": 1, "in_channels": 64} | heads | layers | config))


def flux(guidance_embeds=True, kind="FluxPipeline"):
    shifted = {"shift": 3.0, "use_dynamic_shifting": True} if guidance_embeds else {"shift": 1.0}
    texts = (clip_text(), clip_tokenizer(), t5_text(), t5_tokenizer())
    transformer = flux_transformer(guidance_embeds=guidance_embeds)
    return getattr(diffusers, kind)(flow_scheduler(**shifted), bare_decoder(), *texts, transformer)


def flux_schnell():
    return flux(guidance_embeds=False)


def pixart_transformer(**config):
    heads = {"num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32, "caption_channels": SIDE}
    sizes = {"sample_size": 32, "num_layers": 1, "patch_size": 2, "in_channels": 4, "out_channels": 8}
    return diffusers.PixArtTransformer2DModel(**(heads | sizes | {"norm_type": "ada_norm_single"} | config))


def pixart_sigma():
    parts = (decoder(), pixart_transformer(use_additional_conditions=False), sd_scheduler("DPMSolverMultistepScheduler"))
    return diffusers.PixArtSigmaPipeline(t5_tokenizer(), t5_text(), *parts)


def deep_decoder():
    """Of Sana's kind: 32 pixels to a latent."""
    kinds = {"encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock", "decoder_act_fns": "silu"}
    blocks = {"encoder_block_out_channels": (8,) * 6, "decoder_block_out_channels": (8,) * 6, "latent_channels": 8}
    layers = {"encoder_layers_per_block": (1,) * 6, "decoder_layers_per_block": (1,) * 6}
    return diffusers.AutoencoderDC(in_channels=3, **kinds, **blocks, **layers, scaling_factor=0.4)


def sana_transformer(**config):
    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "num_cross_attention_heads": 2, "cross_attention_head_dim": 8}
    sizes = {"in_channels": 8, "out_channels": 8, "num_layers": 1, "caption_channels": SIDE, "cross_attention_dim": 16}
    return diffusers.SanaTransformer2DModel(**(heads | sizes | {"sample_size": 16, "patch_size": 1} | config))


def sana():
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    scheduler = diffusers.DPMSolverMultistepScheduler(**flow)
    return diffusers.SanaPipeline(gemma_tokenizer(), gemma_text(), deep_decoder(), sana_transformer(), scheduler)


def video_decoder():
    """Of Qwen-Image's kind: made for films, with statistics of its latents."""
    statistics = {"latents_mean": [0.1 * n for n in range(16)], "latents_std": [1 + 0.1 * n for n in range(16)]}
    sizes = {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    return diffusers.AutoencoderKLQwenImage(**sizes, temperal_downsample=[False, True, True], **statistics)


def qwen_transformer():
    heads = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 4, 8)}
    return diffusers.QwenImageTransformer2DModel(patch_size=2, in_channels=64, out_channels=16, num_layers=1,
                                                 joint_attention_dim=SIDE, **heads)  # fmt: skip


def qwen_image(kind="QwenImagePipeline", **more):
    shifted = flow_scheduler(use_dynamic_shifting=True, shift_terminal=0.02)
    parts = {"scheduler": shifted, "vae": video_decoder(), "text_encoder": qwen_vision_text(), "tokenizer": qwen_tokenizer()}
    return getattr(diffusers, kind)(**parts, transformer=qwen_transformer(), **more)


def z_image():
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=16, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=SIDE,
        axes_dims=[4, 6, 6], axes_lens=[1024, 32, 32], all_patch_size=(2,), all_f_patch_size=(1,),
    )  # fmt: skip
    torch.nn.init.normal_(transformer.x_pad_token)
    torch.nn.init.normal_(transformer.cap_pad_token)
    return diffusers.ZImagePipeline(flow_scheduler(shift=3.0), bare_decoder(), qwen3_text(), qwen_tokenizer(), transformer)


DEEP = {
    "sd1.5": sd15, "sdxl": sdxl, "sd3": sd3, "flux": flux, "pixart-sigma": pixart_sigma, "sana": sana,
    "qwen-image": qwen_image, "z-image": z_image,
}  # fmt: skip
BUILDERS = {**DEEP, "flux-schnell": flux_schnell}


def write(name, folder):
    """Make a family's checkpoint with the same weights at every call, and write it into a folder."""
    torch.manual_seed(0)
    pipeline = BUILDERS[name]()
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipeline.save_pretrained(folder)
    return folder
