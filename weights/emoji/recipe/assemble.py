"""Put the trained parts together: `weights/emoji` in diffusers' own layout, weights in half precision.

Every part's config says `"dtype": "float32"` where its loader listens to it, so that a bare
`DiffusionPipeline.from_pretrained` computes in fp32 throughout.
"""

import argparse
import json
import os
import secrets
import shutil
import tempfile
from pathlib import Path

from build_data import default_work
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from text import MAX_TOKENS, load_text_encoder
from transformers import BertModel, BertTokenizerFast

HERE = Path(__file__).resolve().parent
NUM_LAYERS = 6  # of all-MiniLM-L6-v2
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
NOTICE = """\
The files in text_encoder/ and tokenizer/ are sentence-transformers/all-MiniLM-L6-v2, licensed under the
Apache License, Version 2.0 (below). Changes: the upper three layers were trained further on captions of
pictures (recipe/train_text.py), {settled}the weights were converted to half precision (float16), and
`use_attention_mask`, `dtype` and the maximum length were set in the configuration files.

"""
SETTLED = "two layers were added, the tables of words and of places were shortened (recipe/settle_text.py), "


def assemble(
    denoiser: UNet2DConditionModel, autoencoder: AutoencoderKL, text_encoder: tuple[BertTokenizerFast, BertModel], folder: Path
) -> None:
    """Write the pipeline into `folder`, replacing its parts one by one, each whole."""
    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=1000, prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2, steps_offset=1
    )
    pipeline = StableDiffusionPipeline(
        vae=autoencoder.half(),
        text_encoder=text_encoder[1].half(),
        tokenizer=text_encoder[0],
        unet=denoiser.half(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as made:
        pipeline.save_pretrained(made)
        for file in Path(made).glob("*/config.json"):
            _amend(file)
        _amend(Path(made) / "text_encoder/config.json", dtype="float32", use_attention_mask=True)
        _amend(Path(made) / "tokenizer/tokenizer_config.json", model_max_length=MAX_TOKENS)
        for file in Path(made).rglob("*.*"):
            file.chmod(0o644)
        for part in PARTS:
            shutil.rmtree(folder / part, ignore_errors=True)
            os.replace(Path(made) / part, folder / part)
        os.replace(Path(made) / "model_index.json", folder / "model_index.json")
    licence = (HERE.parents[2] / "LICENSE").read_text()
    taller = text_encoder[1].config.num_hidden_layers > NUM_LAYERS
    (folder / "LICENSE-MiniLM").write_text(NOTICE.format(settled=SETTLED if taller else "") + licence)


def keep_account(work: Path, file: Path) -> None:
    """Write into `training.json` what the trainings of this work folder took so far.

    Work folders come and go with their machines; what made the shipped weights is the sum over all of them.
    """
    trained = json.loads(file.read_text())
    name_file = work / "run.txt"
    if not name_file.exists():
        name_file.write_text(secrets.token_hex(4))
    for name, part in (("autoencoder", "autoencoder"), ("polish", "autoencoder"), ("denoiser", "denoiser")):
        account = work / f"{name}.json"
        if account.exists():
            trained[part][f"{name_file.read_text()}-{name}"] = json.loads(account.read_text())
    part_file = file.with_suffix(".part")
    part_file.write_text(json.dumps(trained, indent=1) + "\n")
    os.replace(part_file, file)


def record_again(folder: Path) -> None:
    """Record the reference set of new weights in the old one's place."""
    import imagegen

    fresh, old = folder / "references.part", folder / "references"
    shutil.rmtree(fresh, ignore_errors=True)
    imagegen.record_reference(imagegen.load(folder), None, fresh)
    shutil.rmtree(old, ignore_errors=True)
    os.replace(fresh, old)


def _amend(file: Path, **values: object) -> None:
    """Set values in a JSON file, and drop the path of this machine that libraries leave there."""
    config = json.loads(file.read_text()) | values
    config.pop("_name_or_path", None)
    file.write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=default_work())
    parser.add_argument("--out", type=Path, default=HERE.parent)
    arguments = parser.parse_args()
    assemble(
        UNet2DConditionModel.from_pretrained(arguments.work / "denoiser"),
        AutoencoderKL.from_pretrained(arguments.work / "autoencoder"),
        load_text_encoder(arguments.work),
        arguments.out,
    )
    keep_account(arguments.work, HERE / "training.json")
    record_again(arguments.out)
