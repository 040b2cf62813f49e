"""The programs' interface as a Ray Serve deployment: as many replicas as a config file says, each with its own model.

`serve run serve.yaml`, where the file's `import_path` is `imagegen.server.cluster:build`, starts it; `ray-serve.yaml`
beside this file is one to begin with. Ray is imported where it is used: it is an extra.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagegen.catalog import EMBEDDED
from imagegen.request import RequestError

if TYPE_CHECKING:
    from ray.serve import Application

    from imagegen.server.guard import Guard

LOADED_WITH = ("revision", "device", "dtype", "plan", "variant", "base", "vae", "memory_gib")  # keywords of `load`
OTHERS = ("model", "out", "public", "allow_hosts", "safety", "max_waiting", "max_batch")


def build(args: dict[str, Any]) -> "Application":
    """Return the application for Ray Serve.

    Args:
        args: of the config file: `model` and what else `load` takes; `out`, the folder on each replica's machine that
            keeps the pictures; `public`, `allow_hosts`, `safety`, `max_waiting`, `max_batch` as of `imagegen serve`. The
            token comes from IMAGEGEN_TOKEN alone, so that it stands in no file.

    Raises:
        RequestError: an argument is unknown, or others could come who know no token.
    """
    unknown = sorted(set(args) - {*LOADED_WITH, *OTHERS})
    if unknown:
        raise RequestError(f"unknown argument {unknown[0]!r}: they are {', '.join((*OTHERS, *LOADED_WITH))}")
    from ray import serve

    from imagegen.server import check_rules

    given, token = dict(args), os.environ.get("IMAGEGEN_TOKEN")
    check_rules(None, bool(given.get("public")), given.get("allow_hosts", ()), token)  # before any replica starts

    def replica() -> "Guard":
        return build_replica(given, token)

    @serve.deployment(name="pictures", max_ongoing_requests=int(given.get("max_waiting", 32)))
    @serve.ingress(replica)
    class Pictures:
        """Answers what `replica` answers."""

    deployment: Any = Pictures
    return deployment.bind()


def build_replica(args: dict[str, Any], token: str | None) -> "Guard":
    """Load the model and return what answers for it; in each replica's process."""
    from imagegen.engine import Engine
    from imagegen.loader import load
    from imagegen.server import build_app, check_rules, find_safety

    options = {name: args[name] for name in LOADED_WITH if args.get(name) is not None}
    model = load(args.get("model") or EMBEDDED, **options)
    safety = find_safety(args["safety"]) if args.get("safety") else None
    limits = {name: args[name] for name in ("max_waiting", "max_batch") if args.get(name) is not None}
    rules = check_rules(None, bool(args.get("public")), args.get("allow_hosts", ()), token)
    return build_app(Engine(model, safety=safety, **limits), Path(args.get("out", "imagegen-pictures")).resolve(), None, rules)
