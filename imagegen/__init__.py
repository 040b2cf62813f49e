"""imagegen: text-to-image in one line, with proof that it is still the same picture.

Every name below is imported when it is first used, so that `import imagegen` costs nothing and the
commands that need no model import no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from imagegen.request import DataError, Error, ModelError, PlanError, ReceiptError, RequestError

if TYPE_CHECKING:
    from imagegen.batch import generate_batch
    from imagegen.comparison import compare
    from imagegen.finetune import distill, finetune
    from imagegen.loader import load
    from imagegen.model import Model, Step
    from imagegen.receipt import Receipt, read_receipt
    from imagegen.reference import Verdict, replay
    from imagegen.reference_set import import_reference, record_reference
    from imagegen.request import Request
    from imagegen.result import Picture, Result
    from imagegen.speed import Plan
    from imagegen.tuner import tune

__version__ = "0.1.0"

_HOME = {
    "Model": "model",
    "Picture": "result",
    "Plan": "speed",
    "Receipt": "receipt",
    "Request": "request",
    "Result": "result",
    "Step": "model",
    "Verdict": "reference",
    "compare": "comparison",
    "distill": "finetune",
    "finetune": "finetune",
    "generate_batch": "batch",
    "import_reference": "reference_set",
    "load": "loader",
    "read_receipt": "receipt",
    "record_reference": "reference_set",
    "replay": "reference",
    "tune": "tuner",
}
__all__ = [
    "DataError",
    "Error",
    "Model",
    "ModelError",
    "Picture",
    "Plan",
    "PlanError",
    "Receipt",
    "ReceiptError",
    "Request",
    "RequestError",
    "Result",
    "Step",
    "Verdict",
    "compare",
    "distill",
    "finetune",
    "generate_batch",
    "import_reference",
    "load",
    "read_receipt",
    "record_reference",
    "replay",
    "tune",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use."""
    if name not in _HOME:
        raise AttributeError(f"module 'imagegen' has no attribute {name!r}")
    return getattr(import_module(f"imagegen.{_HOME[name]}"), name)
