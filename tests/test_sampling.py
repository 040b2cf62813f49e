"""Schedulers by their usual names: what diffusers makes of them, and which models they are for."""

import diffusers
import numpy as np
import pytest
from test_families import assert_identical, seeded, side

import imagegen
from imagegen.fidelity import max_difference
from imagegen.sampling import FLOW_MATCH_SCHEDULERS, SCHEDULERS


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_model_that_predicts_noise_takes_every_scheduler(scheduler, model_of, stock_of):
    mine = model_of("sd1.5")("a cat", seed=1, num_steps=4, guidance=2, scheduler=scheduler, **side("sd1.5")).images[0]
    stock = stock_of("sd1.5")
    own, (kind, overrides) = stock.scheduler, SCHEDULERS[scheduler]
    stock.scheduler = getattr(diffusers, kind).from_config(own.config, **overrides)
    try:
        words = {"num_inference_steps": 4, "guidance_scale": 2.0, "generator": seeded(1)}
        assert_identical(mine, stock("a cat", **words, **side("sd1.5")).images[0])
    finally:
        stock.scheduler = own


@pytest.mark.parametrize("name", ["sd3", "flux", "qwen-image", "z-image"])
@pytest.mark.parametrize("scheduler", FLOW_MATCH_SCHEDULERS)
def test_a_model_that_matches_flows_takes_the_schedulers_made_for_it(name, scheduler, model_of):
    settings = {"seed": 1, "num_steps": 4, "guidance": 1, **side(name)}
    made = model_of(name)("a cat", scheduler=scheduler, **settings).images[0]
    own = model_of(name)("a cat", **settings).images[0]
    assert np.array_equal(np.asarray(made), np.asarray(own)) == (scheduler == "euler")
    with pytest.raises(imagegen.RequestError, match="'euler a' is not for models that match flows, as this one: it takes euler"):
        model_of(name)("a cat", scheduler="euler a", **settings)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_scheduler_that_draws_noise_draws_it_from_each_pictures_seed(name, model_of):
    settings = {"scheduler": "lcm", "num_steps": 3, "guidance": 1, **side(name)}
    alone = model_of(name)("a cat", seed=2, **settings).images[0]
    assert_identical(alone, model_of(name)("a cat", seed=2, **settings).images[0])
    assert max_difference(alone, model_of(name)("a cat", seed=1, num_images=2, **settings).images[1]) <= 1
