"""Schedulers by their usual names: what diffusers makes of them, and which models they are for."""

import diffusers
import numpy as np
import pytest
from PIL import Image
from test_families import assert_identical, seeded, side

import imagegen
from imagegen.families.arguments import methods_called
from imagegen.fidelity import max_difference
from imagegen.sampling import FLOW_MATCH_SCHEDULERS, SCHEDULERS, known_schedulers, make_scheduler

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


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


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(
    "own",
    [
        diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True, algorithm_type="sde-dpmsolver++", **NOISE),
        diffusers.EulerDiscreteScheduler(use_exponential_sigmas=True, **NOISE),
        diffusers.UniPCMultistepScheduler(use_beta_sigmas=True, solver_type="bh1", **NOISE),
        diffusers.DPMSolverMultistepScheduler(use_lu_lambdas=True, **NOISE),
    ],
    ids=["sde karras", "exponential", "beta", "lu"],
)  # fmt: skip
def test_a_name_means_the_same_whatever_the_models_own_scheduler_is(name, own):
    """The levels and the solver are those of the same name where that scheduler has no options."""
    plain = make_scheduler(type(own)(**NOISE), name)
    made = make_scheduler(own, name)
    for scheduler in (plain, made):
        scheduler.set_timesteps(6)
    assert np.allclose(made.timesteps, plain.timesteps)
    if hasattr(plain, "sigmas"):
        assert np.allclose(made.sigmas, plain.sigmas)
    options = ("algorithm_type", "solver_order", "solver_type") if name.startswith(("dpm++", "deis")) else ()
    assert [made.config[option] for option in options] == [plain.config[option] for option in options]


def test_on_flows_euler_is_without_karras():
    own = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    assert not make_scheduler(own, "euler").config.use_karras_sigmas
    assert make_scheduler(own, "euler karras").config.use_karras_sigmas


@pytest.mark.parametrize(
    ("spelled", "name"),
    [
        ("euler_a", "euler a"), ("Euler ancestral", "euler a"), ("dpmpp_2m", "dpm++ 2m"), ("DPM++ 2M Karras", "dpm++ 2m karras"),
        ("dpm++  2m  sde", "dpm++ 2m sde"), ("dpmpp_2m_sde_karras", "dpm++ 2m sde karras"), ("uni_pc", "unipc"),
        ("PLMS", "pndm"), ("dpm2-a", "dpm2 a"), (" DDIM ", "ddim"),
    ],
)  # fmt: skip
def test_usual_spellings_are_known(spelled, name):
    own = diffusers.DDIMScheduler(**NOISE)
    made, meant = make_scheduler(own, spelled), make_scheduler(own, name)
    assert (type(made), dict(made.config)) == (type(meant), dict(meant.config))


@pytest.mark.parametrize("name", ["sd1.5", "latent-consistency", "sana-sprint", "kandinsky3", "kandinsky22", "bria", "cogview3"])
def test_only_schedulers_that_the_pipeline_takes_are_offered(name, model_of):
    """Each of them draws, and what is not offered is refused in words."""
    model = model_of(name)
    size = {"width": 1024, "height": 1024} if name == "sana-sprint" else side(name)
    offered = known_schedulers(model.pipeline.scheduler, methods_called(model.pipeline))
    wanted = {"latent-consistency": {"lcm"}, "sana-sprint": {"scm"}, "kandinsky3": {"ddim"}, "kandinsky22": {"ddim"},
              "bria": {"euler", "euler karras"}}  # fmt: skip
    assert set(offered) == wanted.get(name, set(SCHEDULERS))
    for scheduler in {*SCHEDULERS, "scm"}:
        if scheduler not in offered:
            with pytest.raises(imagegen.RequestError, match="it takes"):
                model("a cat", seed=1, scheduler=scheduler, **size)
        elif name in wanted:
            model("a cat", seed=1, num_steps=2, scheduler=scheduler, **size)


@pytest.mark.parametrize("scheduler", [["euler"], 5, {"euler": 1}])
def test_a_scheduler_is_a_name(scheduler, model_of):
    with pytest.raises(imagegen.RequestError, match="scheduler must be text, got"):
        model_of("sd1.5")("a cat", scheduler=scheduler)


@pytest.mark.parametrize("num_steps", [1, 3])
def test_sana_sprint_takes_other_numbers_of_steps_than_two(num_steps, model_of, stock_of):
    size = {"width": 1024, "height": 1024}
    mine = model_of("sana-sprint")("a cat", seed=1, num_steps=num_steps, **size).images[0]
    words = {"num_inference_steps": num_steps, "intermediate_timesteps": None, "generator": seeded(1)}
    assert_identical(mine, stock_of("sana-sprint")("a cat", **words, **size).images[0])


def test_more_steps_than_a_scheduler_has_are_refused(model_of):
    lcm, start = model_of("latent-consistency"), Image.new("RGB", (64, 64))
    with pytest.raises(imagegen.RequestError, match="LCMScheduler takes up to 50 steps here, got 51: lower num_steps"):
        lcm("a cat", num_steps=51)
    with pytest.raises(imagegen.RequestError, match="takes up to 20 steps here, got 25"):
        lcm("a cat", image=start, strength=0.4, num_steps=25, seed=1)
    with pytest.raises(imagegen.RequestError, match="TCDScheduler takes up to 50 steps"):
        model_of("sd1.5")("a cat", num_steps=60, scheduler="tcd")
    assert lcm("a cat", image=start, strength=0.2, num_steps=5, seed=1).images[0].size == (64, 64)
