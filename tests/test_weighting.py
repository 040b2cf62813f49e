"""Weights and long prompts: what compel makes of them reaches the picture; a prompt without them is stock's."""

import numpy as np
import pytest
from test_families import assert_identical, seeded

import imagegen
from imagegen.families.weighting import Weighed, has_weights, read_weights

SETTINGS = {"seed": 1, "num_steps": 2, "guidance": 3, "width": 64, "height": 64}
WORDS = {"num_inference_steps": 2, "guidance_scale": 3.0, "width": 64, "height": 64}


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("a (red:1.3) apple", [("a ", 1.0), ("red", 1.3), (" apple", 1.0)]),
        ("(red:.5), ((big) old:2)", [("red", 0.5), (", ", 1.0), ("big", 2.2), (" old", 2.0)]),
        ("((red:1.8)) [blue] (1:1)", [("red ", 1.98), ("blue ", 0.909091), ("1", 1.0)]),
        (r"(a \(dog\):1.2) \\", [("a (dog)", 1.2), (" \\", 1.0)]),
        ('(red:2) C++ dog- "x".and() d:e)', [("red", 2.0), (' C++ dog- "x".and d:e)', 1.0)]),
        ("(red:0) ( :3) ((x", [("red  ", 0.0), (" ((x", 1.0)]),
        ("( :1.3)", [("", 1.0)]),
    ],
)
def test_a_prompt_is_read_as_pieces_with_weights(prompt, pieces):
    """As the field's programs read it: round brackets are 1.1 times, square ones 1 / 1.1 times, and they multiply."""
    assert read_weights(prompt) == pieces
    assert has_weights(prompt)
    assert Weighed(prompt) == "".join(text for text, _ in pieces)


@pytest.mark.parametrize(
    "prompt", ["a red apple", "(old) [red] ((car))", "time 3:3) (", "(red:) apple", r"\(red:1.3\)", "[red:0.5]", ""]
)
def test_a_prompt_without_a_number_in_brackets_is_left_as_it_is(prompt):
    assert not has_weights(prompt)
    assert read_weights(prompt) == [(prompt, 1.0)]
    assert Weighed(prompt) == prompt


@pytest.mark.parametrize("name", ["sd1.5", "sdxl", "flux"])
@pytest.mark.parametrize("prompt", ["( :1.3)", "(red:0) apple", '(a:1.3) C++ dog- "x".and() d:e'])
def test_no_weighted_prompt_ends_in_a_fault_of_the_parser(name, prompt, model_of):
    two_passes = {"true_guidance": 4} if name == "flux" else {}
    model_of(name)(prompt, negative_prompt="(blue:1.2)", **SETTINGS | two_passes)


def test_a_weight_scales_what_the_words_change(model_of, stock_of):
    """Compel moves a word's embedding away from the prompt without weights: 1 is where that is, and nothing is moved."""
    from compel import CompelForSD

    model, stock = model_of("sd1.5"), stock_of("sd1.5")
    mine = model("a (red:1.5) apple", negative_prompt="blue", **SETTINGS).images[0]
    encoded = CompelForSD(stock)(["a (red)1.5 apple"], negative_prompt=["blue"])
    embeds = {"prompt_embeds": encoded.embeds.detach(), "negative_prompt_embeds": encoded.negative_embeds.detach()}
    assert_identical(mine, stock(**embeds, generator=seeded(1), **WORDS).images[0])
    plain = model("a red apple", negative_prompt="blue", **SETTINGS).images[0]
    assert not np.array_equal(np.asarray(mine), np.asarray(plain))
    assert_identical(model("a (red:1.0) apple", negative_prompt="blue", **SETTINGS).images[0], plain)


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_weights_work_in_a_batch_of_other_families(name, model_of):
    model = model_of(name)
    weighted = model("a (red:1.8) apple", num_images=2, **SETTINGS).images
    plain = model("a red apple", num_images=2, **SETTINGS).images
    assert_identical(model("a (red:1.8) apple", **SETTINGS).images[0], model("a (red:1.8) apple", **SETTINGS).images[0])
    for mine, other in zip(weighted, plain, strict=True):
        assert not np.array_equal(np.asarray(mine), np.asarray(other))


def test_a_negative_prompt_that_is_not_read_as_written_is_warned_of(model_of):
    with pytest.warns(UserWarning, match="the negative prompt is longer than the 77 tokens this model reads; left out"):
        model_of("sd1.5")("red", negative_prompt="apple " * 80, **SETTINGS)
    with pytest.warns(UserWarning, match="the negative prompt's weights are read as plain words"):
        model_of("sd3")("red", negative_prompt="(apple:1.2)", **SETTINGS)


@pytest.mark.parametrize("name", ["sd1.5", "sdxl"])
def test_a_long_prompt_is_read_to_its_end(name, model_of, recwarn):
    model, start = model_of(name), "apple " * 20
    red, blue = (model(start + end, long_prompt=True, **SETTINGS) for end in ("red", "blue"))
    assert not np.array_equal(np.asarray(red.images[0]), np.asarray(blue.images[0]))
    assert not [warning for warning in recwarn if "left out" in str(warning.message)]
    assert red.pictures[0].receipt.request["long_prompt"] is True


def test_a_short_prompt_is_stock_even_as_a_long_one(model_of):
    model = model_of("sd1.5")
    assert_identical(model("a cat", long_prompt=True, **SETTINGS).images[0], model("a cat", **SETTINGS).images[0])


def test_where_weights_are_unknown_they_are_said_to_be_words(model_of, stock_of):
    with pytest.warns(UserWarning, match="weights are read as plain words: stable-diffusion-3 reads neither"):
        mine = model_of("sd3")("a (red:1.3) apple", **SETTINGS).images[0]
    assert_identical(mine, stock_of("sd3")("a (red:1.3) apple", generator=seeded(1), **WORDS).images[0])
    with pytest.raises(imagegen.RequestError, match="long_prompt is for Stable Diffusion and SDXL"):
        model_of("flux")("a cat", long_prompt=True, **SETTINGS)


def test_without_compel_it_says_what_to_install(model_of, monkeypatch):
    monkeypatch.setattr("imagegen.families.weighting.find_spec", lambda _: None)
    assert "pip install 'imagegen-diffusion[prompts]'" in model_of("sd1.5").notice_about("a (red:1.3) apple")
