"""One of two processes that draw a tiny FLUX's picture together: run by torchrun, prints what it found as JSON."""

import json

import torch
from tiny import FluxBench

torch.accelerator.device_count = lambda: 2  # diffusers asks for accelerators, and here are none


def main():
    bench = FluxBench()
    alone = bench.draw(num_steps=3)
    before = bench.snapshot()
    bench.set_plan("context-parallel")
    together = bench.draw(num_steps=3)
    report = bench.report()
    bench.set_plan("exact")
    found = {
        "rank": torch.distributed.get_rank(),
        "difference": int(abs(together - alone).max()),
        "range": int(alone.max() - alone.min()),
        "report": report,
        "picture back": bool((bench.draw(num_steps=3) == alone).all()),
        "parts back": bench.snapshot() == before,
    }
    print(json.dumps(found), flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
