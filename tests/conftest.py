"""What the tests share: the embedded model and the stock pipeline on the same files."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin at barriers take 6x as long beside another process

if "PYTEST_XDIST_WORKER" in os.environ:  # one core for each process that tests
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil

import pytest
import torch
from needs import need

import imagegen
from imagegen.catalog import embedded_folder

CHROMIUM = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
CHROMIUM += " --disable-component-update --disable-sync"


@pytest.fixture(autouse=True, scope="session")
def private_cache(tmp_path_factory):
    """Keep the tests out of the user's cache."""
    os.environ["IMAGEGEN_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def model(private_cache):
    return imagegen.load()


@pytest.fixture
def steps_run(model, monkeypatch):
    """Collect the prompts of every step that the model really made."""
    seen = []
    run = model.run_together

    def counted(requests, on_step=None, noise=None):
        def tell(steps):
            seen.append([request.prompt for request in requests])
            if on_step is not None:
                on_step(steps)

        return run(requests, tell, noise)

    monkeypatch.setattr(model, "run_together", counted)
    return seen


@pytest.fixture(scope="session")
def browser():
    """Start Chromium without a window."""
    chromiums = ("chromium", "google-chrome")
    need("playwright", program=chromiums)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = next(filter(None, map(shutil.which, chromiums)))
        started = playwright.chromium.launch(executable_path=path, args=CHROMIUM.split())
        yield started
        started.close()


@pytest.fixture(scope="session")
def stock():
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(embedded_folder(), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def threads():
    """Set the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """Write a family's checkpoint, once in a session."""
    from tiny_families import write

    written = {}

    def folder(name):
        if name not in written:
            written[name] = write(name, tmp_path_factory.mktemp("families") / name)
        return written[name]

    return folder


@pytest.fixture(scope="session")
def model_of(folder_of):
    """Load a family's tiny model, once in a session."""
    loaded = {}

    def model(name):
        if name not in loaded:
            loaded[name] = imagegen.load(folder_of(name))
        return loaded[name]

    return model


@pytest.fixture(scope="session")
def stock_of(folder_of):
    """Load a family's stock pipeline, once in a session."""
    from diffusers import DiffusionPipeline

    loaded = {}

    def stock(name):
        if name not in loaded:
            loaded[name] = DiffusionPipeline.from_pretrained(folder_of(name), local_files_only=True)
            loaded[name].set_progress_bar_config(disable=True)
        return loaded[name]

    return stock
