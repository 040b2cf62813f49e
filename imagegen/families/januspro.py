"""Janus and Janus-Pro: a language model that writes a picture, one code of its codebook after the other.

No pipeline exists in diffusers, and transformers' own `generate` draws every picture of a batch from one generator and
tells nothing before its end. Here both halves of guidance are one batch, keys and values lie in a cache of fixed size,
and a token is looked up, computed, guided and drawn on the device, without the host reading anything back.
Source: Chen et al. (2025), https://arxiv.org/abs/2501.17811.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn
from transformers import JanusVQVAEConfig, StaticCache
from transformers.models.janus import modeling_janus

from imagegen.families import janus, layouts
from imagegen.families.layouts import PATCH
from imagegen.request import ModelError

STATEFUL = "this model's network writes into its cache at every call, which {} does not do: leave it out"
ONE_BY_ONE = "this model draws its codes one by one, and has no denoising steps to {}: leave it out"
GREY = (128, 128, 128)  # what a preview shows where nothing is drawn yet


class JanusProTransformer(ModelMixin, ConfigMixin):
    """The language model and its head over the codes."""

    @register_to_config
    def __init__(self, language_config: dict[str, Any], vq_config: dict[str, Any]) -> None:
        """Take the configurations in transformers' words."""
        super().__init__()
        vq = JanusVQVAEConfig(**vq_config)
        self.language_model = janus.make_language_model(language_config)
        self.generation_embeddings = nn.Embedding(vq.num_embeddings, vq.embed_dim)
        self.generation_aligner = modeling_janus.JanusVQVAEAlignerMLP(vq)
        self.generation_head = modeling_janus.JanusVQVAEHead(vq)
        self._table: tuple[Any, torch.Tensor] | None = None

    @apply_forward_hook
    def embed_text(self, ids: torch.Tensor) -> torch.Tensor:
        """Return what the language model reads for text, (B, L, width)."""
        return self.language_model.embed_tokens(ids)

    @apply_forward_hook
    def embed_codes(self) -> torch.Tensor:
        """Return what the language model reads for every code, (codes, width): aligned once, then looked up."""
        weights = (self.generation_embeddings.weight, *self.generation_aligner.parameters())
        stamp = [(weight.data_ptr(), weight._version, weight.dtype) for weight in weights]
        if self._table is None or self._table[0] != stamp:
            self._table = (stamp, self.generation_aligner(weights[0]))
        return self._table[1]

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        cache: StaticCache,
        return_dict: bool = True,
    ) -> Any:
        """Return the logits of the code after the last token, (R, codes).

        Args:
            hidden_states: (R, Q, width), the tokens that are new.
            position_ids: (R, Q).
            attention_mask: (R, 1, Q, length of the cache) bool.
            cache: of the tokens before; takes up the new ones.
            return_dict: whether to return diffusers' output class; else a tuple.
        """
        states = self.language_model(
            inputs_embeds=hidden_states, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache
        ).last_hidden_state[:, -1]
        logits = self.generation_head(states)
        return Transformer2DModelOutput(sample=logits) if return_dict else (logits,)


class JanusProDecoder(ModelMixin, ConfigMixin):
    """The codebook and the decoder of the vector-quantised autoencoder; its encoder draws nothing, and is left out."""

    @register_to_config
    def __init__(self, vq_config: dict[str, Any]) -> None:
        """Take the configuration in transformers' words."""
        super().__init__()
        vq = JanusVQVAEConfig(**vq_config)
        self.quantize = modeling_janus.JanusVQVAEVectorQuantizer(vq)
        self.post_quant_conv = nn.Conv2d(vq.embed_dim, vq.latent_channels, 1)
        self.decoder = modeling_janus.JanusVQVAEDecoder(vq)
        self.use_slicing = False

    @apply_forward_hook
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Return pixels, (B, 3, 16·h, 16·w), about [-1, 1] and not clamped, from codes, (B, h, w) int64."""
        parts = codes.split(1) if self.use_slicing else [codes]
        return torch.cat([self._decode(part) for part in parts])

    def _decode(self, codes: torch.Tensor) -> torch.Tensor:
        entries = nn.functional.normalize(self.quantize.embedding(codes), dim=-1)
        return self.decoder(self.post_quant_conv(entries.permute(0, 3, 1, 2).contiguous()))


class JanusProPipeline(DiffusionPipeline):
    """Text to image with Janus and Janus-Pro. A step is a row of codes, and the state after it the codes so far."""

    model_cpu_offload_seq = "transformer->vae"
    _callback_tensor_inputs = ("latents",)
    scheduler = None
    vae_scale_factor = PATCH
    unfit_levers: ClassVar[dict[str, str]] = {
        **{name: STATEFUL.format(name) for name in ("openvino", "cuda-graph", "step-graph")},
        "step-cache": ONE_BY_ONE.format("skip"),
        "fewer-steps": ONE_BY_ONE.format("leave out"),
        "tiny-decoder": "a small decoder is for latents, and this model has codes: leave it out",
    }

    def __init__(self, transformer: Any, vae: Any, tokenizer: Any) -> None:
        """Put the components together."""
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, tokenizer=tokenizer)
        self.image_processor = VaeImageProcessor(vae_scale_factor=PATCH)
        self._interrupt = False

    @property
    def grid(self) -> int:
        """Codes along a side."""
        return self.vae.config.vq_config["num_patches"]

    @property
    def num_timesteps(self) -> int:
        """Steps of every run: rows of codes."""
        return self.grid

    @property
    def size_px(self) -> int:
        """Width and height of every picture."""
        return self.grid * PATCH

    @property
    def max_prompt_tokens(self) -> int:
        """How many tokens of a prompt leave room for the picture."""
        return self.transformer.language_model.config.max_position_embeddings - self.grid**2

    def encode_prompt(self, prompt: Sequence[str]) -> janus.Prompts:
        """Return the ids of prompts, as the model was trained to see them: Janus-Pro has tokens for its roles, Janus words."""
        names = self.tokenizer.get_vocab()
        user, assistant = ("<|User|>", "<|Assistant|>") if "<|User|>" in names else ("User", "Assistant")
        texts = [f"{user}: {text.strip()}\n\n{assistant}:{janus.BEGIN_OF_IMAGE}" for text in prompt]
        return janus.encode_prompts(self.tokenizer, texts, self._execution_device, self.max_prompt_tokens)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        guidance_scale: float = 5.0,
        temperature: float = 1.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
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
            guidance_scale: logits = without + w·(prompt − without); 1 or less is off and then not computed.
            temperature: logits are divided by it; 0 takes the most likely code.
            num_images_per_prompt: pictures of each prompt.
            generator: one for each picture, or one that they share, each drawing in turn.
            num_inference_steps: the rows of codes, if anything.
            width: of the pictures, which can have one size only.
            height: likewise.
            output_type: `pil`, `np`, `pt`, or `latent`: the codes, (B, codes of a picture) int64.
            return_dict: whether to return diffusers' output class; else a tuple.
            callback_on_step_end: called after every row with the pipeline, its number twice, and the codes so far.
            callback_on_step_end_tensor_inputs: `latents`.

        Raises:
            ValueError: another size or number of steps, a negative temperature, or no such tensors.
        """
        self._check(width, height, num_inference_steps, temperature, callback_on_step_end_tensor_inputs)
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        prompts = self.encode_prompt([text for text in texts for _ in range(num_images_per_prompt)])
        writer = Writer(self.transformer, prompts, self.grid**2, guidance_scale, self.tokenizer.pad_token_id)
        shared = generator if isinstance(generator, list) else [generator] * len(prompts.ids)
        self._interrupt = False
        for row in range(self.grid):
            if self._interrupt:
                continue
            draws = _draw(shared, self.grid, writer.num_codes, prompts.ids.device) if temperature > 0 else None
            writer.write_row(self.grid, temperature, draws)
            if callback_on_step_end is not None:
                callback_on_step_end(self, row, row, {"latents": writer.codes[:, : (row + 1) * self.grid]})
        images: Any = writer.codes
        if output_type != "latent":
            images = self.image_processor.postprocess(self.decode(writer.codes), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Return pixels, (B, 3, 16·rows, W), about [-1, 1] and not clamped, from whole rows of codes, (B, n) int64."""
        return self.vae.decode(codes.unflatten(1, (-1, self.grid)))

    @torch.inference_mode()
    def preview(self, codes: torch.Tensor, size: tuple[int, int]) -> Any:
        """Return one picture (PIL, RGB, of that size) from the whole rows among its codes so far, (n,); grey below."""
        from PIL import Image

        canvas = Image.new("RGB", (self.size_px, self.size_px), GREY)
        rows = len(codes) // self.grid
        if rows:
            pixels = self.decode(codes[None, : rows * self.grid])
            canvas.paste(self.image_processor.postprocess(pixels, output_type="pil")[0])
        return canvas if canvas.size == size else canvas.resize(size)

    def _check(self, width: Any, height: Any, num_steps: Any, temperature: float, tensors: Sequence[str]) -> None:
        if (width or self.size_px, height or self.size_px) != (self.size_px, self.size_px):
            raise ValueError(f"this model makes pictures of {self.size_px}x{self.size_px} only, got {width}x{height}")
        if num_steps not in (None, self.grid):
            raise ValueError(f"this model draws {self.grid} rows of codes in as many steps, got {num_steps}")
        if not temperature >= 0:
            raise ValueError(f"temperature is from 0, got {temperature}")
        if not set(tensors) <= set(self._callback_tensor_inputs):
            raise ValueError(f"callbacks can be given {self._callback_tensor_inputs}, got {tuple(tensors)}")


class Writer:
    """One batch being written: the cache, the codes so far, and the logits of the next.

    Attributes:
        codes: (B, all codes of a picture) int64, on the device; zero where not written yet.
        num_codes: codes in the codebook.
        logits: (B, num_codes) float32 of the next code, guided.
    """

    def __init__(self, transformer: Any, prompts: janus.Prompts, length: int, guidance: float, pad: int) -> None:
        """Let the language model read the prompts.

        The half without the prompt keeps the first token and the last, with pads between that it does see: so the
        model was trained. Pads that only fill up a shorter prompt are seen by nobody.
        """
        self.transformer, self.guidance = transformer, guidance
        self.guided = guidance > 1
        ids, real, positions = prompts.ids, prompts.real, prompts.positions
        device, (batch, columns) = ids.device, ids.shape
        self.codes = torch.zeros(batch, length, dtype=torch.long, device=device)
        self.written = 0
        self.column = torch.full((1,), columns, device=device)
        self.position = prompts.lengths[:, None]
        if self.guided:
            without = ids.masked_fill(positions > 0, pad)
            without[:, -1] = ids[:, -1]
            ids, real, positions = (torch.cat(pair) for pair in ((without, ids), (real, real), (positions, positions)))
            self.position = self.position.repeat(2, 1)
        self.columns = torch.arange(columns + length, device=device)
        self.real = torch.nn.functional.pad(real, (0, length), value=True)
        self.cache = StaticCache(config=transformer.language_model.config, max_cache_len=columns + length)
        self.table = transformer.embed_codes()
        self.num_codes = len(self.table)
        self._read(transformer.embed_text(ids), positions, janus.causal_mask(real, columns + length))

    def _read(self, states: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> None:
        """Read tokens, and guide the logits of what comes after them."""
        given = {"hidden_states": states, "position_ids": positions, "attention_mask": mask, "cache": self.cache}
        logits = self.transformer(**given, return_dict=False)[0].float()
        if self.guided:
            without, prompt = logits.chunk(2)
            logits = without + self.guidance * (prompt - without)
        self.logits = logits

    def write_row(self, length: int, temperature: float, draws: torch.Tensor | None) -> None:
        """Write that many codes; nothing is read back from the device.

        Args:
            length: how many.
            temperature: above 0 with draws.
            draws: (length, B, num_codes), standard exponential, on the device; None for the most likely codes.
        """
        for index in range(length):
            self.write(temperature, None if draws is None else draws[index])

    def write(self, temperature: float, draw: torch.Tensor | None) -> None:
        """Choose the next code, and read it unless it is the last.

        The largest of probabilities over exponential draws is a sample of them: `torch.multinomial` does just that.
        """
        if draw is None:
            code = self.logits.argmax(dim=-1)
        else:
            code = (torch.softmax(self.logits / temperature, dim=-1) / draw).argmax(dim=-1)
        self.codes[:, self.written] = code
        self.written += 1
        if self.written < self.codes.shape[1]:
            states = self.table[code][:, None]
            states = torch.cat([states, states]) if self.guided else states
            seen = (self.real & (self.columns <= self.column))[:, None, None]
            self._read(states, self.position, seen)
            self.column += 1
            self.position = self.position + 1


def _draw(generators: Sequence[Any], count: int, num_codes: int, device: torch.device) -> torch.Tensor:
    """Return what a row of codes is drawn with, (count, B, num_codes), from each picture's generator in the order of codes.

    They are drawn one code at a time: a generator gives other numbers to one large call than to several.
    """
    where = generators[0].device if generators[0] is not None else torch.device("cpu")
    draws = torch.empty(count, len(generators), num_codes, device=where, pin_memory=where.type == "cpu" != device.type)
    for step in draws:
        for row, generator in zip(step, generators, strict=True):
            row.exponential_(1, generator=generator)
    return draws.to(device, non_blocking=True)


def load(found: janus.Folder, device: torch.device, dtype: torch.dtype) -> JanusProPipeline:
    """Load a folder of Janus or Janus-Pro, in the official layout or that of transformers.

    Args:
        found: the model's folder.
        device: where to run.
        dtype: of the weights and of what is computed.

    Raises:
        ModelError: something is missing, damaged or of another model.
    """
    folder, config = found.folder, found.config
    layout = layouts.CONVERTED if config["model_type"] == "janus" else layouts.OFFICIAL
    language, vq = layout.configs(config)
    with init_empty_weights(include_buffers=False):
        transformer, decoder = JanusProTransformer(language, vq), JanusProDecoder(vq)
    weights = janus.read_weights(found.weights(), layout.name_here, dtype)
    drawn = {name.removeprefix("vqmodel."): weights.pop(name) for name in list(weights) if name.startswith("vqmodel.")}
    tokenizer = janus.read_tokenizer(folder)
    if janus.BEGIN_OF_IMAGE not in tokenizer.get_vocab():
        raise ModelError(f"the tokenizer of {str(folder)!r} has no {janus.BEGIN_OF_IMAGE}: take the model's own tokenizer files")
    return JanusProPipeline(janus.fill(transformer, weights, folder), janus.fill(decoder, drawn, folder), tokenizer).to(device)
