"""One stage in a process of its own: `python -m imagegen.bench STAGE MODEL`; the last line is what it measured."""

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from imagegen.bench import crowd, denoiser, gpu, janusflow, pictures, training, workers
from imagegen.profile import finite
from imagegen.request import Error

MEASURES: dict[str, Callable[..., dict[str, Any]]] = {
    "machine": pictures.measure_machine,
    "parts": pictures.measure_parts,
    "pictures": pictures.measure_pictures,
    "training": training.measure_training,
    "kernels": gpu.measure_kernels,
    "denoiser": denoiser.measure_denoiser,
    "janusflow": janusflow.measure_janusflow,
    "crowd": crowd.measure_crowd,
    "workers": workers.measure_workers,
}


def main(arguments: Sequence[str]) -> int:
    """Run the stage and print what it measured."""
    stage = json.loads(arguments[0])
    settings = {key: value for key, value in stage.items() if key != "stage"}
    try:
        measured = MEASURES[stage["stage"]](arguments[1], **settings)
    except Error as error:
        print(str(error), file=sys.stderr)
        return 1
    print(json.dumps(finite(measured)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
