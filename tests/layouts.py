"""Tiny models in the layouts of other tools: the names and shapes of the official files, from a pipeline's own tensors."""

import re

import diffusers
import tiny_families as tiny
import torch

RESNET = {
    "norm1.": "in_layers.0.", "conv1.": "in_layers.2.", "norm2.": "out_layers.0.", "conv2.": "out_layers.3.",
    "time_emb_proj.": "emb_layers.1.", "conv_shortcut.": "skip_connection.",
}  # fmt: skip
ENDS = {
    "time_embedding.linear_1.": "time_embed.0.", "time_embedding.linear_2.": "time_embed.2.", "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.", "conv_out.": "out.2.", "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.", "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.", "mid_block.resnets.1.": "middle_block.2.",
}  # fmt: skip


def rename(name, pairs):
    for old, new in pairs.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def ldm_unet(unet):
    """As in Stable Diffusion 1, 2 and XL: blocks are counted through, resnets and attentions stand side by side."""
    per_block = unet.config.layers_per_block + 1
    tensors = unet.state_dict()
    made = {}
    for name, value in tensors.items():
        new = rename(name, ENDS)
        found = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name)
        if found:
            way, block, kind, layer = found[1], int(found[2]), found[3], int(found[4])
            attends = any(other.startswith(f"up_blocks.{block}.attentions.") for other in tensors)
            if kind == "downsamplers":
                new = f"input_blocks.{(block + 1) * per_block}.0.op.{found[5].removeprefix('conv.')}"
            elif kind == "upsamplers":
                new = f"output_blocks.{(block + 1) * per_block - 1}.{1 + attends}.{found[5]}"
            else:
                number = block * per_block + layer + (way == "down")
                new = f"{'input' if way == 'down' else 'output'}_blocks.{number}.{int(kind == 'attentions')}.{found[5]}"
        if "resnets" in name:
            head, _, tail = new.rpartition(".")
            inner = head.rpartition(".")[2] + "."
            new = f"{head.removesuffix(inner[:-1])}{RESNET[inner]}{tail}"
        made[f"model.diffusion_model.{new}"] = value
    return made


VAE = {
    "mid_block.resnets.0.": "mid.block_1.", "mid_block.resnets.1.": "mid.block_2.", "mid_block.attentions.0.": "mid.attn_1.",
    "conv_norm_out.": "norm_out.",
}  # fmt: skip
VAE_ATTENTION = {"group_norm.": "norm.", "to_q.": "q.", "to_k.": "k.", "to_v.": "v.", "to_out.0.": "proj_out."}


def ldm_vae(vae, prefix="first_stage_model."):
    """Blocks of the decoder are counted from the picture's end; attention is a convolution of one pixel."""
    blocks = len(vae.config.block_out_channels)
    made = {}
    for name, value in vae.state_dict().items():
        half, _, rest = name.partition(".")
        if half in ("encoder", "decoder"):
            rest = rename(rest, VAE)
            found = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.*)", rest)
            if found:
                number = int(found[2]) if found[1] == "down" else blocks - 1 - int(found[2])
                kind = {"resnets": f"block.{found[4]}", "downsamplers": "downsample", "upsamplers": "upsample"}[found[3]]
                rest = f"{found[1]}.{number}.{kind}.{found[5]}".replace("conv_shortcut", "nin_shortcut")
            if "attn_1." in rest:
                rest = "mid.attn_1." + rename(rest.removeprefix("mid.attn_1."), VAE_ATTENTION)
                value = value[:, :, None, None] if value.ndim == 2 else value
            name = f"{half}.{rest}"
        made[prefix + name] = value.contiguous()
    return made


def clip(encoder, prefix):
    """As transformers names it, inside a `text_model`."""
    names = {name if name.startswith("text_") else f"text_model.{name}": value for name, value in encoder.state_dict().items()}
    return {prefix + name: value for name, value in names.items()}


OPEN_CLIP = {
    "text_model.encoder.layers.": "transformer.resblocks.", "text_model.final_layer_norm.": "ln_final.",
    "text_model.embeddings.token_embedding.": "token_embedding.",
}  # fmt: skip


def open_clip(encoder, prefix, projection=None):
    """As OpenCLIP names it: queries, keys and values in one matrix, the projection transposed."""
    made, parts = {}, {}
    for name, value in clip(encoder, "").items():
        found = re.match(r"(.*\.self_attn)\.([qkv])_proj\.(weight|bias)", name)
        if found:
            parts.setdefault((found[1], found[3]), {})[found[2]] = value
            continue
        if name == "text_projection.weight":
            made[f"{prefix}text_projection"] = value.T.contiguous()
        elif name.endswith("position_embedding.weight"):
            made[f"{prefix}positional_embedding"] = value
        else:
            new = rename(name, OPEN_CLIP).replace("layer_norm1", "ln_1").replace("layer_norm2", "ln_2")
            new = new.replace(".fc1.", ".c_fc.").replace(".fc2.", ".c_proj.").replace(".self_attn", ".attn")
            made[prefix + new] = value
    for (layer, kind), three in parts.items():
        place = rename(layer, OPEN_CLIP).replace(".self_attn", ".attn")
        made[f"{prefix}{place}.in_proj_{kind}"] = torch.cat([three[one] for one in "qkv"])
    if projection is not None:
        made[f"{prefix}text_projection"] = projection
    return made


def swapped(value):
    return torch.cat(value.chunk(2)[::-1])


def joined(tensors, names):
    return torch.cat([tensors[name] for name in names])


def sd3_transformer(transformer, prefix="model.diffusion_model."):
    tensors, made = transformer.state_dict(), {}
    plain = {
        "pos_embed.proj.": "x_embedder.proj.", "time_text_embed.timestep_embedder.linear_1.": "t_embedder.mlp.0.",
        "time_text_embed.timestep_embedder.linear_2.": "t_embedder.mlp.2.", "proj_out.": "final_layer.linear.",
        "time_text_embed.text_embedder.linear_1.": "y_embedder.mlp.0.", "context_embedder.": "context_embedder.",
        "time_text_embed.text_embedder.linear_2.": "y_embedder.mlp.2.",
    }  # fmt: skip
    inner = {
        "attn.to_out.0.": "x_block.attn.proj.", "attn.to_add_out.": "context_block.attn.proj.",
        "norm1.linear.": "x_block.adaLN_modulation.1.", "norm1_context.linear.": "context_block.adaLN_modulation.1.",
        "ff.net.0.proj.": "x_block.mlp.fc1.", "ff.net.2.": "x_block.mlp.fc2.",
        "ff_context.net.0.proj.": "context_block.mlp.fc1.", "ff_context.net.2.": "context_block.mlp.fc2.",
    }  # fmt: skip
    last = f"transformer_blocks.{transformer.config.num_layers - 1}."
    for name, value in tensors.items():
        found = re.match(r"(transformer_blocks\.(\d+)\.)(.*)", name)
        if name == "pos_embed.pos_embed":
            made["pos_embed"] = value
        elif name.startswith("norm_out.linear."):
            made[name.replace("norm_out.linear.", "final_layer.adaLN_modulation.1.")] = swapped(value)
        elif not found:
            made[rename(name, plain)] = value
        elif not re.match(r"attn\.(to|add)_[qkv]", found[3]):
            turned = name.startswith(f"{last}norm1_context.")
            made[f"joint_blocks.{found[2]}.{rename(found[3], inner)}"] = swapped(value) if turned else value
    for block in range(transformer.config.num_layers):
        here, at = f"transformer_blocks.{block}.attn", f"joint_blocks.{block}"
        for kind in ("weight", "bias"):
            made[f"{at}.x_block.attn.qkv.{kind}"] = joined(tensors, [f"{here}.to_{one}.{kind}" for one in "qkv"])
            made[f"{at}.context_block.attn.qkv.{kind}"] = joined(tensors, [f"{here}.add_{one}_proj.{kind}" for one in "qkv"])
    return {prefix + name: value for name, value in made.items()}


def flux_transformer(transformer, prefix=""):
    tensors, made = transformer.state_dict(), {}
    plain = {
        "time_text_embed.timestep_embedder.linear_1.": "time_in.in_layer.", "proj_out.": "final_layer.linear.",
        "time_text_embed.timestep_embedder.linear_2.": "time_in.out_layer.", "x_embedder.": "img_in.",
        "time_text_embed.text_embedder.linear_1.": "vector_in.in_layer.", "context_embedder.": "txt_in.",
        "time_text_embed.text_embedder.linear_2.": "vector_in.out_layer.",
        "time_text_embed.guidance_embedder.linear_1.": "guidance_in.in_layer.",
        "time_text_embed.guidance_embedder.linear_2.": "guidance_in.out_layer.",
    }  # fmt: skip
    double = {
        "norm1.linear.": "img_mod.lin.", "norm1_context.linear.": "txt_mod.lin.", "attn.to_out.0.": "img_attn.proj.",
        "attn.to_add_out.": "txt_attn.proj.", "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
        "attn.norm_k.weight": "img_attn.norm.key_norm.scale", "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
        "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale", "ff.net.0.proj.": "img_mlp.0.", "ff.net.2.": "img_mlp.2.",
        "ff_context.net.0.proj.": "txt_mlp.0.", "ff_context.net.2.": "txt_mlp.2.",
    }  # fmt: skip
    single = {
        "norm.linear.": "modulation.lin.", "attn.norm_q.weight": "norm.query_norm.scale",
        "attn.norm_k.weight": "norm.key_norm.scale", "proj_out.": "linear2.",
    }  # fmt: skip
    for name, value in tensors.items():
        found = re.match(r"(single_)?transformer_blocks\.(\d+)\.(.*)", name)
        if name.startswith("norm_out.linear."):
            made[name.replace("norm_out.linear.", "final_layer.adaLN_modulation.1.")] = swapped(value)
        elif not found:
            made[rename(name, plain)] = value
        elif not re.match(r"attn\.(to|add)_[qkv]|proj_mlp", found[3]):
            place = rename(found[3], single if found[1] else double)
            made[f"{'single' if found[1] else 'double'}_blocks.{found[2]}.{place}"] = value
    for kind in ("weight", "bias"):
        for block in range(transformer.config.num_layers):
            here, at = f"transformer_blocks.{block}.attn", f"double_blocks.{block}"
            made[f"{at}.img_attn.qkv.{kind}"] = joined(tensors, [f"{here}.to_{one}.{kind}" for one in "qkv"])
            made[f"{at}.txt_attn.qkv.{kind}"] = joined(tensors, [f"{here}.add_{one}_proj.{kind}" for one in "qkv"])
        for block in range(transformer.config.num_single_layers):
            here = f"single_transformer_blocks.{block}"
            parts = [*(f"{here}.attn.to_{one}.{kind}" for one in "qkv"), f"{here}.proj_mlp.{kind}"]
            made[f"single_blocks.{block}.linear1.{kind}"] = joined(tensors, parts)
    return {prefix + name: value for name, value in made.items()}


def sd1():
    pipeline = tiny.sd15()
    parts = clip(pipeline.text_encoder, "cond_stage_model.transformer.")
    return pipeline, ldm_unet(pipeline.unet) | ldm_vae(pipeline.vae) | parts


def sd2():
    pipeline = tiny.sd15()
    width = pipeline.text_encoder.config.hidden_size
    parts = open_clip(pipeline.text_encoder, "cond_stage_model.model.", torch.eye(width))
    return pipeline, ldm_unet(pipeline.unet) | ldm_vae(pipeline.vae) | parts


def sdxl():
    """With text encoders of two widths, as the official one has."""
    small = tiny.sdxl()
    unet = tiny.sd_unet(**{**small.unet.config, "cross_attention_dim": 80, "projection_class_embeddings_input_dim": 96})
    parts = small.components | {"text_encoder_2": tiny.clip_text(True, 48), "unet": unet}
    del parts["image_encoder"], parts["feature_extractor"]
    pipeline = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    made = clip(pipeline.text_encoder, "conditioner.embedders.0.transformer.")
    made |= open_clip(pipeline.text_encoder_2, "conditioner.embedders.1.model.")
    return pipeline, made | ldm_unet(pipeline.unet) | ldm_vae(pipeline.vae)


def sd3():
    """With text encoders of two widths; the projection of the first is the identity, which the official file leaves out."""
    small = tiny.sd3()
    transformer = diffusers.SD3Transformer2DModel(
        **{**small.transformer.config, "joint_attention_dim": 80, "pooled_projection_dim": 80}
    )
    parts = {"text_encoder_2": tiny.clip_text(True, 48), "text_encoder_3": tiny.t5_text(80), "transformer": transformer}
    parts = small.components | parts
    del parts["image_encoder"], parts["feature_extractor"]
    pipeline = diffusers.StableDiffusion3Pipeline(**parts)
    with torch.no_grad():
        pipeline.text_encoder.text_projection.weight.copy_(torch.eye(32))
    first = clip(pipeline.text_encoder, "text_encoders.clip_l.transformer.")
    del first["text_encoders.clip_l.transformer.text_projection.weight"]
    made = first | clip(pipeline.text_encoder_2, "text_encoders.clip_g.transformer.")
    made |= {f"text_encoders.t5xxl.transformer.{name}": value for name, value in pipeline.text_encoder_3.state_dict().items()}
    return pipeline, made | sd3_transformer(pipeline.transformer) | ldm_vae(pipeline.vae)


LAYOUTS = {"sd1": sd1, "sd2": sd2, "sdxl": sdxl, "sd3": sd3}


def write(name, folder):
    """Write a model with random weights twice: in diffusers' layout and as one file; return both paths."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    pipeline, tensors = LAYOUTS[name]()
    pipeline.save_pretrained(folder / "model")
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, folder / f"{name}.safetensors")
    return folder / "model", folder / f"{name}.safetensors"
