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


def clip_tokenizer(limit=77):
    letters = bytes_alphabet()
    names = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {name: number for number, name in enumerate(names)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=limit)


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


def clip_text(projection=False, side=SIDE, limit=77):
    size = {"hidden_size": side, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    marks = {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513, "hidden_act": "gelu"}
    config = transformers.CLIPTextConfig(vocab_size=514, projection_dim=side, max_position_embeddings=limit, **size, **marks)
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


def qwen_vision_text(side=SIDE, layers=2):
    text = {"hidden_size": side, "intermediate_size": side, "num_hidden_layers": layers, "num_attention_heads": 2}
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
    blocks = {"encoder_block_out_channels": (4,) * 6, "decoder_block_out_channels": (4,) * 6, "latent_channels": 4}
    layers = {"encoder_layers_per_block": (1,) * 6, "decoder_layers_per_block": (1,) * 6}
    return diffusers.AutoencoderDC(in_channels=3, **kinds, **blocks, **layers, scaling_factor=0.4)


def sana_transformer(**config):
    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "num_cross_attention_heads": 2, "cross_attention_head_dim": 8}
    sizes = {"in_channels": 4, "out_channels": 4, "num_layers": 1, "caption_channels": SIDE, "cross_attention_dim": 16}
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


def auraflow():
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=SIDE, caption_projection_dim=32, pos_embed_max_size=64,
    )  # fmt: skip
    size = {"d_model": SIDE, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}
    text = transformers.UMT5EncoderModel(transformers.UMT5Config(vocab_size=128, **size))
    return diffusers.AuraFlowPipeline(t5_tokenizer(), text, decoder(), transformer, flow_scheduler(shift=1.73))


def lumina2():
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8, in_channels=16, hidden_size=24, num_layers=1, num_refiner_layers=1, num_attention_heads=3, num_kv_heads=1,
        multiple_of=2, ffn_dim_multiplier=2, axes_dim_rope=(4, 2, 2), axes_lens=(512, 64, 64), cap_feat_dim=SIDE,
    )  # fmt: skip
    return diffusers.Lumina2Pipeline(transformer, flow_scheduler(), bare_decoder(), gemma_text(), gemma_tokenizer())


def gemma1_text(side=SIDE):
    size = {"hidden_size": side, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.GemmaModel(transformers.GemmaConfig(vocab_size=128, head_dim=16, num_key_value_heads=2, **size))


def lumina():
    transformer = diffusers.LuminaNextDiT2DModel(
        sample_size=8, in_channels=4, hidden_size=24, num_layers=1, num_attention_heads=3, num_kv_heads=1, multiple_of=16,
        ffn_dim_multiplier=None, cross_attention_dim=SIDE,
    )  # fmt: skip
    return diffusers.LuminaPipeline(transformer, flow_scheduler(), decoder(), gemma1_text(), gemma_tokenizer())


def cogview3():
    transformer = diffusers.CogView3PlusTransformer2DModel(
        in_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=2, out_channels=4, text_embed_dim=SIDE,
        time_embed_dim=8, condition_dim=2, pos_embed_max_size=16, sample_size=8,
    )  # fmt: skip
    return diffusers.CogView3PlusPipeline(t5_tokenizer(), t5_text(), decoder(), transformer, diffusers.CogVideoXDDIMScheduler())


def cogview4():
    transformer = diffusers.CogView4Transformer2DModel(
        in_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=2, out_channels=4, text_embed_dim=SIDE,
        time_embed_dim=8, condition_dim=4, sample_size=8, rope_axes_dim=(4, 4),
    )  # fmt: skip
    size = {"hidden_size": SIDE, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = transformers.GlmModel(
        transformers.GlmConfig(vocab_size=514, pad_token_id=0, head_dim=8, num_key_value_heads=2, **size)
    )
    scheduler = flow_scheduler(base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True)
    return diffusers.CogView4Pipeline(clip_tokenizer(), text, decoder(), transformer, scheduler)


def chroma():
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=SIDE,
        axes_dims_rope=(4, 4, 8), approximator_hidden_dim=32, approximator_layers=1, approximator_num_channels=16,
    )  # fmt: skip
    return diffusers.ChromaPipeline(flow_scheduler(), bare_decoder(), t5_text(), t5_tokenizer(), transformer)


def hunyuan_dit():
    transformer = diffusers.HunyuanDiT2DModel(
        sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, in_channels=4,
        cross_attention_dim=SIDE, cross_attention_dim_t5=SIDE, pooled_projection_dim=16, hidden_size=24,
    )  # fmt: skip
    size = {"hidden_size": SIDE, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = transformers.BertModel(transformers.BertConfig(vocab_size=128, **size))
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase, *("##" + x for x in string.ascii_lowercase)]
    tokenizer = transformers.BertTokenizer(vocab={name: n for n, name in enumerate(names)}, model_max_length=77)
    parts = (decoder(), text, tokenizer, transformer, sd_scheduler("DDIMScheduler"), None, None)
    return diffusers.HunyuanDiTPipeline(*parts, False, t5_text(), t5_tokenizer())


def pixart_alpha():
    parts = (decoder(), pixart_transformer(use_additional_conditions=False), sd_scheduler("DPMSolverMultistepScheduler"))
    return diffusers.PixArtAlphaPipeline(t5_tokenizer(), t5_text(), *parts)


def latent_consistency():
    return diffusers.LatentConsistencyModelPipeline(
        decoder(), clip_text(), clip_tokenizer(), sd_unet(time_cond_proj_dim=32), sd_scheduler("LCMScheduler"), None, None,
        requires_safety_checker=False,
    )  # fmt: skip


def sana_sprint():
    transformer = sana_transformer(guidance_embeds=True, qk_norm="rms_norm_across_heads", sample_size=32)
    return diffusers.SanaSprintPipeline(gemma_tokenizer(), gemma_text(), deep_decoder(), transformer, diffusers.SCMScheduler())


def flux2_klein(is_distilled=False):
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=3 * SIDE, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = diffusers.AutoencoderKLFlux2(
        **kinds, block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=16, norm_num_groups=4, sample_size=32
    )
    torch.nn.init.uniform_(vae.bn.running_mean), torch.nn.init.uniform_(vae.bn.running_var, 0.5, 2)
    size = {"hidden_size": SIDE, "intermediate_size": 16, "num_hidden_layers": 27, "num_attention_heads": 2}
    text = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(vocab_size=300, head_dim=8, num_key_value_heads=2, **size))
    shifted = flow_scheduler(use_dynamic_shifting=True)
    return diffusers.Flux2KleinPipeline(shifted, vae, text, qwen_tokenizer(), transformer, is_distilled=is_distilled)


def flux2_klein_distilled():
    return flux2_klein(is_distilled=True)


def ovis_image():
    transformer = diffusers.OvisImageTransformer2DModel(
        in_channels=64, out_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=SIDE, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    shifted = flow_scheduler(use_dynamic_shifting=True)
    return diffusers.OvisImagePipeline(shifted, bare_decoder(), qwen3_text(), qwen_tokenizer(), transformer)


def kandinsky3():
    unet = diffusers.Kandinsky3UNet(
        in_channels=4, time_embedding_dim=4, groups=2, attention_head_dim=4, layers_per_block=3, block_out_channels=(32, 64),
        cross_attention_dim=4, encoder_hid_dim=SIDE,
    )  # fmt: skip
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    movq = diffusers.VQModel(
        **blocks, block_out_channels=[8, 8, 8, 8], latent_channels=4, num_vq_embeddings=12, norm_num_groups=4, vq_embed_dim=4
    )
    return diffusers.Kandinsky3Pipeline(t5_tokenizer(), t5_text(), unet, sd_scheduler("DDIMScheduler"), movq)


def hidream():
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_channels=[SIDE, 16], text_emb_dim=2 * SIDE, num_routed_experts=4,
        axes_dims_rope=(4, 2, 2), max_resolution=(128, 128), llama_layers=(0, 1), force_inference_output=True,
    )  # fmt: skip
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=300, **size))
    clips = (clip_text(True, limit=248), clip_tokenizer(248), clip_text(True, limit=248), clip_tokenizer(248))
    parts = (flow_scheduler(), decoder(shift_factor=0.1), *clips, t5_text(), t5_tokenizer(), llama, qwen_tokenizer())
    return diffusers.HiDreamImagePipeline(*parts, transformer)


def bria():
    transformer = diffusers.BriaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=SIDE,
        axes_dims_rope=[0, 4, 4],
    )  # fmt: skip
    return diffusers.BriaPipeline(transformer, flow_scheduler(), decoder(shift_factor=0.0), t5_text(), t5_tokenizer())


def hunyuan_image():
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, text_embed_dim=SIDE, text_embed_2_dim=SIDE, rope_axes_dim=(8, 8),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=8, block_out_channels=(32, 32, 32, 32), layers_per_block=1,
        spatial_compression_ratio=8, sample_size=64, scaling_factor=0.5,
    )  # fmt: skip
    byte_text = transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=400, d_model=SIDE, d_kv=8, d_ff=37, num_layers=1, num_heads=4)
    )
    guider = diffusers.guiders.AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=2)
    texts = (qwen_vision_text(layers=3), qwen_tokenizer(), byte_text, transformers.ByT5Tokenizer())
    return diffusers.HunyuanImagePipeline(flow_scheduler(shift=5.0), vae, *texts, transformer, guider)


def kontext():
    return flux(kind="FluxKontextPipeline")


def flux_fill():
    clips = (clip_text(), clip_tokenizer(), t5_text(), t5_tokenizer())
    transformer = flux_transformer(in_channels=64 + 64 + 256, out_channels=64, guidance_embeds=True)
    return diffusers.FluxFillPipeline(flow_scheduler(), bare_decoder(), *clips, transformer)


def kandinsky22():
    """Two pipelines in one: a prior from the prompt to a picture's embedding, and a decoder."""
    clip = {
        "hidden_size": SIDE,
        "intermediate_size": 37,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "projection_dim": SIDE,
    }
    vision = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(image_size=32, patch_size=16, **clip))
    prior = diffusers.PriorTransformer(num_attention_heads=2, attention_head_dim=16, embedding_dim=SIDE, num_layers=1)
    unet = sd_unet(
        in_channels=4, out_channels=8, addition_embed_type="image", encoder_hid_dim=SIDE, encoder_hid_dim_type="image_proj",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), resnet_time_scale_shift="scale_shift",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    )  # fmt: skip
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    movq = diffusers.VQModel(
        **blocks, block_out_channels=[8, 8, 8, 8], latent_channels=4, num_vq_embeddings=12, norm_num_groups=4, vq_embed_dim=4
    )
    prior_scheduler = diffusers.UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0)
    return diffusers.KandinskyV22CombinedPipeline(
        unet, sd_scheduler("DDIMScheduler"), movq, prior, vision, clip_text(True), clip_tokenizer(), prior_scheduler,
        transformers.CLIPImageProcessor(size=32, crop_size=32),
    )  # fmt: skip


SMOKE = {
    "auraflow": auraflow, "lumina": lumina, "lumina2": lumina2, "cogview3": cogview3, "cogview4": cogview4, "chroma": chroma,
    "hunyuan-dit": hunyuan_dit, "pixart-alpha": pixart_alpha, "latent-consistency": latent_consistency,
    "sana-sprint": sana_sprint, "flux.2-klein": flux2_klein, "ovis-image": ovis_image, "kandinsky3": kandinsky3,
    "hidream": hidream, "bria": bria, "hunyuan-image": hunyuan_image, "kandinsky22": kandinsky22,
}  # fmt: skip
OTHERS = {
    "flux-schnell": flux_schnell,
    "flux.2-klein-distilled": flux2_klein_distilled,
    "kontext": kontext,
    "flux-fill": flux_fill,
}
BUILDERS = {**DEEP, **SMOKE, **OTHERS}


def write(name, folder):
    """Make a family's checkpoint with the same weights at every call, and write it into a folder."""
    torch.manual_seed(0)
    pipeline = BUILDERS[name]()
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipeline.save_pretrained(folder)
    return folder
