"""A model of Stable Diffusion 1.5's size takes its own weight in memory while it is loaded, converted or not, and little more."""

import json
import re
import shutil
import subprocess
import sys

import layouts
import numpy as np
import pytest
import torch

from imagegen.families.components import classes_of, has_weights
from imagegen.families.single_file import clip_tokenizer
from imagegen.sources import bases_folder, read_index

LIMIT = 1.15
CHILD = """
import gc, re, sys
import torch, imagegen
from pathlib import Path
def status(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
imagegen.load(); gc.collect()            # everything that has to be imported
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")   # the peak begins anew
model = imagegen.load(sys.argv[1], dtype=sys.argv[2])
parts = [part for part in model.pipeline.components.values() if isinstance(part, torch.nn.Module)]
weights = [tensor for part in parts for tensor in part.state_dict().values()]
for tensor in weights:
    tensor.reshape(-1)[:: 1024].sum()    # weights that are still in the file come into memory too
print(status("VmHWM") - before, sum(tensor.nbytes for tensor in weights))
"""


def write_random(path, shapes):
    """Write a safetensors file of float16 noise without making its tensors."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    noise = (np.random.default_rng(0).standard_normal(2**22, np.float32) * 0.02).astype(np.float16).tobytes()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for begin in range(0, offset, len(noise)):
            file.write(noise[: offset - begin])


def outlines():
    """Return Stable Diffusion 1.5's components without memory."""
    folder = bases_folder() / "sd1"
    kinds = {name: kind for name, kind in classes_of(folder, read_index(folder)).items() if has_weights(kind)}
    with torch.device("meta"):
        return {
            name: kind.from_config(kind.load_config(folder / name))
            if hasattr(kind, "load_config")
            else kind(kind.config_class.from_pretrained(folder / name))
            for name, kind in kinds.items()
        }


def peak_of(source, dtype):
    done = subprocess.run([sys.executable, "-c", CHILD, str(source), dtype], capture_output=True, text=True, check=True)
    peak, weights = map(int, re.fullmatch(r"(\d+) (\d+)\n", done.stdout).groups())
    print(f"{source.name} in {dtype}: {peak / 2**30:.2f} GiB for {weights / 2**30:.2f} GiB of weights, {peak / weights:.3f}")
    return peak / weights


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, and gives pages back on Linux alone")
@pytest.mark.parametrize("layout", ["folder", "single file"])
def test_peak_is_the_weights(tmp_path, layout):
    parts = outlines()
    if layout == "folder":
        source = shutil.copytree(bases_folder() / "sd1", tmp_path / "model")
        clip_tokenizer(source / "tokenizer").save_pretrained(source / "tokenizer")
        for name, part in parts.items():
            file = "model" if name == "text_encoder" else "diffusion_pytorch_model"
            write_random(source / name / f"{file}.safetensors", {key: value.shape for key, value in part.state_dict().items()})
    else:
        source = tmp_path / "sd1.safetensors"
        tensors = layouts.ldm_unet(parts["unet"]) | layouts.ldm_vae(parts["vae"])
        tensors |= layouts.clip(parts["text_encoder"], "cond_stage_model.transformer.")
        write_random(source, {key: value.shape for key, value in tensors.items()})
    assert peak_of(source, "float32") <= LIMIT
    if layout == "folder":
        assert peak_of(source, "bfloat16") <= LIMIT
