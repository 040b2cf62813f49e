"""The drawn pictures, put on backgrounds: what the autoencoder, the denoiser and the judge learn from.

Knows nothing of models; a canvas is (B, 3, 128, 128) float32 in [-1, 1].
"""

import json
from pathlib import Path

import numpy as np
import torch

CANVAS_PX = 128
# Background words and their sRGB colours; white is the default and never has to be said.
BACKGROUNDS = {
    "white": (255, 255, 255),
    "red": (214, 60, 66),
    "orange": (246, 150, 56),
    "yellow": (250, 216, 90),
    "green": (98, 180, 102),
    "blue": (76, 142, 222),
    "purple": (142, 96, 192),
    "pink": (246, 162, 198),
    "gray": (152, 154, 158),
}


class Pictures:
    """The drawn pictures of one or more splits, in memory as uint8 RGBA."""

    def __init__(self, work: Path, splits: tuple[str, ...]):
        """Read `pictures.npy` and `pictures.json` of the work folder and keep those splits."""
        rows = json.loads((work / "pictures.json").read_text())
        keep = [index for index, row in enumerate(rows) if row["split"] in splits]
        stored = np.load(work / "pictures.npy", mmap_mode="r")
        self.rows = [rows[index] for index in keep]
        self.rgba = torch.from_numpy(stored[keep])  # (N, 112, 112, 4) uint8

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.rows)

    def canvas(self, index: int, background: str = "white", shift: tuple[int, int] = (0, 0)) -> torch.Tensor:
        """Put one picture on a plain background, `shift` pixels (down, right) off the centre.

        Returns:
            (3, 128, 128) float32 in [-1, 1].
        """
        icon = self.rgba[index].permute(2, 0, 1).float() / 255
        colour = torch.tensor(BACKGROUNDS[background]).float()[:, None, None] / 255
        canvas = colour.expand(3, CANVAS_PX, CANVAS_PX).clone()
        margin = (CANVAS_PX - icon.shape[-1]) // 2
        top, left = margin + shift[0], margin + shift[1]
        place = canvas[:, top : top + icon.shape[1], left : left + icon.shape[2]]
        place += (icon[:3] - place) * icon[3:]
        return canvas * 2 - 1


def psnr_db(pictures: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return the PSNR of each pair in dB: (B,) float32; pictures are (B, C, H, W) in [-1, 1]."""
    error = ((pictures.clamp(-1, 1) - others.clamp(-1, 1)) / 2).square().flatten(1).mean(1)
    return -10 * torch.log10(error.clamp_min(1e-10))
