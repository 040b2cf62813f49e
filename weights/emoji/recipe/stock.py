"""What a person writes with plain diffusers for one picture: the yardstick of the cold start."""

import sys

import torch
from diffusers import DiffusionPipeline

folder, out = sys.argv[1:3]
pipeline = DiffusionPipeline.from_pretrained(folder)
generator = torch.Generator("cpu").manual_seed(7)
pipeline("a red apple", num_inference_steps=20, guidance_scale=4.0, generator=generator).images[0].save(out)
