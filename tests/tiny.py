"""Tiny models with random weights, for the tests of levers: a UNet under a `Model`, a FLUX under a plan alone.

Both are made anew, with equal weights, in milliseconds; both draw a picture of whole numbers, (B, H, W, 3).
"""

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

from imagegen.levers import RunFacts
from imagegen.model import Model
from imagegen.speed import EXACT, AppliedPlan, find_plan


def make_decoder():
    torch.manual_seed(1)
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    sizes = {"block_out_channels": (8, 8, 8, 8), "latent_channels": 4, "norm_num_groups": 4, "sample_size": 64}
    return AutoencoderKL(**kinds, **sizes, shift_factor=0.0).eval()


class Bench:
    """A pipeline, the plan it is under, and a picture to compare."""

    def snapshot(self):
        """Return the attributes of every part of the pipeline, attention processors included."""
        parts = [part for part in self.pipeline.components.values() if isinstance(part, torch.nn.Module)]
        modules = [module for part in parts for module in part.modules()]
        processors = [module.processor for module in modules if hasattr(module, "processor")]
        kept = {id(owner): sorted(vars(owner)) for owner in (self.pipeline, *modules, *processors)}
        forwards = {id(module): vars(module).get("forward") for module in modules}
        layouts = [(weight.shape, weight.stride(), weight.dtype) for part in parts for weight in part.parameters()]
        return kept, forwards, layouts

    def add_lora(self):
        """Add a LoRA whose weights are not zero, the same at every call."""
        from peft import LoraConfig

        torch.manual_seed(2)
        self.denoiser.add_adapter(LoraConfig(r=4, lora_alpha=16, target_modules=["to_q", "to_v"], init_lora_weights=False))


class ModelBench(Bench):
    """A model, its own pictures."""

    size = 64

    def __init__(self, model):
        self.model, self.pipeline, self.denoiser = model, model.pipeline, model.pipeline.unet
        self.set_plan = model.set_plan

    def draw(self, num_steps=8, size=None, on_step=None, prompt="a red heart", **settings):
        side = {"width": size or self.size, "height": size or self.size}
        settings = {"seed": 1, "num_steps": num_steps, **side, **settings}
        return np.stack([np.asarray(image) for image in self.model.run(prompt, on_step, **settings).images]).astype(int)

    def report(self):
        return self.model.applied

    def raise_in(self, index):
        def on_step(step):
            if step.index == index:
                raise RuntimeError("stop here")

        try:
            self.draw(on_step=on_step)
        except RuntimeError as error:
            assert str(error) == "stop here"

    def stop_in(self, index):
        steps = self.model.stream("a red heart", seed=1, num_steps=8, width=self.size, height=self.size)
        for step in steps:
            if step.index == index:
                break
        steps.close()


ONE_BLOCK = {
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "mid_block_type": None,
    "block_out_channels": (32,),
}


def make_unet(model, **config):
    """Return a bench with a tiny UNet and decoder between the embedded model's text encoder and scheduler."""
    torch.manual_seed(0)
    kinds = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (32, 64),
    }
    unet = UNet2DConditionModel(
        **(kinds | config),
        sample_size=8,
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=384,
        attention_head_dim=8,
    ).eval()
    own = model.pipeline
    parts = (make_decoder(), own.text_encoder, own.tokenizer, unet, own.scheduler)
    pipeline = StableDiffusionPipeline(*parts, None, None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return ModelBench(Model("emoji", model.folder, model.family, pipeline))


class FluxBench(Bench):
    """A tiny FLUX, which `Model` does not run yet: the stock pipeline under a plan."""

    def __init__(self):
        torch.manual_seed(0)
        heads = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 4, 8)}
        layers = {"num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32}
        self.denoiser = FluxTransformer2DModel(patch_size=1, in_channels=16, **heads, **layers).eval()
        parts = (FlowMatchEulerDiscreteScheduler(), make_decoder(), None, None, None, None, self.denoiser)
        self.pipeline = FluxPipeline(*parts)
        self.pipeline.set_progress_bar_config(disable=True)
        self.text = {"prompt_embeds": torch.randn(1, 8, 32), "pooled_prompt_embeds": torch.randn(1, 32)}
        self.applied = AppliedPlan(EXACT, self.pipeline)

    def set_plan(self, plan):
        self.applied.undo()
        self.applied = AppliedPlan(find_plan(plan, "flux"), self.pipeline)

    def report(self):
        return self.applied.report()

    def draw(self, num_steps=8, size=64, on_step=None):
        def after_step(pipe, index, _timestep, _tensors):
            self.applied.advance(index, pipe.num_timesteps)
            if on_step is not None:
                on_step(pipe, index)
            return {}

        with self.applied.running(RunFacts(False, num_steps)):
            settings = {"width": size, "height": size, "num_inference_steps": num_steps, "output_type": "np"}
            seeded = torch.Generator().manual_seed(1)
            images = self.pipeline(**self.text, **settings, generator=seeded, callback_on_step_end=after_step).images
        return (images * 65535).round().astype(int)  # finer than a PNG: random weights draw faint pictures

    def raise_in(self, index):
        def on_step(_pipe, step):
            if step == index:
                raise RuntimeError("stop here")

        try:
            self.draw(on_step=on_step)
        except RuntimeError as error:
            assert str(error) == "stop here"

    def stop_in(self, index):
        def on_step(pipe, step):
            pipe._interrupt = step >= index

        self.draw(on_step=on_step)
