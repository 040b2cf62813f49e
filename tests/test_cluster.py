"""On a cluster of Ray's on this machine: whatever is killed, every picture is made once, and others go on being served."""

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from needs import need

import imagegen
from imagegen import fidelity
from imagegen.receipt import open_picture

need("ray")
pytestmark = pytest.mark.slow
WORDS = ("a red apple", "a blue heart", "a cat face", "a rocket", "a pizza on a pink background")
NUM = 500
NUM_PEOPLE = 8
PATIENCE_S = 300  # until something must have happened; nothing is measured by it


def rows_of(out):
    file = out / "manifest.jsonl"
    return file.read_text().splitlines() if file.exists() else []


def wait_for(what, run):
    until = time.monotonic() + PATIENCE_S
    while not what():
        assert run.poll() is None, run.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.05)


def workers_of(run):
    """Return the processes that hold a model: Ray names them by their class."""
    return [child for child in psutil.Process(run.pid).children(recursive=True) if "ray::_Worker" in " ".join(child.cmdline())]


def start(file, out, workers, **more):
    command = [sys.executable, "-m", "imagegen", "batch", str(file), "--out", str(out), "--workers", str(workers)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


def test_five_hundred_pictures_though_three_workers_and_the_driver_are_killed(model, tmp_path):
    file, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    asked = [{"id": f"n{n}", "prompt": WORDS[n % 5], "seed": n, "num_steps": 2 + n % 2} for n in range(NUM)]
    file.write_text("".join(json.dumps(row) + "\n" for row in asked))
    run = start(file, out, 2)
    for at in (NUM // 10, NUM // 4, NUM // 2):
        wait_for(lambda at=at: len(rows_of(out)) >= at and workers_of(run), run)
        os.kill(workers_of(run)[0].pid, signal.SIGKILL)
    wait_for(lambda: len(rows_of(out)) >= NUM * 3 // 4, run)
    orphans = psutil.Process(run.pid).children(recursive=True)
    run.kill()
    run.communicate()
    assert NUM * 3 // 4 <= len(rows_of(out)) < NUM
    made = {file: file.stat().st_mtime_ns for file in out.glob("*.png")}
    second = start(file, out, 2)
    _output, errors = second.communicate(timeout=PATIENCE_S)
    assert second.returncode == 0, errors
    rows = [json.loads(row) for row in rows_of(out)]
    assert sorted(row["id"] for row in rows) == sorted(row["id"] for row in asked)
    assert sorted(file.name for file in out.glob("*.png")) == sorted(row["file"] for row in rows)
    assert {file: file.stat().st_mtime_ns for file in made} == made, "nothing is made twice"
    for row in asked:
        picture, receipt = open_picture(out / f"{row['id']}.png")
        assert receipt.request["prompt"] == row["prompt"]
        alone = model.generate(row["prompt"], seed=row["seed"], num_steps=row["num_steps"]).images[0]
        assert fidelity.psnr_db(picture, alone) >= 60
    _, alive = psutil.wait_procs(orphans, timeout=PATIENCE_S)
    assert not alive, "the killed driver left processes behind"


def test_a_hundred_thousand_requests_wait_outside_of_the_memory(tmp_path):
    file, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    with file.open("w") as opened:
        for number in range(100_000):
            opened.write(json.dumps({"id": f"n{number}", "prompt": WORDS[number % 5], "seed": number, "num_steps": 1}) + "\n")
    small = tmp_path / "small.jsonl"
    small.write_text(json.dumps({"id": "x", "prompt": "a red apple", "seed": 1, "num_steps": 400}) + "\n")
    peaks = []
    for prompts in (small, file):
        folder = out / prompts.stem
        run = start(prompts, folder, 2, start_new_session=True)
        driver, peak = psutil.Process(run.pid), 0
        until = time.monotonic() + PATIENCE_S
        while run.poll() is None and len(rows_of(folder)) < 200 and time.monotonic() < until:
            peak = max(peak, driver.memory_info().rss)
            time.sleep(0.2)
        with contextlib.suppress(ProcessLookupError):  # it may have come to its end
            os.killpg(run.pid, signal.SIGKILL)
        run.communicate()
        peaks.append(peak)
    print(", ".join(f"{peak / 2**20:.0f} MiB" for peak in peaks))
    assert len(rows_of(out / "prompts")) >= 200
    assert peaks[1] - peaks[0] < 100 * 2**20, peaks  # the lines are 9 MB; all of them as objects would be more than that


def test_a_killed_replica_costs_no_request_but_those_it_had(tmp_path):
    """Two replicas, eight people asking at once, one replica killed twice; asked with OpenAI's own client."""
    need("openai", "gradio")
    import openai

    port = free_port()
    config = (Path(imagegen.__file__).parent / "server" / "ray-serve.yaml").read_text()
    for old, new in (
        ("8000", str(port)),
        ("num_gpus: 1", "num_gpus: 0"),
        ("out: imagegen-pictures", f"out: {tmp_path}/pictures"),
    ):
        assert old in config
        config = config.replace(old, new)
    (tmp_path / "serve.yaml").write_text(config)
    program = [sys.executable, "-c", "from ray.serve.scripts import cli; cli()", "run", "--blocking", "serve.yaml"]
    address = {"RAY_ADDRESS": "local", "RAY_USAGE_STATS_ENABLED": "0"}
    server = subprocess.Popen(
        program, cwd=tmp_path, env=os.environ | address, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S)

        def ask(number):
            try:
                client.images.generate(prompt=WORDS[number % 5], extra_body={"seed": number, "num_steps": 4})
            except openai.OpenAIError as error:
                return error
            return None

        wait_for(lambda: len(replicas_of(server)) == 2 and ask(0) is None, server)
        failed, asked, killed = [], itertools.count(), 0
        with ThreadPoolExecutor(NUM_PEOPLE) as people:
            for _ in range(2):
                answers = [people.submit(ask, next(asked)) for _ in range(40)]
                wait_for(lambda answers=answers: sum(answer.done() for answer in answers) >= 10, server)
                before = {replica.pid for replica in replicas_of(server)}
                os.kill(min(before), signal.SIGKILL)
                killed += 1
                failed += [error for answer in answers if (error := answer.result()) is not None]
                wait_for(lambda before=before: len({one.pid for one in replicas_of(server)} - before) == 1, server)
                wait_for(lambda: all(ask(number) is None for number in range(4)), server)
        assert len(failed) <= NUM_PEOPLE * killed, failed
        print(f"{killed} replicas killed, {len(failed)} of {next(asked)} requests failed")
    finally:
        family = [server, *psutil.Process(server.pid).children(recursive=True)]
        server.send_signal(signal.SIGINT)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


def replicas_of(server):
    """Return the processes of the deployment: Ray names them by it."""
    found = psutil.Process(server.pid).children(recursive=True)
    return [child for child in found if "ServeReplica:imagegen:pictures" in " ".join(child.cmdline())]


def free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]
