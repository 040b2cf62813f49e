"""What pictures look like, in numbers: features of the embedded model's own encoder, and what follows from them."""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from imagegen import fidelity
from imagegen.loader import load
from imagegen.model import Model
from imagegen.profile import write_json


@torch.no_grad()
def describe(model: Model, pictures: Sequence[Image.Image]) -> torch.Tensor:
    """Return features of pictures of one size, (B, D) float32.

    Mean and spread over all places of every channel of the encoder's stages: colours and textures, lines and
    fills, wherever they are. After Gatys et al. (2016), https://doi.org/10.1109/CVPR.2016.265, whose products of
    channels are left out.
    """
    encoder, found = model.pipeline.vae.encoder, []
    hooks = [
        stage.register_forward_hook(lambda _module, _inputs, output: found.append(output))
        for stage in (encoder.conv_in, *encoder.down_blocks)
    ]
    rows = []
    try:
        for picture in pictures:
            found.clear()
            encoder(model.pipeline.image_processor.preprocess(picture).to(model.device, model.dtype))
            rows.append(
                torch.cat(
                    [part.float().mean(dim=(0, 2, 3)) for part in found] + [part.float().std(dim=(0, 2, 3)) for part in found]
                )
            )
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(rows).cpu()


def frechet(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the Fréchet distance of two sets of features as Gaussians without correlations.

    Both are measured in units of the second set's spread, so that no channel drowns the others. Source: Dowson and
    Landau (1982), https://doi.org/10.1016/0047-259X(82)90077-X.
    """
    unit = second.std(dim=0).clamp(min=1e-6)
    first, second = first / unit, second / unit
    means = (first.mean(dim=0) - second.mean(dim=0)).square()
    return float((means + (first.std(dim=0) - second.std(dim=0)).square()).mean())


class Classifier:
    """Tells two kinds of pictures apart by their features: logistic regression."""

    def __init__(self, positive: torch.Tensor, negative: torch.Tensor, steps: int = 400) -> None:
        """Train on features, (N, D) each, on equal terms however many there are of each."""
        every = torch.cat([positive, negative])
        self.mean, self.unit = every.mean(dim=0), every.std(dim=0).clamp(min=1e-6)
        labels = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))])
        weights = torch.cat(
            [torch.full((len(positive),), 0.5 / len(positive)), torch.full((len(negative),), 0.5 / len(negative))]
        )
        self.slope, self.offset = torch.zeros(every.shape[1], requires_grad=True), torch.zeros((), requires_grad=True)
        optimiser = torch.optim.Adam([self.slope, self.offset], lr=0.02, weight_decay=1e-3)
        for _ in range(steps):
            loss = torch.nn.functional.binary_cross_entropy_with_logits(self.scores(every), labels, weights)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

    def scores(self, features: torch.Tensor) -> torch.Tensor:
        """Return what is above 0 for the first kind, (N,)."""
        return ((features - self.mean) / self.unit) @ self.slope + self.offset


def psnr_db(first: Image.Image, second: Image.Image) -> float:
    """Return the peak signal-to-noise ratio of two pictures in dB; infinite where they are equal."""
    return fidelity.psnr_db(first, second)


def save_sheet(rows: Sequence[Sequence[Image.Image]], path: Path) -> None:
    """Write rows of equally large pictures as one PNG."""
    width, height = rows[0][0].size
    sheet = Image.new("RGB", (max(len(row) for row in rows) * width, len(rows) * height), "white")
    for down, row in enumerate(rows):
        for right, picture in enumerate(row):
            sheet.paste(picture, (right * width, down * height))
    part = path.with_name(f".{path.name}.part")
    sheet.save(part, "PNG")
    part.replace(path)


def lines(what: str, done: int, total: int) -> Any:
    """Show progress as plain lines, ten for each kind of work."""
    if done == total or done % max(1, total // 10) == 0:
        print(f"{done}/{total} {what}", flush=True)


def main(run: Callable[[Model, Path], dict[str, Any]], says: str | None) -> None:
    """Run an example on the embedded model into the folder of `--out`; print its figures and keep them there."""
    parser = argparse.ArgumentParser(description=(says or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    figures = run(load(), out)
    write_json(out / "figures.json", figures)
    print(json.dumps(figures, indent=1))
