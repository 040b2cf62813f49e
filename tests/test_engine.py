"""One queue in front of one model: what its readers are told, in which order, and that none disturbs another."""

import gc
import threading

import pytest

import imagegen
from imagegen.engine import Busy, Engine, Waiting
from imagegen.model import Step


@pytest.fixture
def engine(model):
    with Engine(model, max_waiting=4) as engine:
        yield engine


@pytest.fixture
def steps_run(model, monkeypatch):
    """Collect the prompts of every step that the model really made."""
    seen = []
    run = model.run_together

    def counted(requests, on_step=None, noise=None):
        def tell(steps):
            seen.append([request.prompt for request in requests])
            on_step(steps)

        return run(requests, tell, noise)

    monkeypatch.setattr(model, "run_together", counted)
    return seen


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
        broken, whole = engine.stream("a broken one", num_steps=1), engine.stream("a red apple", num_steps=1)
    with pytest.raises(RuntimeError, match="broken"):
        finish(broken)
    assert finish(broken) == []
    assert finish(whole)[-1].result.images


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


def test_closing_tells_everybody(model):
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
    assert "imagegen-engine" not in {thread.name for thread in threading.enumerate()}
