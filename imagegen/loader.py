"""From what a user names to a loaded model: where it is, of which family, on which device, in which dtype."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from imagegen.catalog import EMBEDDED, FAMILIES, Family, family_of
from imagegen.families import diffusion, janus
from imagegen.families.loading import pipeline_class
from imagegen.families.outline import outline
from imagegen.model import Model
from imagegen.request import ModelError
from imagegen.sources import Source, files_of, find_source, local_path
from imagegen.speed import Plan
from imagegen.weights import stored_dtype


def load(
    source: str | Path = EMBEDDED,
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    plan: str | Path | Plan = "exact",
    local_files_only: bool = False,
    variant: str | None = None,
    base: str | Path | None = None,
    vae: str | Path | None = None,
    memory_gib: float | None = None,
) -> Model:
    """Load a model; touches the network for a hub id alone, and not for one with `local_files_only` or HF_HUB_OFFLINE=1.

    Args:
        source: `emoji`, the embedded model; a folder in diffusers' layout; a `.safetensors` file in that of Stable
            Diffusion 1, 2, XL, 3 or FLUX; a `.gguf` file; a Janus model's folder or file; or a hub id, as in `org/name`
            or `org/name@revision`.
        revision: branch, tag or commit of a hub id.
        device: `cpu`, `cuda`, `cuda:1` …; by default CUDA where there is one.
        dtype: a torch dtype or its name; by default the family's reference dtype.
        plan: what `Model.set_plan` takes.
        local_files_only: look for a hub id in the hub's cache alone.
        variant: of the weights in a folder or a repository, as in `fp16`; of one file, those of its base and decoder.
        base: for one file: the folder or hub id of the model that it belongs to, for what the file lacks.
        vae: another decoder: a folder, a `.safetensors` file or a hub id; by default the `vae/` in the model's own folder.
        memory_gib: the most memory to take for a picture of the native size; levers that save memory are
            chosen by an estimate, and `Model.memory` says which.

    Raises:
        ModelError: the model is missing, broken, of an unknown kind, or cannot run there.
        PlanError: there is no such plan, or it cannot engage here.
    """
    chosen_device = find_device(device)
    if memory_gib is not None and not (isinstance(memory_gib, (int, float)) and memory_gib > 0):
        raise ModelError(f"memory_gib must be above 0, got {memory_gib!r}")
    where = {"revision": revision, "variant": variant, "base": base, "vae": vae, "local_files_only": local_files_only}
    found, of_janus = find_model(source, where)
    if of_janus is not None and memory_gib is not None:
        raise ModelError("memory_gib= has no estimate for Janus: leave it out; plan='decode-slicing' saves memory of a batch")
    make = _load_stock if of_janus is None else partial(_load_janus, of_janus)
    pipeline, family, files = make(found, chosen_device, dtype)
    model = Model(found.name, found.folder, family, pipeline, memory_gib, files=files, origin=found)
    if plan != "exact":
        model.set_plan(plan)
    return model


def find_model(source: str | Path, where: dict[str, Any]) -> tuple[Source, janus.Folder | None]:
    """Find a model without loading it; a file of a Janus model stands for its folder, where its configuration lies.

    Args:
        source: as for `load`.
        where: what `find_source` takes besides.

    Raises:
        ModelError: it is not there, or is no model.
    """
    path = local_path(source)
    beside = janus.find(path) if path is not None else None
    if beside is not None:
        return replace(find_source(beside.folder, **where), name=str(path)), beside
    found = find_source(source, **where)
    return found, janus.find(found.path) if found.contents is None else None


def describe(source: Source, of_janus: janus.Folder | None) -> Family:
    """Return what a model makes and its defaults, as it will once loaded, from its configurations alone.

    Args:
        source: found.
        of_janus: of a Janus model, its folder.

    Raises:
        ModelError: it is none that this version runs, or a configuration is missing or damaged.
    """
    if of_janus is not None:
        return _janus_family(of_janus, janus.size_px(of_janus))
    return diffusion.describe(outline(source), _find_family(source))


Made = tuple[Any, Family, dict[str, Path]]
"""A pipeline, what it can make, and its weight files by name."""


def _load_stock(found: Source, device: torch.device, dtype: Any) -> Made:
    family = _find_family(found)
    pipeline, files = diffusion.load_pipeline(found, device, _find_dtype(dtype, device, family))
    return pipeline, diffusion.describe(pipeline, family), files


def _load_janus(folder: janus.Folder, found: Source, device: torch.device, dtype: Any) -> Made:
    vae = found.vae.path if found.vae is not None else None
    pipeline, files = janus.load(folder, vae, device, _find_dtype(dtype, device, FAMILIES[folder.kind]))
    return pipeline, _janus_family(folder, pipeline.size_px), files


def _janus_family(folder: janus.Folder, size: int) -> Family:
    family = replace(FAMILIES[folder.kind], size_px=size, multiple_px=size, min_px=size, max_px=size)
    return family if family.temperature is None else replace(family, num_steps=size // janus.PATCH_PX)


def _find_family(source: Source) -> Family:
    """Return the family of a source.

    Raises:
        ModelError: it is none that this version runs.
    """
    kind = pipeline_class(source)
    names = [source.name] if source.base is None else [source.name, source.base.name]
    family = family_of(kind, *names) or diffusion.family_of_class(kind)
    if family is None:
        known = sorted({known.pipeline for known in FAMILIES.values()})
        raise ModelError(
            f"{source.name!r} is a {kind}, which this version does not run: it runs {', '.join(known)}, "
            "and any other class of diffusers that makes a picture from a prompt"
        )
    if stored_dtype(files_of(source).values()) == "F32":
        family = replace(family, reference_dtype="float32")  # no reference is coarser than the weights it comes from
    return family


def find_device(device: str | torch.device | None) -> torch.device:
    """Return the device of that name; CUDA where there is one, if none is named.

    Raises:
        ModelError: there is no such device here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ways = "use cpu, cuda, or cuda:1 …"
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ModelError(f"unknown device {device!r}: {ways}") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device {device!r} is not here: this torch sees no CUDA device; use device='cpu'")
    if found.type == "meta":
        raise ModelError(f"device {device!r} holds no values, and makes no pictures: {ways}")
    try:
        torch.empty(1, device=found)
    except Exception as error:  # AssertionError, NotImplementedError or RuntimeError, by the device
        raise ModelError(f"device {device!r} is not here ({str(error).splitlines()[0].split('. ')[0]}): {ways}") from error
    return found


def _find_dtype(dtype: str | torch.dtype | None, device: torch.device, family: Family) -> torch.dtype:
    name = family.reference_dtype if dtype is None else str(dtype).removeprefix("torch.")
    found = getattr(torch, name, None)
    if found not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ModelError(f"unknown dtype {dtype!r}: use float32, bfloat16 or float16")
    if found == torch.float16 and device.type == "cpu":
        raise ModelError("float16 on a CPU is hundreds of times slower than float32: use dtype='bfloat16' or 'float32'")
    return found
