"""Datasets in the Hugging Face layout: a folder here, or hf://datasets/OWNER/NAME[@REVISION].

A dataset's card (README.md) may say which files belong to which subset and split; where it says
nothing, the names do: `data/train-00000-of-00002.parquet`, `test.csv`, `validation/part.jsonl`. The
card itself is no row. Datasets of the hub come through its own client (the extra `hub`), which keeps
what it fetched in its cache; without a network, what is in the cache is used.

Source: the hub's documentation, "Data files configuration" and "File names and splits".
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from marrow.core.errors import NotPermitted, SourceError, Unreachable, UsageError, explain_os_errors
from marrow.core.files import atomic_file
from marrow.data.sources.file import HUB, FileList, SourceFile, format_of
from marrow.data.sources.remote import name_matcher

CARD = "README.md"
_DATASETS = HUB + "datasets/"
_ADDRESS = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*))?")
_NUMBERED = re.compile(r"(?:.*/)?([\w.]+?)-\d{5,}-of-\d{5,}[^/]*")
# What the hub takes for the names of splits, in files and folders without numbers.
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}

Splits = dict[str, list[str]]  # split -> names of its files


def select_files(
    names: Sequence[str], card: str, source: str, subset: str, splits: tuple[str, ...]
) -> list[str]:
    """Choose the files of a subset and its splits from the names of a dataset's files.

    Args: card: the text of its README.md. subset: empty means the default one. splits: empty means
        all. A folder whose card names no files, of which no subset or split is asked, is read whole.
    Raises: SourceError if there is no such subset or split, or no file in it.
    """
    subsets = _subsets_of(card, source)
    if not subsets:
        if not subset and not splits:
            return list(names)
        if subset:
            raise SourceError(
                f"data.subset = {subset!r}: the card of {source} names no subsets",
                hint=f"leave it out, or name the subsets in its {CARD} under `configs`",
            )
        found = splits_by_name([name for name in names if name != CARD and format_of(name)])
    else:
        chosen = _chosen(subsets, subset, source)
        found = _splits_of(chosen, names, source)
    for split in splits:
        if split not in found:
            raise SourceError(
                f"data.splits: {source} has no split {split!r}", hint=f"there are: {', '.join(found)}"
            )
    return list(dict.fromkeys(name for split in splits or found for name in found[split]))


def splits_by_name(names: Iterable[str]) -> Splits:
    """Group files into splits by their names; all are "train" where no name tells."""
    numbered: Splits = {}
    worded: Splits = {}
    rest: list[str] = []
    for name in names:
        if match := _NUMBERED.fullmatch(name):
            numbered.setdefault(match[1], []).append(name)
        elif split := _split_word(name):
            worded.setdefault(split, []).append(name)
        else:
            rest.append(name)
    found = numbered or worded or {"train": rest}
    return {split: found[split] for split in (*_WORDS, *sorted(found)) if split in found}


def find_in_hub(source: str, format: str, encoding: str, subset: str, splits: tuple[str, ...]) -> FileList:
    """List the files of a dataset of the hub, at one commit.

    Raises: UsageError for what is no such address, or without the extra; SourceError if there is no
        such dataset; NotPermitted; Unreachable if the hub is, and the cache has no copy.
    """
    match = _ADDRESS.fullmatch(source)
    if match is None:
        raise UsageError(
            f"data.source = {source!r} names no dataset of the hub",
            hint=f"write {_DATASETS}OWNER/NAME[@REVISION]",
        )
    repository, revision, below = match[1], match[2], match[3]
    hub = _client()
    listing = _listing(hub, repository, revision, source)
    commit, files = listing["commit"], listing["files"]
    try:
        card = _fetch(hub, repository, CARD, commit).read_text("utf-8", "replace") if CARD in files else ""
    except Exception as error:
        raise _explained(error, source) from error
    names = [name for name in files if not any(part.startswith(".") for part in name.split("/"))]
    if below:
        matches = name_matcher(below if "*" in below else below.rstrip("/") + "/**")
        names = [name for name in names if name == below or matches(name)]
    elif CARD in names and not subset and not splits and not _subsets_of(card, source):
        names.remove(CARD)
    names = select_files(sorted(names), card, source, subset, splits)
    root = f"{_DATASETS}{repository}@{commit}"
    return FileList(((name, *files[name]) for name in names), root=root, format=format, encoding=encoding)


def local_path(file: SourceFile) -> Path:
    """Have a file of the hub in its client's cache. Raises: as `find_in_hub`."""
    match = _ADDRESS.fullmatch(file.root)
    assert match is not None  # as find_in_hub made it
    hub = _client()
    try:
        return _fetch(hub, match[1], file.path, match[2])
    except Exception as error:
        raise _explained(error, file.where) from error


def _subsets_of(card: str, source: str) -> list[dict[str, Any]]:
    """Return the `configs` of a card's YAML head."""
    parts = card.removeprefix("\ufeff").split("---", 2)
    if len(parts) < 3 or parts[0].strip() or "configs:" not in parts[1]:
        return []
    try:
        import yaml  # type: ignore[import-untyped]  # comes with the extra "hub"
    except ImportError:
        raise UsageError(
            f"the card of {source} says which files are which; PyYAML, which reads it, is not installed",
            hint="pip install 'marrow[hub]'",
        ) from None
    try:
        head = yaml.safe_load(parts[1])
    except yaml.YAMLError as error:
        raise SourceError(f"the head of {source}/{CARD} is no YAML: {error}", hint="mend it") from error
    found = head.get("configs") if isinstance(head, dict) else None
    return [entry for entry in found or () if isinstance(entry, dict)] if isinstance(found, list) else []


def _chosen(subsets: list[dict[str, Any]], subset: str, source: str) -> dict[str, Any]:
    named = {str(entry.get("config_name", "default")): entry for entry in subsets}
    if subset:
        if subset not in named:
            raise SourceError(
                f"data.subset: {source} has no subset {subset!r}", hint=f"there are: {', '.join(named)}"
            )
        return named[subset]
    default = next((entry for entry in subsets if entry.get("default")), None) or named.get("default")
    if default is None and len(named) > 1:
        raise SourceError(
            f"{source} has {len(named)} subsets and none of them is the default",
            hint=f"set data.subset to one of: {', '.join(named)}",
        )
    return default or subsets[0]


def _splits_of(entry: dict[str, Any], names: Sequence[str], source: str) -> Splits:
    """Return the files of a subset by split, as its `data_files` and `data_dir` say."""
    folder = str(entry.get("data_dir", "")).strip("/")
    below = f"{folder}/" if folder and folder != "." else ""
    written = entry.get("data_files")
    if written is None:
        return splits_by_name(n for n in names if n.startswith(below) and n != CARD and format_of(n))
    if isinstance(written, dict):
        pairs = [(str(split), path) for split, path in written.items()]
    elif isinstance(written, list) and all(isinstance(item, dict) for item in written):
        pairs = [(str(item.get("split", "train")), item.get("path", [])) for item in written]
    else:
        pairs = [("train", written)]
    found: Splits = {}
    for split, patterns in pairs:
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            matches = name_matcher(below + str(pattern).removeprefix("./"))
            taken = [name for name in names if matches(name)]
            if not taken:
                raise SourceError(
                    f"{source}: its card promises {pattern} for the split {split!r}; there is no such file",
                    hint="fetch the dataset again, or mend its card",
                )
            found.setdefault(split, []).extend(taken)
    return found


def _split_word(name: str) -> str | None:
    """Find the name of a split as a word in a path."""
    words = set(re.split(r"[^a-z0-9]+|(?<=[a-z])(?=\d)", name.lower()))
    return next((split for split, known in _WORDS.items() if words & set(known)), None)


def _client() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise UsageError(
            "datasets of the hub need its client, which is not installed", hint="pip install 'marrow[hub]'"
        ) from None
    return huggingface_hub


def _fetch(hub: Any, repository: str, name: str, commit: str) -> Path:
    """Have a file in the client's cache. Its commit is given, so that one that is there is the right one."""
    from huggingface_hub import errors
    from huggingface_hub.utils.tqdm import tqdm

    class Silent(tqdm):
        """A library draws no bars."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "disable": True})  # type: ignore[no-untyped-call]

    def fetch(**options: Any) -> Path:
        return Path(hub.hf_hub_download(repository, name, repo_type="dataset", revision=commit, **options))

    try:
        return fetch(local_files_only=True)
    except errors.LocalEntryNotFoundError:
        return fetch(tqdm_class=Silent)


def _listing(hub: Any, repository: str, revision: str | None, source: str) -> dict[str, Any]:
    """Return the commit that a revision is at, and its files with sizes and hashes.

    The answer is kept beside the client's cache, which knows the files that were fetched but not which
    others there are: without a network, half a dataset must not pass for the whole.
    """
    from huggingface_hub import constants

    name = f"{repository}@{revision or 'main'}".replace("/", "--")
    kept = Path(constants.HF_HOME) / "marrow" / f"{name}.json"
    try:
        info = hub.HfApi().dataset_info(repository, revision=revision, files_metadata=True)
    except Exception as error:
        if not _is_of_the_network(error) or not kept.exists():
            raise _explained(error, source) from error
        return cast(dict[str, Any], json.loads(kept.read_text(encoding="utf-8")))
    files = {s.rfilename: [s.size or 0, s.blob_id or ""] for s in info.siblings or ()}
    listing = {"commit": str(info.sha), "files": files}
    with explain_os_errors("keep the listing of a dataset", kept), atomic_file(kept, "w") as file:
        json.dump(listing, file)
    return listing


def _is_of_the_network(error: Exception) -> bool:
    """Tell whether an error says that the hub could not be asked, rather than what it answered."""
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):
        response = getattr(error, "response", None)
        return response is None or response.status_code >= 500
    if isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError | ConnectionError):
        return True
    return type(error).__module__.startswith(("httpx", "httpcore", "requests"))


def _unreachable(source: str, error: Exception) -> Unreachable:
    return Unreachable(
        f"{source}: the hub cannot be reached ({type(error).__name__}), and its cache lacks what is needed",
        hint="check the network, HF_ENDPOINT and HF_HUB_OFFLINE; or copy the dataset's folder here and "
        "give its path",
    )


def _explained(error: Exception, source: str) -> Exception:
    """Say what a user can do about an answer of the hub, or about having none."""
    from huggingface_hub import errors

    if _is_of_the_network(error):
        return _unreachable(source, error)

    if isinstance(error, errors.GatedRepoError):
        return NotPermitted(
            f"{source} is gated: its owner grants access",
            hint="ask for access on its page, then set HF_TOKEN or run `hf auth login`",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return SourceError(f"{source}: there is no such revision", hint="write a branch, a tag or a commit")
    if isinstance(error, errors.RepositoryNotFoundError):
        return SourceError(
            f"{source}: there is no such dataset, or it is private",
            hint="check the spelling; for a private one set HF_TOKEN or run `hf auth login`",
        )
    if isinstance(error, errors.EntryNotFoundError):
        return SourceError(f"{source} is not there any more", hint="run the same command again")
    if isinstance(error, errors.HfHubHTTPError | errors.HFValidationError):
        return SourceError(
            f"{source}: the hub refuses: {error}", hint=f"write {_DATASETS}OWNER/NAME[@REVISION]"
        )
    return error
