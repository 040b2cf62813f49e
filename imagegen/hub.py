"""The hub and its cache: which files of a repository make a model, and where they lie once here.

huggingface_hub does the work; its cache and its settings (`HF_HUB_CACHE`, `HF_HUB_OFFLINE`, `HF_ENDPOINT`, a login) hold.
Knows nothing of what the files are for.
"""

import re
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from imagegen.request import ModelError
from imagegen.weights import PICKLES, STEMS, name_parts, read_json

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
    repo: str,
    revision: str | None,
    variant: str | None,
    local_files_only: bool,
    without: Collection[str] = (),
    only: str | None = None,
) -> tuple[Path, str]:
    """Return the folder of a repository in the hub's cache, with all that a model needs, and its commit.

    What the hub no longer has, or gives to others only, is taken from the cache.

    Args:
        repo: as in `org/name`.
        revision: branch, tag or commit; by default the main branch.
        variant: of the weights, as in `fp16`.
        local_files_only: ask the cache alone.
        without: components whose weights are not wanted.
        only: the one component that is wanted.

    Raises:
        ModelError: neither the hub nor the cache has it, the hub may not or cannot be asked, or it holds no safetensors.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # huggingface_hub's own, about symbolic links
        from huggingface_hub import constants, snapshot_download
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if revision is not None and (".." in revision or not re.fullmatch(r"[\w./-]+", revision)):
        raise ModelError(f"revision must be a branch, a tag or a commit, got {revision!r}")
    where = f"{repo!r} at revision {revision!r}" if revision else repr(repo)
    offline = local_files_only or constants.is_offline_mode()
    wanted, refused = None, ""
    try:
        if not offline:
            wanted = _list_wanted(repo, revision, variant, without, only)
    except GatedRepoError:
        refused = f"{where} is gated: accept its terms at {constants.ENDPOINT}/{repo}, then `hf auth login`"
    except RepositoryNotFoundError:
        refused = f"the hub has no {repo!r}, or it is private, and no such folder is here: check the name, or `hf auth login`"
    except RevisionNotFoundError:
        refused = f"{repo!r} has no revision {revision!r}: leave it out for the main branch"
    except ModelError:
        raise
    except Exception as error:  # whatever the HTTP library of the day raises
        refused = _cannot_be_had(where, error)
    try:
        in_cache = offline or bool(refused)
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted, local_files_only=in_cache))
    except Exception as error:
        partial = getattr(error, "snapshot_path", None)  # it lacks files that nobody wanted, or some: loading tells
        if partial is None:
            raise ModelError(_not_cached(repo, where) if offline else refused or _cannot_be_had(where, error)) from None
        folder = Path(partial)
    return folder, folder.name


def _cannot_be_had(where: str, error: Exception) -> str:
    from huggingface_hub import constants

    return f"{where} cannot be had from {constants.ENDPOINT}: {' '.join(str(error).split())[:200]}"


def _not_cached(repo: str, where: str) -> str:
    from huggingface_hub import constants

    asked = (
        "HF_HUB_OFFLINE=1 forbids to download it"
        if constants.is_offline_mode()
        else (
            f"nothing else was asked: `imagegen generate … --model {repo}`, or load() without local_files_only=True, downloads it"
        )
    )
    return f"{where} is not in the cache of the hub ({constants.HF_HUB_CACHE}), no such folder is here, and {asked}"


def _list_wanted(repo: str, revision: str | None, variant: str | None, without: Collection[str], only: str | None) -> list[str]:
    """Return the names of a repository's files that are wanted."""
    from huggingface_hub import HfApi, hf_hub_download

    info = HfApi().model_info(repo, revision=revision)
    names = [file.rfilename for file in info.siblings or ()]
    index = None
    if "model_index.json" in names:
        read = hf_hub_download(repo, "model_index.json", revision=info.sha)
        try:
            index = dict(read_json(Path(read)))
        except (ValueError, TypeError) as error:
            raise ModelError(f"the model_index.json of {repo!r} cannot be read: {error}") from None
    return choose_files(repo, names, index, variant, without, only)


def choose_files(
    repo: str,
    names: Iterable[str],
    index: dict[str, Any] | None,
    variant: str | None,
    without: Collection[str] = (),
    only: str | None = None,
) -> list[str]:
    """Return which of a repository's files make the model: configurations, tokenizers and one set of safetensors.

    Args:
        repo: for messages.
        names: of all its files.
        index: its `model_index.json`; None where it has none, and its top is taken as one component.
        variant: of the weights, where a component has it.
        without: components whose weights are not wanted.
        only: the one component that is wanted; of that variant, where it has it.

    Raises:
        ModelError: it holds no safetensors that make a model, or nothing of that variant.
    """
    names = sorted(names)
    parts = [name for name, value in (index or {}).items() if isinstance(value, list) and value and value[0]]
    if index is not None and only is not None:
        if only not in parts:
            raise ModelError(f"{repo!r} has no {only}: give another hub id, or a folder")
        parts = [only]
    if index is None:
        _check_component(repo, names)
    folders = ["", *parts] if index is not None else ["", "vae"]
    chosen, of_variant = [], False
    for folder in folders:
        inside = [name for name in names if name.rpartition("/")[0] == folder]
        chosen += [name for name in inside if name.endswith(SMALL) and ".index." not in name]
        if folder in without or (folder == "" and index is not None):
            continue  # at the top, whole models in one file lie beside the folders
        weights = [name for name in inside if name.endswith(".safetensors") and name_parts(name)[0] in STEMS]
        wanted = [name for name in weights if variant and name_parts(name)[1] == variant]
        of_variant |= bool(wanted)
        wanted = wanted or [name for name in weights if name_parts(name)[1] is None]
        if not wanted and index is None and folder == "":
            wanted = [name for name in inside if _is_pytorch(name)]
        pickles = [name for name in inside if name.endswith(PICKLES)]
        if not wanted and (weights or pickles):
            found = sorted({name_parts(name)[1] or "" for name in weights} - {""})
            hint = f"there is variant={', '.join(found)}" if found else "pickles may hold code and are not opened"
            raise ModelError(f"{repo!r} has no plain safetensors for {folder or 'its weights'}: {hint}")
        chosen += wanted
        suffix = f".index.{variant}.json" if variant and wanted and name_parts(wanted[0])[1] == variant else ".index.json"
        chosen += [name for name in inside if name.endswith(suffix)]
    if not any(name.endswith((".safetensors", ".bin")) for name in chosen):
        raise ModelError(f"{repo!r} holds no safetensors that make a model: give another hub id")
    if variant and not of_variant and only is None:
        raise ModelError(f"{repo!r} has no variant {variant!r}: leave variant= out")
    return sorted(set(chosen))


def _is_pytorch(name: str) -> bool:
    """Return whether a file at the top holds weights in PyTorch's format, which of Janus alone are read."""
    return "/" not in name and name.startswith("pytorch_model") and name.endswith(".bin")


def _check_component(repo: str, names: list[str]) -> None:
    """Refuse a repository without an index that is no single component either, before any of its files is fetched.

    Raises:
        ModelError: it lacks a configuration, or weights under the usual names beside it.
    """
    weights = [name for name in names if "/" not in name and name.endswith((".safetensors", ".gguf"))]
    usual = any(name_parts(name)[0] in STEMS for name in weights if not name.endswith(".gguf")) or any(map(_is_pytorch, names))
    if ("config.json" in names and usual) or "vae/config.json" in names:
        return
    start = f"{repo!r} holds no safetensors that make a model: no model_index.json, no {' or '.join(STEMS)} beside a config.json"
    if not weights:
        raise ModelError(f"{start}; give another hub id")
    more = f" and {len(weights) - 5} more" if len(weights) > 5 else ""
    raise ModelError(
        f"{start}. It holds {', '.join(weights[:5])}{more}: download the one you want, "
        f"as in `hf download {repo} {weights[0]}`, and give its path"
    )
