"""The hub and its cache: which files of a repository make a model, and where they lie once here.

huggingface_hub does the work; its cache and its settings (`HF_HUB_CACHE`, `HF_HUB_OFFLINE`, `HF_ENDPOINT`, a login) hold.
Knows nothing of what the files are for.
"""

import json
import re
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from imagegen.request import ModelError
from imagegen.weights import PICKLES, STEMS

ID = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+?)(?:@([\w./-]+))?")
SMALL = (".json", ".txt", ".model", ".jinja")  # configurations and tokenizers
COMMIT = re.compile(r"[0-9a-f]{40}")


def parse_id(name: str) -> tuple[str, str | None] | None:
    """Return a name as a hub id and a revision, as in `org/name@revision`; None where it cannot be one."""
    found = ID.fullmatch(name)
    if not found or ".." in name or found[1].lower().endswith((*PICKLES, ".safetensors", ".gguf", ".json")):
        return None
    return found[1], found[2]


def fetch(
    repo: str, revision: str | None, variant: str | None, local_files_only: bool, without: Collection[str] = ()
) -> tuple[Path, str]:
    """Return the folder of a repository in the hub's cache, with all that a model needs, and its commit.

    Args:
        repo: as in `org/name`.
        revision: branch, tag or commit; by default the main branch.
        variant: of the weights, as in `fp16`.
        local_files_only: ask the cache alone.
        without: components whose weights are not wanted.

    Raises:
        ModelError: there is no such repository or revision, it is not in the cache and the hub may not or cannot be
            asked, or it holds no safetensors.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # huggingface_hub's own, about symbolic links
        from huggingface_hub import constants, snapshot_download
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if revision is not None and (".." in revision or not re.fullmatch(r"[\w./-]+", revision)):
        raise ModelError(f"revision must be a branch, a tag or a commit, got {revision!r}")
    where = f"{repo!r} at revision {revision!r}" if revision else repr(repo)
    offline = local_files_only or constants.is_offline_mode()
    wanted, unreachable = None, None
    try:
        if not offline:
            wanted = _list_wanted(repo, revision, variant, without)
    except GatedRepoError:
        raise ModelError(f"{where} is gated: accept its terms at {constants.ENDPOINT}/{repo}, then `hf auth login`") from None
    except RepositoryNotFoundError:
        raise ModelError(f"the hub has no {repo!r}, or it is private: check the name, or `hf auth login`") from None
    except RevisionNotFoundError:
        raise ModelError(f"{repo!r} has no revision {revision!r}: leave it out for the main branch") from None
    except ModelError:
        raise
    except Exception as error:  # whatever the HTTP library of the day raises: the cache may have it
        unreachable = " ".join(str(error).split())[:200]
    try:
        in_cache = offline or unreachable is not None
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted, local_files_only=in_cache))
    except Exception as error:
        partial = getattr(error, "snapshot_path", None)  # it lacks files that nobody wanted, or some: loading tells
        if partial is None:
            raise ModelError(_not_here(where, local_files_only, offline, unreachable or str(error))) from None
        folder = Path(partial)
    return folder, folder.name


def _not_here(where: str, local_files_only: bool, offline: bool, reason: str) -> str:
    from huggingface_hub import constants

    if offline:
        why = "local_files_only=True" if local_files_only else "HF_HUB_OFFLINE=1"
        return f"{where} is not in the cache of the hub ({constants.HF_HUB_CACHE}), and {why} forbids to download it"
    return f"{where} cannot be had from {constants.ENDPOINT}: {reason[:200]}"


def _list_wanted(repo: str, revision: str | None, variant: str | None, without: Collection[str]) -> list[str]:
    """Return the names of a repository's files that are wanted."""
    from huggingface_hub import HfApi, hf_hub_download

    info = HfApi().model_info(repo, revision=revision)
    names = [file.rfilename for file in info.siblings or ()]
    index = None
    if "model_index.json" in names:
        read = hf_hub_download(repo, "model_index.json", revision=info.sha)
        try:
            index = json.loads(Path(read).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(f"the model_index.json of {repo!r} cannot be read: {error}") from None
    return choose_files(repo, names, index, variant, without)


def choose_files(
    repo: str, names: Iterable[str], index: dict[str, Any] | None, variant: str | None, without: Collection[str] = ()
) -> list[str]:
    """Return which of a repository's files make the model: configurations, tokenizers and one set of safetensors.

    Args:
        repo: for messages.
        names: of all its files.
        index: its `model_index.json`; None where it has none, and its top is taken as one component.
        variant: of the weights, where a component has it.
        without: components whose weights are not wanted.

    Raises:
        ModelError: it holds no safetensors, or nothing of that variant.
    """
    names = sorted(names)
    parts = [name for name, value in (index or {}).items() if isinstance(value, list) and value and value[0]]
    folders = ["", *parts] if index is not None else ["", "vae"]
    chosen, of_variant = [], False
    for folder in folders:
        inside = [name for name in names if name.rpartition("/")[0] == folder]
        chosen += [name for name in inside if name.endswith(SMALL) and ".index." not in name]
        if folder in without or (folder == "" and index is not None):
            continue  # at the top, whole models in one file lie beside the folders
        weights = [name for name in inside if name.endswith(".safetensors")]
        wanted = [name for name in weights if variant and _variant_of(name) == variant]
        of_variant |= bool(wanted)
        wanted = wanted or [name for name in weights if _variant_of(name) is None]
        if not wanted and index is None and folder == "":
            wanted = [name for name in inside if name.rpartition("/")[2].startswith("pytorch_model") and name.endswith(".bin")]
        pickles = [name for name in inside if name.endswith(PICKLES)]
        if not wanted and (weights or pickles):
            found = sorted({_variant_of(name) or "" for name in weights} - {""})
            hint = f"there is variant={', '.join(found)}" if found else "pickles may hold code and are not opened"
            raise ModelError(f"{repo!r} has no plain safetensors for {folder or 'its weights'}: {hint}")
        chosen += wanted
        suffix = f".index.{variant}.json" if variant and wanted and _variant_of(wanted[0]) == variant else ".index.json"
        chosen += [name for name in inside if name.endswith(suffix)]
    if not any(name.endswith((".safetensors", ".bin")) for name in chosen):
        raise ModelError(f"{repo!r} holds no safetensors that make a model: give another hub id, or one of its files, downloaded")
    if variant and not of_variant:
        raise ModelError(f"{repo!r} has no variant {variant!r}: leave variant= out")
    return sorted(set(chosen))


def _variant_of(name: str) -> str | None:
    """Return the variant in a weight file's name, as in `model.fp16.safetensors` or `model.fp16-00001-of-00002.safetensors`."""
    stem = re.sub(r"-\d{5}-of-\d{5}", "", name.rpartition("/")[2].removesuffix(".safetensors"))
    first, _, rest = stem.partition(".")
    return rest or None if first in STEMS else None
