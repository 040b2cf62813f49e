"""The quicker start: no compiler for one picture, the real one the moment something compiles."""

import json
import subprocess
import sys


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_one_picture_imports_neither_compiler_nor_sharded_tensors(tmp_path):
    code = f"""
import json, sys
from imagegen import cli
assert cli.run(["generate", "a red apple", "--steps", "1", "--out", {str(tmp_path)!r}]) == 0
wanted = ("torch._dynamo.convert_frame", "torch.distributed.fsdp", "torch.distributed.tensor", "torchao", "peft", "gradio")
print(json.dumps([name for name in wanted if name in sys.modules]))
"""
    assert run(code) == []


def test_the_stand_in_becomes_the_compiler():
    code = """
import json
from imagegen import startup
import sys
with startup.imports_for_one_picture():
    import torch, diffusers
    from diffusers import UNet2DConditionModel
before = "torch._dynamo.convert_frame" in sys.modules
double = torch.compile(lambda x: x * 2, backend="eager", fullgraph=True)
print(json.dumps([before, double(torch.ones(2)).tolist(), "torch._dynamo.convert_frame" in sys.modules]))
"""
    assert run(code) == [False, [2.0, 2.0], True]


def test_the_library_replaces_nothing():
    code = """
import json, sys
import imagegen, torch
model = imagegen.load()
model("a cat", num_steps=1)
print(json.dumps([type(sys.modules["torch._dynamo"]).__name__, torch.distributed.is_available()]))
"""
    import torch

    assert run(code) == ["module", torch.distributed.is_available()]
