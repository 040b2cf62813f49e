"""The catalogue against diffusers, and every family of it that is not tested in depth against its stock pipeline."""

from pathlib import Path

import diffusers
import pytest
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING
from test_families import assert_identical, seeded
from tiny_families import DEEP, SMOKE

import imagegen
from imagegen.catalog import CARDS, FAMILIES, family_of
from imagegen.families import janusflow, januspro, latents
from imagegen.families.diffusion import family_of_class
from imagegen.fidelity import max_difference
from imagegen.licences import LICENCES, licence_of

# These draw about a megapixel, whatever is asked for, so one picture of theirs is enough.
LARGE = {name: {"width": 1024, "height": 1024} for name in ("sana-sprint", "hidream", "hunyuan-dit")}


@pytest.mark.parametrize(
    "name", [name if name not in ("hidream", "hunyuan-dit") else pytest.param(name, marks=pytest.mark.slow) for name in SMOKE]
)
def test_every_other_family_is_stock(name, model_of, stock_of):
    model, seen = model_of(name), []
    count = 1 if name in LARGE else 2
    size = {"width": 256, "height": 256} if name == "pixart-alpha" else LARGE.get(name, {"width": 64, "height": 64})
    takes_negative = model.family.negative and name != "kandinsky22"  # whose prior takes no list of generators with it
    words = {"guidance_scale": 3.0} | ({"negative_prompt": ["blue"] * count} if takes_negative else {})
    said = {"negative_prompt": "blue"} if takes_negative else {}
    mine = model.run("a red apple", seen.append, seed=3, num_images=count, num_steps=2, guidance=3.0, **said, **size).images
    stock = stock_of(name)
    if name == "hunyuan-image":  # guidance is a part of that pipeline
        stock.guider = stock.guider.new(guidance_scale=words.pop("guidance_scale"))
    generators = seeded(*range(3, 3 + count))
    theirs = stock(prompt=["a red apple"] * count, num_inference_steps=2, generator=generators, **words, **size).images
    for picture, other in zip(mine, theirs, strict=True):
        assert_identical(picture, other)
    assert len(seen) == 2
    assert seen[-1].latents.dim() == 4
    assert tuple(seen[-1].latents.shape) == latents.noise_shape(model.pipeline, count, *mine[0].size)
    assert max_difference(latents.decode(model.pipeline, seen[-1].latents[0]), mine[0]) <= 1


def test_distilled_is_told_by_the_pipelines_configuration(model_of):
    family = model_of("flux.2-klein-distilled").family
    assert (family.num_steps, family.guidance, family.distilled) == (4, 1.0, True)
    with pytest.raises(imagegen.RequestError, match="takes no guidance"):
        model_of("flux.2-klein-distilled")("a cat", guidance=4)


def test_a_class_that_the_catalogue_lacks_is_read_from_its_signature(model_of):
    family = model_of("kandinsky22").family
    assert (family.name, family.num_steps, family.guidance) == ("kandinsky-v22-combined", 100, 4.0)
    assert family.modes == ("text-to-image",)


def test_every_family_names_a_pipeline_of_diffusers_or_of_ours():
    ours = {"JanusFlowPipeline": janusflow, "JanusProPipeline": januspro}
    for family in FAMILIES.values():
        assert hasattr(ours.get(family.pipeline, diffusers), family.pipeline), family.name
        assert not family.scheduler or hasattr(diffusers, family.scheduler), family.name
        assert family.size_px % family.multiple_px == 0


def test_every_picture_of_the_auto_pipeline_has_a_family():
    """All of diffusers' own list of text-to-image pipelines."""
    classes = {kind.__name__ for kind in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()}
    without = {name for name in classes if not (family_of("", name) or family_of_class(name))}
    assert without == {"HeliosPipeline", "HeliosPyramidPipeline"}  # of films


def test_the_readme_names_every_family_that_is_tested():
    table = (Path(__file__).parent.parent / "README.md").read_text().split("## Families")[1].split("\n## ")[0]
    assert [name for name in {**DEEP, **SMOKE} if f"`{name}`" not in table] == []


def test_cards_have_a_licence_that_is_known():
    for card in CARDS.values():
        assert card.licence in {*LICENCES, "unknown"}, card.name
        assert card.licence == "unknown" or licence_of(card.name).name == card.licence, card.name


def test_cards_name_a_family_and_what_differs():
    for card in CARDS.values():
        family = FAMILIES[card.family]
        assert card.licence
        assert card.terms
        changed = family_of(card.name, family.pipeline)
        assert all(getattr(changed, name) == value for name, value in card.changes.items())
    turbo = family_of("models/sdxl-turbo", "StableDiffusionXLPipeline")
    assert (turbo.num_steps, turbo.guidance, turbo.distilled) == (1, 1.0, True)
    assert family_of("models/another", "StableDiffusionXLPipeline") == FAMILIES["stable-diffusion-xl"]
