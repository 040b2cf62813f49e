"""JanusFlow: a language model that denoises. Its network, its pipeline in diffusers' manner, and how its folder is read.

No pipeline exists in diffusers. At every step the language model reads the prompt, a token of the time and the latents
as tokens, and its last states become a velocity. The prompt's keys and values never change, so they are computed once.
Source: Ma et al. (2024), https://arxiv.org/abs/2411.07975.
"""

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.torch_utils import randn_tensor
from torch import nn
from transformers import DynamicCache

from imagegen.families import janus
from imagegen.families.convnext import LatentEncoder, VelocityDecoder
from imagegen.request import ModelError

Prefix = tuple[tuple[torch.Tensor, torch.Tensor], ...]
PARTS = ("vision_gen_enc_model.", "vision_gen_enc_aligner.", "vision_gen_dec_")
VAE_WANTED = "the folder of an AutoencoderKL for these latents, as stabilityai/sdxl-vae is (config.json and its weights)"


class Remembered:
    """What a language model asks of a cache: its keys and values before the new ones. Keeps nothing of a call."""

    def __init__(self, prefix: Prefix) -> None:
        """Take each layer's keys and values."""
        self.prefix = prefix

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, **_more: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all keys and values that a layer's new tokens may see; `_more` is what newer transformers tell a cache."""
        before = self.prefix[layer]
        return torch.cat([before[0], keys], dim=2), torch.cat([before[1], values], dim=2)


class JanusFlowTransformer(ModelMixin, ConfigMixin):
    """The language model between the latents' encoder and the velocity's decoder."""

    @register_to_config
    def __init__(
        self, language_config: dict[str, Any], encoder_config: dict[str, Any], decoder_config: dict[str, Any], grid: int
    ) -> None:
        """Take the checkpoint's configurations and the number of image tokens along a side."""
        super().__init__()
        width, channels = encoder_config["hidden_size"], encoder_config["block_out_channels"][0]
        self.language_model = janus.make_language_model(language_config)
        self.vision_gen_enc_model = LatentEncoder(encoder_config)
        self.vision_gen_enc_aligner = nn.Linear(channels, width)
        self.vision_gen_dec_aligner_norm = nn.RMSNorm(width, eps=decoder_config["norm_eps"])
        self.vision_gen_dec_aligner = nn.Linear(width, decoder_config["in_channels"])
        self.vision_gen_dec_model = VelocityDecoder(decoder_config)
        self.register_to_config(in_channels=encoder_config["input_channels"], sample_size=grid * encoder_config["stride"])

    @apply_forward_hook
    def read_prompts(self, prompts: janus.Prompts) -> Prefix:
        """Let the language model read the prompts, once; return each layer's keys and values, (B, heads, L, width)."""
        cache = DynamicCache(config=self.language_model.config)
        mask = janus.causal_mask(prompts.real, prompts.ids.shape[1])
        self.language_model(prompts.ids, attention_mask=mask, position_ids=prompts.positions, past_key_values=cache)
        return tuple((layer.keys, layer.values) for layer in cache.layers)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        prefix: Prefix,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        return_dict: bool = True,
    ) -> Any:
        """Return the velocity, data minus noise, of every row.

        Args:
            hidden_states: (B, 4, h, w), the latents.
            timestep: (), 1000 times the time, which is 0 at noise and 1 at data.
            prefix: keys and values of R prompts, a multiple of B: each picture's rows are B apart.
            attention_mask: (R, 1, 1 + T, L + 1 + T) bool, T the number of image tokens.
            position_ids: (R, 1 + T).
            return_dict: whether to return diffusers' output class; else a tuple.

        Returns:
            (R, 4, h, w).
        """
        rows = len(prefix[0][0]) // len(hidden_states)
        features, time = self.vision_gen_enc_model(hidden_states, timestep.expand(len(hidden_states)))
        tokens = self.vision_gen_enc_aligner(features.flatten(2).transpose(1, 2))
        features, time, tokens = (torch.cat([part] * rows) for part in (features, time, tokens))
        states = self.language_model(
            inputs_embeds=torch.cat([time[:, None], tokens], dim=1),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=Remembered(prefix),
        ).last_hidden_state[:, 1:]
        states = self.vision_gen_dec_aligner(self.vision_gen_dec_aligner_norm(states))
        states = states.transpose(1, 2).unflatten(2, features.shape[-2:])
        velocity = self.vision_gen_dec_model(states, features, time)
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)


class JanusFlowPipeline(DiffusionPipeline):
    """Text to image with JanusFlow.

    The scheduler is diffusers' Euler for flows with its times turned round: 0 is noise, 1 is data, and the network's
    output is data minus noise. Latents stay in float32 between the steps, whatever the network computes in.
    """

    model_cpu_offload_seq = "transformer->vae"
    _callback_tensor_inputs = ("latents",)
    unfit_levers: ClassVar[dict[str, str]] = {
        "openvino": "OpenVINO cannot read this model's network, which takes keys and values: use compile"
    }

    def __init__(self, transformer: Any, vae: Any, tokenizer: Any, scheduler: Any) -> None:
        """Put the components together."""
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, tokenizer=tokenizer, scheduler=scheduler)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._interrupt, self._num_timesteps = False, 0

    @property
    def num_timesteps(self) -> int:
        """Steps of the run that goes on, or was the last."""
        return self._num_timesteps

    @property
    def size_px(self) -> int:
        """Width and height of every picture."""
        return self.transformer.config.sample_size * self.vae_scale_factor

    @property
    def max_prompt_tokens(self) -> int:
        """How many tokens of a prompt leave room for the picture."""
        return self.transformer.language_model.config.max_position_embeddings - 1 - self.transformer.config.grid**2

    def encode_prompt(self, prompt: Sequence[str]) -> janus.Prompts:
        """Return the ids of prompts, as the model was trained to see them; the tag that ends them is a token of the time."""
        texts = [f"User: {text.strip()}\n\nAssistant:" for text in prompt]
        return janus.encode_prompts(self.tokenizer, texts, self._execution_device, self.max_prompt_tokens)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        num_inference_steps: int = 30,
        guidance_scale: float = 2.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        width: int | None = None,
        height: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Any:
        """Make pictures.

        Args:
            prompt: one, or several, of any lengths.
            num_inference_steps: Euler steps.
            guidance_scale: v = w·v_prompt + (1 − w)·v_without; 1 or less is off and then not computed.
            num_images_per_prompt: pictures of each prompt.
            generator: one, or one for each picture.
            latents: (B, 4, h, w) of unit variance to start from.
            width: of the pictures, which can have one size only.
            height: likewise.
            output_type: `pil`, `np`, `pt`, or `latent`.
            return_dict: whether to return diffusers' output class; else a tuple.
            callback_on_step_end: called with the pipeline, the step's number, its time and the tensors asked for.
            callback_on_step_end_tensor_inputs: `latents`.

        Raises:
            ValueError: another size, or no such tensors.
        """
        self._check(width, height, callback_on_step_end_tensor_inputs)
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        prompts = self.encode_prompt([text for text in texts for _ in range(num_images_per_prompt)])
        device, batch, side = self._execution_device, len(prompts.ids), self.transformer.config.sample_size
        if latents is None:
            shape = (batch, self.transformer.config.in_channels, side, side)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        latents = latents.to(device, torch.float32)
        context = context_of(self.transformer, prompts, guided=guidance_scale > 1)

        self._set_times(num_inference_steps, device)
        for index, time in enumerate(self.scheduler.timesteps):
            if self._interrupt:
                continue
            sample = latents.to(self.transformer.dtype)
            velocity = self.transformer(hidden_states=sample, timestep=time, **context, return_dict=False)[0].float()
            if guidance_scale > 1:
                without, given = velocity.chunk(2)
                velocity = guidance_scale * given + (1 - guidance_scale) * without
            latents = self.scheduler.step(velocity, time, latents, return_dict=False)[0]
            if callback_on_step_end is not None:
                latents = callback_on_step_end(self, index, time, {"latents": latents}).get("latents", latents)
        images = latents
        if output_type != "latent":
            images = self.image_processor.postprocess(self.decode(latents), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Return pixels, (B, 3, H, W), not clamped to [-1, 1], of finished latents."""
        latents = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        return self.vae.decode(latents, return_dict=False)[0]

    def _set_times(self, num_steps: int, device: torch.device) -> None:
        """Give the scheduler the times i / N; its own are 1 − (1 − i / N), rounded twice, which latents show at 1e-5."""
        times = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
        self.scheduler.set_timesteps(sigmas=(1 - times[:-1]).tolist(), device=device)
        self.scheduler.sigmas = times.to(device, torch.float32)
        self.scheduler.timesteps = (1000 * times[:-1]).to(device, torch.float32)
        self.scheduler.set_begin_index(0)
        self._num_timesteps, self._interrupt = num_steps, False

    def _check(self, width: int | None, height: int | None, tensors: Sequence[str]) -> None:
        if (width or self.size_px, height or self.size_px) != (self.size_px, self.size_px):
            raise ValueError(f"JanusFlow makes pictures of {self.size_px}x{self.size_px} only, got {width}x{height}")
        if not set(tensors) <= set(self._callback_tensor_inputs):
            raise ValueError(f"callbacks can be given {self._callback_tensor_inputs}, got {tuple(tensors)}")


def context_of(network: JanusFlowTransformer, prompts: janus.Prompts, guided: bool) -> dict[str, Any]:
    """Return what the network needs of the prompts at every step: their keys and values, who sees what, and positions.

    The half without the prompt sees its beginning-of-text token and nothing else of it; that token saw only itself,
    so that its keys and values are the same in both halves. Image tokens keep their positions after the prompt.
    """
    prefix, seen = network.read_prompts(prompts), prompts.real
    tokens = network.config.grid**2 + 1
    positions = prompts.lengths[:, None] + torch.arange(tokens, device=seen.device)
    if guided:
        first = prompts.real & (prompts.positions == 0)
        seen, positions = torch.cat([first, seen]), torch.cat([positions] * 2)
        prefix = tuple((torch.cat([keys] * 2), torch.cat([values] * 2)) for keys, values in prefix)
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=seen.device).tril().expand(len(seen), -1, -1)
    mask = torch.cat([seen[:, None].expand(-1, tokens, -1), causal], dim=2)
    return {"prefix": prefix, "attention_mask": mask[:, None], "position_ids": positions}


def load(found: janus.Folder, vae: Path, device: torch.device, dtype: torch.dtype) -> JanusFlowPipeline:
    """Load an official JanusFlow folder.

    Args:
        found: the model's folder.
        vae: the folder of the decoder, from `find_vae`.
        device: where to run.
        dtype: of the weights and of what is computed.

    Raises:
        ModelError: something is missing, damaged or of another model.
    """
    if dtype == torch.float16:
        raise ModelError("JanusFlow's decoder overflows in float16: use dtype='bfloat16' or 'float32'")
    config = found.config
    encoder, decoder = config["vision_gen_enc_config"]["params"], config["vision_gen_dec_config"]["params"]
    grid = config["vision_und_enc_config"]["params"]["image_size"] // 16
    with init_empty_weights(include_buffers=False):
        transformer = JanusFlowTransformer(config["language_config"], encoder, decoder, grid)
    weights = janus.read_weights(found.weights(), _name_here, dtype)
    return JanusFlowPipeline(
        janus.fill(transformer, weights, found.folder),
        _load_vae(vae, dtype),
        janus.read_tokenizer(found.folder),
        FlowMatchEulerDiscreteScheduler(shift=1.0, invert_sigmas=True),
    ).to(device)


def _name_here(name: str) -> str | None:
    """Return a tensor's name in `JanusFlowTransformer`; None for those that understand pictures or write text."""
    if name.startswith("language_model.model."):
        return name.replace("language_model.model.", "language_model.", 1)
    return name if name.startswith(PARTS) else None


def find_vae(folder: Path) -> Path:
    """Return the decoder's folder: this one, or the `vae/` inside.

    Raises:
        ModelError: there is none.
    """
    if folder.is_file():
        raise ModelError(f"vae={str(folder)!r} is one file: for JanusFlow give {VAE_WANTED}")
    for found in (folder / "vae", folder):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if json.loads((found / "config.json").read_text(encoding="utf-8")).get("_class_name") == "AutoencoderKL":
                return found
    raise ModelError(f"JanusFlow needs a decoder beside its own weights, and {str(folder)!r} has none: pass vae=, {VAE_WANTED}")


def _load_vae(folder: Path, dtype: torch.dtype) -> Any:
    try:
        vae = AutoencoderKL.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True)
    except Exception as error:  # whatever the libraries raise
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{str(folder)!r} cannot be loaded as JanusFlow's decoder ({reason}): vae= takes {VAE_WANTED}") from None
    return vae.eval()
