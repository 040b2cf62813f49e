"""One queue in front of one model: what its readers are told, in which order, and that none disturbs another."""

import gc
import threading

import pytest
import torch

import imagegen
from imagegen import fidelity
from imagegen.engine import Busy, Engine, Waiting
from imagegen.model import Step


@pytest.fixture
def engine(model):
    with Engine(model, max_waiting=4) as engine:
        yield engine


def finish(stream):
    """Read a stream to its end and return its states."""
    return list(stream)


def test_a_stream_ends_with_the_models_own_picture(engine, model):
    steps = [state for state in engine.stream("a red apple", seed=7, num_steps=4) if isinstance(state, Step)]
    assert [step.index for step in steps] == [0, 1, 2, 3]
    assert [step.result is None for step in steps] == [True, True, True, False]
    alone = model.generate("a red apple", seed=7, num_steps=4)
    assert steps[-1].result.images[0].tobytes() == alone.images[0].tobytes()
    assert steps[-1].result.pictures[0].receipt.request == alone.pictures[0].receipt.request
    assert steps[1].preview(0).size == (128, 128)
    made = engine.generate("a red apple", seed=7, num_steps=4)
    assert made.pictures[0].png() == alone.pictures[0].png()


def test_what_is_wrong_is_said_before_anything_waits(engine):
    with pytest.raises(imagegen.RequestError, match="num_steps must be from 1"):
        engine.stream("a red apple", num_steps=0)
    with pytest.raises(imagegen.RequestError, match="unknown scheduler 'warp'"):
        engine.stream("a red apple", scheduler="warp")
    with pytest.raises(imagegen.RequestError, match="from 1, got 0"):
        Engine(engine.model, max_waiting=0)
    assert engine.waiting == engine.running == 0


def test_the_queue_is_bounded_and_says_so(engine, model):
    with engine.alone():
        waiting = [engine.stream("a red apple", num_steps=1, seed=seed) for seed in range(4)]
        assert [next(stream) for stream in waiting] == [Waiting(place) for place in range(4)]
        assert engine.waiting == 4
        with pytest.raises(Busy, match="4 requests wait already"):
            engine.stream("a red apple")
        with pytest.raises(Busy), engine.alone():
            pass
        waiting[0].close()
        late = engine.stream("a red apple", num_steps=1, seed=9)  # the place of the one that left
        assert next(late) == Waiting(3)
    assert [states[-1].result is not None for states in map(finish, [*waiting[1:], late])] == [True] * 4
    assert finish(waiting[0]) == []


def test_leaving_ends_the_work_within_one_step(engine, steps_run):
    stream = engine.stream("a blue heart", num_steps=500)
    next(state for state in stream if isinstance(state, Step))
    stream.close()
    made = len(steps_run)
    engine.generate("a red apple", num_steps=1)
    assert len(steps_run) <= made + 2  # the step it was at, and the apple's
    lost = engine.stream("a blue heart", num_steps=500)
    next(state for state in lost if isinstance(state, Step))
    del lost
    gc.collect()
    made = len(steps_run)
    engine.generate("a red apple", num_steps=1)
    assert len(steps_run) <= made + 2


def test_who_left_the_queue_is_never_run(engine, steps_run):
    with engine.alone():
        engine.stream("a blue heart", num_steps=2).close()
        kept = engine.stream("a red apple", num_steps=2)
    finish(kept)
    assert steps_run == [["a red apple"]] * 2


def test_a_fault_is_its_own(engine, model, monkeypatch):
    run = model.run_together

    def faulty(requests, on_step=None, noise=None):
        if any(request.prompt == "a broken one" for request in requests):
            raise RuntimeError("broken")
        return run(requests, on_step, noise)

    monkeypatch.setattr(model, "run_together", faulty)
    with engine.alone():
        prompts = ("a red apple", "a broken one", "a blue heart")  # one batch
        before, broken, whole = (engine.stream(prompt, num_steps=1) for prompt in prompts)
    with pytest.raises(RuntimeError, match="broken"):
        finish(broken)
    assert finish(broken) == []
    for stream, prompt in ((before, "a red apple"), (whole, "a blue heart")):
        (picture,) = finish(stream)[-1].result.pictures
        assert picture.receipt.request["prompt"] == prompt


def test_the_model_to_oneself(engine, model):
    entered, order = threading.Event(), []

    def draw():
        entered.wait()
        engine.generate("a red apple", num_steps=1)
        order.append("picture")

    thread = threading.Thread(target=draw)
    thread.start()
    with engine.alone() as own:
        entered.set()
        own.set_plan("prompt-cache")
        own.generate("a blue heart", num_steps=1)
        own.set_plan("exact")
        order.append("alone")
    thread.join()
    assert own is model
    assert order == ["alone", "picture"]
    with pytest.raises(KeyError), engine.alone():
        raise KeyError
    engine.generate("a red apple", num_steps=1)


def queued(engine, *asked, **common):
    """Let requests wait until all are there, run them, and return the states of each."""
    with engine.alone():
        streams = [engine.stream(prompt, **common, **settings) for prompt, settings in asked]
    return [finish(stream) for stream in streams]


def test_requests_that_differ_in_words_and_seeds_are_one_batch(engine, model, steps_run):
    asked = [
        ("a red apple", {"seed": 7}),
        ("a blue heart", {"seed": 3, "num_images": 2}),
        ("a smiling sun", {"seed": 5}),
        ("a cat in a box", {"seed": 7, "width": 64}),  # another size
    ]
    made = queued(engine, *asked, num_steps=3)
    assert steps_run == [["a red apple", "a blue heart", "a smiling sun"]] * 3 + [["a cat in a box"]] * 3
    steps_run.clear()
    for (prompt, settings), states in zip(asked, made, strict=True):
        steps = [state for state in states if isinstance(state, Step)]
        assert [step.index for step in steps] == [0, 1, 2]
        assert len(steps[0].latents) == settings.get("num_images", 1)
        alone = model.generate(prompt, num_steps=3, **settings)
        for own, picture in zip(alone.pictures, steps[-1].result.pictures, strict=True):
            assert fidelity.max_difference(own.image, picture.image) <= 1
            assert fidelity.psnr_db(own.image, picture.image) >= 60
            assert own.receipt.request == picture.receipt.request
            assert own.receipt.plan == picture.receipt.plan


def test_a_picture_of_a_batch_is_replayed(engine, tmp_path):
    made = queued(engine, ("a red apple", {"seed": 7}), ("a blue heart", {"seed": 3}), num_steps=2)
    for states in made:
        (path,) = states[-1].result.save(tmp_path)
        assert imagegen.replay(path, model=engine.model).same


def test_negative_prompts_join_and_are_each_their_own(engine, model, steps_run):
    asked = [("a red apple", {"seed": 1, "negative_prompt": "green"}), ("a sun", {"seed": 2, "negative_prompt": "a face"})]
    made = queued(engine, *asked, ("a moon", {"seed": 3}), num_steps=2)
    assert steps_run[:3:2] == [["a red apple", "a sun"], ["a moon"]]
    for (prompt, settings), states in zip(asked, made, strict=False):
        alone = model.generate(prompt, num_steps=2, **settings).images[0]
        assert fidelity.psnr_db(alone, states[-1].result.images[0]) >= 60


def test_a_batch_holds_so_many_pictures(model, steps_run):
    with Engine(model, max_batch=3) as engine:
        queued(engine, *[(name, {"num_images": count}) for name, count in zip("abcd", (1, 4, 2, 1), strict=True)], num_steps=1)
    assert steps_run == [["a", "c"], ["b"], ["d"]]


def test_what_cannot_join_runs_alone(engine, model, steps_run):
    picture = model.generate("a red apple", num_steps=1).images[0]
    steps_run.clear()
    noise = torch.zeros(1, 4, 16, 16)
    asked = [("a", {"image": picture, "strength": 0.5}), ("b", {"noise": noise}), ("c", {}), ("d", {})]
    queued(engine, *asked, num_steps=2)
    assert [steps for number, steps in enumerate(steps_run) if steps not in steps_run[:number]] == [["a"], ["b"], ["c", "d"]]
    request = model.check("a (red:1.3) apple")
    assert model.joined_by(request) is None
    with model.plan_for_a_while("channels-last"):
        assert model.joined_by(model.check("a red apple")) is None
    assert model.joined_by(model.check("a red apple")) is not None


JOINING = [
    "prompt-cache",
    "decode-slicing",
    "step-cache(interval=2)",
    "deep-cache",
    "guidance-cache",
    "guidance-interval",
    "threads(count=1)",
]


@pytest.mark.parametrize("plan", JOINING)
def test_levers_that_join_treat_every_picture_by_itself(model, plan):
    with model.plan_for_a_while(plan):
        requests = [model.check(prompt, seed=seed, num_steps=8) for prompt, seed in (("a red apple", 7), ("a blue heart", 3))]
        assert model.joined_by(requests[0]) == model.joined_by(requests[1]) is not None
        together = model.run_together(requests)
        for request, result in zip(requests, together, strict=True):
            (alone,) = model.run_together([request])
            assert fidelity.psnr_db(alone.images[0], result.images[0]) >= 60


@pytest.mark.parametrize("name", ["sd1.5", "sdxl", "sd3", "flux", "pixart-sigma", "sana"])
def test_families_that_join(name, model_of):
    model = model_of(name)
    asked = (("a red apple", 1), ("x", 50), ("many more words than the others have", 9))
    requests = [model.check(prompt, seed=seed, num_steps=2) for prompt, seed in asked]
    assert len({model.joined_by(request) for request in requests} - {None}) == 1
    for request, together in zip(requests, model.run_together(requests), strict=True):
        (alone,) = model.run_together([request])
        assert fidelity.psnr_db(alone.images[0], together.images[0]) >= 60


def test_families_whose_prompts_are_padded_to_the_longest_run_alone(model_of):
    model = model_of("cogview4")
    assert model.joined_by(model.check("a red apple")) is None


def test_who_leaves_a_batch_leaves_the_others_running(engine, model, steps_run):
    with engine.alone():
        leaving, staying = (engine.stream(prompt, seed=7, num_steps=4) for prompt in ("a blue heart", "a red apple"))
    next(state for state in leaving if isinstance(state, Step))
    leaving.close()
    made = finish(staying)[-1].result.images[0]
    assert len(steps_run) == 4
    assert fidelity.psnr_db(made, model.generate("a red apple", seed=7, num_steps=4).images[0]) >= 60
    with engine.alone():
        both = [engine.stream(prompt, num_steps=500) for prompt in ("a blue heart", "a red apple")]
    for stream in both:
        next(state for state in stream if isinstance(state, Step))
    for stream in both:
        stream.close()
    made = len(steps_run)
    engine.generate("a red apple", num_steps=1)
    assert len(steps_run) <= made + 2


def test_closing_tells_everybody(model):
    others = {thread for thread in threading.enumerate() if thread.name == "imagegen-engine"}  # of other tests' servers
    engine = Engine(model)
    running = engine.stream("a blue heart", num_steps=500)
    next(state for state in running if isinstance(state, Step))
    waiting = engine.stream("a red apple")
    engine.close()
    for stream in (running, waiting):
        with pytest.raises(imagegen.Error, match="the engine was closed before"):
            finish(stream)
    with pytest.raises(imagegen.Error, match="the engine is closed"):
        engine.stream("a red apple")
    engine.close()
    assert others >= {thread for thread in threading.enumerate() if thread.name == "imagegen-engine"}
