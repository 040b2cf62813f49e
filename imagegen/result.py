"""What a finished call returns: pictures, each with the receipt that makes it again."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from imagegen.receipt import Receipt, png_bytes, slug, write_new

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Picture:
    """One picture (RGB) and its receipt."""

    image: "Image"
    receipt: Receipt

    def png(self) -> bytes:
        """Return the picture as a PNG that carries its receipt."""
        return png_bytes(self.image, self.receipt)

    def save(self, folder: str | Path) -> Path:
        """Write `SEED-SLUG.png` into a folder, overwriting nothing, and return its path.

        Raises:
            RequestError: the folder cannot be written.
        """
        request = self.receipt.request
        return write_new(Path(folder), f"{request['seed']}-{slug(request['prompt'])}", self.png())


@dataclass(frozen=True)
class Result:
    """The pictures of one call, in the order of their seeds, and the seconds they took."""

    pictures: list[Picture]
    elapsed_s: float

    @property
    def images(self) -> list["Image"]:
        """The pictures as plain PIL images."""
        return [picture.image for picture in self.pictures]

    def save(self, folder: str | Path) -> list[Path]:
        """Write every picture as a PNG with its receipt and return the paths.

        Raises:
            RequestError: the folder cannot be written.
        """
        return [picture.save(folder) for picture in self.pictures]
