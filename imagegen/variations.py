"""Pictures from a picture, in a word each: vary it, make it larger, grow it. Knows nothing of how a model draws."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from imagegen.catalog import Family
from imagegen.receipt import remembered_prompt
from imagegen.request import RequestError, open_picture
from imagegen.result import Picture, Result

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

VARIATIONS = {"subtle": 0.4, "strong": 0.75}  # how much of the picture is repainted


class Settings(TypedDict, total=False):
    """What `generate` and `stream` take besides the prompt; None stands for the model's default."""

    seed: int | None
    num_images: int | None
    num_steps: int | None
    guidance: float | None
    negative_prompt: str | None
    width: int | None
    height: int | None
    scheduler: str | None
    image: "Image | str | Path | None"
    strength: float | None
    mask: "Image | str | Path | None"
    margins: tuple[int, int, int, int] | None
    control: "Image | str | Path | None"
    control_weight: float | None
    style_image: "Image | str | Path | None"
    style_weight: float | None
    long_prompt: bool | None
    true_guidance: float | None
    noise: "torch.Tensor | None"
    temperature: float | None


class Variations(ABC):
    """What a model that makes pictures from a request can do with a picture."""

    family: Family

    @abstractmethod
    def generate(self, prompt: str, **settings: Unpack[Settings]) -> Result:
        """Make pictures from a prompt."""

    def vary(
        self,
        picture: "Picture | Image | str | Path",
        *,
        strength: str | float = "subtle",
        prompt: str | None = None,
        **settings: Any,
    ) -> Result:
        """Make variations of a picture: the same scene, drawn anew in part.

        Args:
            picture: one of a result's `pictures`, a PIL picture or a path.
            strength: `subtle`, `strong`, or how much is repainted, above 0 to 1.
            prompt: what it shows; by default what a picture of a result, or its PNG, remembers; without any, nothing.
            **settings: as for `generate`.

        Raises:
            RequestError: a setting is wrong, or the family has no image-to-image.
        """
        image, words = _open_remembered(picture, prompt)
        if isinstance(strength, str) and strength not in VARIATIONS:
            raise RequestError(f"strength must be {' or '.join(VARIATIONS)}, or above 0 and at most 1, got {strength!r}")
        amount = VARIATIONS[strength] if isinstance(strength, str) else strength
        return self._generate(words, settings, image=image, strength=amount)

    def upscale(
        self,
        picture: "Picture | Image | str | Path",
        factor: float = 2,
        *,
        strength: float = 0.3,
        prompt: str | None = None,
        **settings: Any,
    ) -> Result:
        """Make a larger picture: resized, then drawn once more at low strength.

        Args:
            picture: as for `vary`.
            factor: of width and height, above 1 to 8.
            strength: how much is repainted.
            prompt: as for `vary`.
            **settings: as for `generate`.

        Raises:
            RequestError: a setting is wrong, or the family has no image-to-image.
        """
        image, words = _open_remembered(picture, prompt)
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 1 < factor <= 8:
            raise RequestError(f"factor must be above 1 and at most 8, got {factor!r}")
        step = self.family.multiple_px
        width, height = (round(side * factor / step) * step for side in (image.width, image.height))
        return self._generate(words, settings, image=image, strength=strength, width=width, height=height)

    def outpaint(
        self,
        picture: "Picture | Image | str | Path",
        *,
        left: int = 0,
        right: int = 0,
        top: int = 0,
        bottom: int = 0,
        prompt: str | None = None,
        **settings: Any,
    ) -> Result:
        """Grow a picture on any side; every pixel of it stays as it was.

        Args:
            picture: as for `vary`.
            left: pixels to add there; likewise `right`, `top` and `bottom`.
            right: see `left`.
            top: see `left`.
            bottom: see `left`.
            prompt: what the whole shows; as for `vary`.
            **settings: as for `generate`.

        Raises:
            RequestError: a setting is wrong, or the family has no outpainting.
        """
        image, words = _open_remembered(picture, prompt)
        return self._generate(words, settings, image=image, margins=(left, right, top, bottom))

    def _generate(self, prompt: str, settings: dict[str, Any], **own: Any) -> Result:
        """Make pictures with the settings asked for and those that the word stands for, which nobody else may give."""
        if double := sorted(own.keys() & settings.keys()):
            raise RequestError(f"leave out {' and '.join(double)}: that follows from the picture")
        return self.generate(prompt, **own, **settings)


def _open_remembered(picture: "Picture | Image | str | Path", prompt: str | None) -> tuple["Image", str]:
    """Return a picture, and the prompt given or the one that the picture remembers."""
    if isinstance(picture, Picture):
        return picture.image, picture.receipt.request["prompt"] if prompt is None else prompt
    image = open_picture("picture", picture)
    if image is None:
        raise RequestError("picture must be a PIL picture or a path, got None")
    return image, remembered_prompt(image) if prompt is None else prompt
