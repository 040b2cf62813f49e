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
    """All of diffusers' own list of text-to-image pipelines, but those of a ControlNet, which is added to a model."""
    classes = {kind.__name__ for kind in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values() if "ControlNet" not in kind.__name__}
    without = {name for name in classes if not (family_of(name) or family_of_class(name))}
    assert without == {"HeliosPipeline", "HeliosPyramidPipeline"}  # of films


def test_a_class_that_needs_more_than_a_request_holds_is_no_family():
    assert family_of_class("StableDiffusionAttendAndExcitePipeline") is None  # token_indices


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
        changed = family_of(family.pipeline, card.name)
        assert all(getattr(changed, name) == value for name, value in card.changes.items())


TURBO = "StableDiffusionXLPipeline", 1
SPELLINGS = [
    ("stabilityai/sdxl-turbo", *TURBO),
    ("models/sdxl-turbo", *TURBO),
    ("/cache/models--stabilityai--sdxl-turbo/snapshots/71153311d3dbb46851df1931d3ca6e939de83304", *TURBO),
    ("/files/sd_xl_turbo_1.0_fp16.safetensors", *TURBO),
    ("/files/sdxl-turbo.safetensors", *TURBO),
    ("/files/z_image_turbo_bf16.safetensors", "ZImagePipeline", 9),
    ("/files/z-image-turbo-Q4_K_M.gguf", "ZImagePipeline", 9),
    ("/files/sd3.5_large_turbo.safetensors", "StableDiffusion3Pipeline", 4),
    ("/files/hidream_i1_fast_fp8.safetensors", "HiDreamImagePipeline", 16),
    ("/files/HiDream-I1-Dev", "HiDreamImagePipeline", 28),
    ("/files/flux1-schnell-Q8_0.gguf", "FluxPipeline", 4),
]


@pytest.mark.parametrize(("name", "pipeline", "num_steps"), SPELLINGS)
def test_a_model_is_known_by_every_spelling_of_its_place(name, pipeline, num_steps):
    family = family_of(pipeline, name)
    assert (family.num_steps, family.guidance, family.distilled) == (num_steps, 1.0, True)


def test_a_model_is_known_through_a_link(tmp_path):
    (tmp_path / "sdxl-turbo").mkdir()
    (tmp_path / "mine").symlink_to("sdxl-turbo")
    assert family_of("StableDiffusionXLPipeline", str(tmp_path / "mine")).num_steps == 1


@pytest.mark.parametrize("name", ["models/another", "/x/sdxl-turbo-remix.safetensors", "/sdxl-turbo/other.safetensors", "/"])
def test_another_name_is_another_model(name):
    assert family_of("StableDiffusionXLPipeline", name) == FAMILIES["stable-diffusion-xl"]


def test_one_file_has_its_own_defaults_else_its_bases():
    base = "stabilityai/stable-diffusion-xl-base-1.0"
    assert family_of("StableDiffusionXLPipeline", "/x/sdxl-turbo.safetensors", base).num_steps == 1
    assert family_of("StableDiffusionXLPipeline", "/x/mine.safetensors", "stabilityai/sdxl-turbo").num_steps == 1
