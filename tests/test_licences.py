"""Licences: which one a model is under, and what may be made of its outputs."""

import re

import pytest

from imagegen import DataError
from imagegen.catalog import CARDS
from imagegen.licences import FORBIDDEN, INHERITED, LICENCES, UNKNOWN, check_right, licence_named, licence_of


@pytest.mark.parametrize(
    ("model", "licence"),
    [
        ("runwayml/stable-diffusion-v1-5", "CreativeML-OpenRAIL-M"),
        ("v1-5-pruned-emaonly", "CreativeML-OpenRAIL-M"),
        ("stabilityai/stable-diffusion-xl-base-1.0", "CreativeML-OpenRAIL++-M"),
        ("sd_xl_base_1.0", "CreativeML-OpenRAIL++-M"),
        ("stabilityai/sdxl-turbo", "Stability-AI-Community-License"),
        ("stabilityai/stable-diffusion-3.5-large", "Stability-AI-Community-License"),
        ("black-forest-labs/FLUX.1-dev", "FLUX.1-dev-Non-Commercial-License"),
        ("flux1-dev-fp8", "FLUX.1-dev-Non-Commercial-License"),
        ("black-forest-labs/FLUX.1-schnell", "Apache-2.0"),
        ("deepseek-ai/Janus-Pro-7B", "DeepSeek-Model-License-1.0"),
        ("Tongyi-MAI/Z-Image-Turbo", "Apache-2.0"),
        ("a model nobody knows", "unknown"),
    ],
)
def test_models_by_the_names_that_other_tools_write(model, licence):
    assert licence_of(model).name == licence


def test_every_licence_says_where_and_when_it_was_read():
    for licence in LICENCES.values():
        assert licence.url.startswith("https://") and re.fullmatch(r"20\d\d-\d\d-\d\d", licence.read) and licence.terms


def test_the_cards_licences_are_known():
    assert all(licence_named(card.licence).kind != UNKNOWN or card.licence == "unknown" for card in CARDS.values())


def test_a_forbidden_use_needs_a_word_which_is_recorded():
    dev = licence_of("FLUX.1-dev")
    assert dev.kind == FORBIDDEN
    with pytest.raises(DataError, match=r"FLUX.1-dev-Non-Commercial-License.*https://.*--i-have-the-right"):
        check_right([("3 pictures made by FLUX.1-dev", dev)], i_have_the_right=False)
    (fact,) = check_right([("3 pictures made by FLUX.1-dev", dev)], i_have_the_right=True)
    assert fact["kind"] == FORBIDDEN and fact["right"] == "the user says to have it"


def test_inherited_and_unknown_ones_are_recorded():
    used = [("the teacher", licence_of("sdxl")), ("pictures", licence_named("My-Licence")), ("the teacher", licence_of("sdxl"))]
    facts = check_right(used, i_have_the_right=False)
    assert [(fact["what"], fact["kind"]) for fact in facts] == [("pictures", UNKNOWN), ("the teacher", INHERITED)]
    assert facts[0]["licence"] == "My-Licence" and all("right" not in fact for fact in facts)
