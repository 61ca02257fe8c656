"""A repository on the Hugging Face Hub becomes a folder on this machine.

`huggingface_hub` does the work: its cache, its progress bars, and its environment variables
(HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT, HF_HUB_DISABLE_PROGRESS_BARS). This file chooses
what is fetched, says when a snapshot is complete, and turns whatever goes wrong into one sentence
with a way out. It does not look into the files; their readers do.
"""

import errno
import os
from glob import escape
from pathlib import Path, PurePosixPath

import huggingface_hub
from huggingface_hub import constants, errors

from refimpl_weights.errors import MissingError, WeightsError
from refimpl_weights.safetensors import INDEX_FILE, SINGLE_FILE, read_index

CONFIG_FILE = "config.json"
WANTED = [
    CONFIG_FILE,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
]
# In the Hub's patterns * matches a slash too. Subfolders hold other formats and adapters.
UNWANTED = ["*/*"]


def fetch(
    repository: str,
    *,
    revision: str | None = None,
    offline: bool | None = None,
    token: str | None = None,
    file_name: str | None = None,
) -> Path:
    """A complete snapshot of a model in the Hub's cache, downloaded as far as it is not there yet.

    Without a network a complete cached snapshot is as good. Ctrl-C passes through; files that were
    finished before it stay, so the next call goes on with the rest.

    Args:
        repository: such as `google/gemma-3-4b-it`.
        revision: branch, tag or commit; None for `main`.
        offline: whether to use the cache alone; None asks HF_HUB_OFFLINE, which False cannot undo.
        token: access token; None for HF_TOKEN or the one stored by `hf auth login`.
        file_name: fetch this one file, such as `model-Q4_K_M.gguf`, and nothing else.

    Returns:
        The snapshot's folder; the file in it where `file_name` is given.

    Raises:
        MissingError: not to be had; the message says whether that is because of the name, the
            terms, the token, the network or the disk, and what to do.
        FormatError: the repository's index of shards is damaged.
    """
    if file_name is not None and not _is_inside(file_name):
        raise MissingError(f"{file_name!r} is not the name of a file in {repository}")
    cache_only = huggingface_hub.is_offline_mode() if offline is None else offline
    try:
        folder = _snapshot(
            repository, revision, token=token, cache_only=cache_only, file_name=file_name
        )
    # HTTPError is the base of the HTTP client's errors, whichever client this version of the Hub
    # uses. An answer that is no JSON is a ValueError, a failing transfer can be a RuntimeError.
    except (errors.HTTPError, OSError, ValueError, RuntimeError) as error:  # pyright: ignore[reportPrivateImportUsage]
        raise MissingError(_explain(error, repository, revision=revision)) from error
    lacking = _lacking(folder) if file_name is None else _absent(folder, [file_name])
    if lacking:
        raise MissingError(
            f"the snapshot of {repository} in {folder} lacks {', '.join(lacking)}: go online and "
            f"fetch it again, or choose what {_page(repository)} has (a model in the layout of "
            "transformers, or with file_name any one file)"
        )
    return folder if file_name is None else folder / file_name


def local_snapshot(repository: str, *, revision: str | None = None) -> Path | None:
    """The folder of a complete snapshot (`config.json` and all weights) in the cache, else None.

    Never touches the network. Files are looked for and not opened, except for the index.
    """
    try:
        folder = _snapshot(repository, revision, cache_only=True)
        return None if _lacking(folder) else folder
    except (errors.LocalEntryNotFoundError, errors.HFValidationError, WeightsError, OSError):
        # Not there, not a name, or not to be read: in each case there is nothing to load.
        return None


def _snapshot(
    repository: str,
    revision: str | None,
    *,
    cache_only: bool,
    token: str | None = None,
    file_name: str | None = None,
) -> Path:
    return Path(
        huggingface_hub.snapshot_download(
            repository,
            revision=revision,
            token=token,
            local_files_only=cache_only,
            allow_patterns=WANTED if file_name is None else [escape(file_name)],
            ignore_patterns=UNWANTED if file_name is None else None,
        )
    )


def _lacking(folder: Path) -> list[str]:
    """What a loader would look for in vain. Older caches have no listing to compare with."""
    index = folder / INDEX_FILE
    weights = read_index(index)[1].values() if index.is_file() else [SINGLE_FILE]
    return _absent(folder, [CONFIG_FILE, *dict.fromkeys(weights)])


def _absent(folder: Path, names: list[str]) -> list[str]:
    return [name for name in names if not (folder / name).is_file()]


def _is_inside(file_name: str) -> bool:
    parts = PurePosixPath(file_name).parts
    return bool(parts) and parts[0] != "/" and ".." not in parts and "\\" not in file_name


def _page(repository: str) -> str:
    return f"{constants.ENDPOINT}/{repository}"


def _explain(error: BaseException, repository: str, *, revision: str | None) -> str:
    """One sentence: what was asked for, what stood in the way, what to do."""
    cache, page = constants.HF_HUB_CACHE, _page(repository)
    match error:
        case errors.HFValidationError():
            return f"{repository!r} is not a repository, expected owner/name: {error}"
        case errors.GatedRepoError():
            return (
                f"{repository} is gated: accept its terms on {page}, then set HF_TOKEN to an "
                "access token of the account that accepted them"
            )
        case errors.RepositoryNotFoundError():
            return (
                f"the Hub has no repository {repository}, or it is private: look at {page}, and "
                "set HF_TOKEN for a private one"
            )
        case errors.RevisionNotFoundError():
            return f"{repository} has no revision {revision or 'main'!r}: look at {page}"
        case errors.HfHubHTTPError():
            return _explain_status(error, repository)
        case errors.LocalEntryNotFoundError():
            return _explain_absence(error.__cause__, repository)
    # The transfer library reports a full disk as a RuntimeError with the system's words in it.
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error):
        return (
            f"the disk is full, there is no room for {repository} in {cache}: make room, or set "
            "HF_HOME to a folder on another disk"
        )
    return (
        f"{repository} could not be fetched to {cache} ({type(error).__name__}: {error}): try "
        "again, files that are complete stay"
    )


def _explain_absence(cause: BaseException | None, repository: str) -> str:
    """The cache cannot answer; `cause` is why nobody else could, None if nobody was asked."""
    if isinstance(cause, errors.HfHubHTTPError):
        return _explain_status(cause, repository)
    absence = f"{repository} is not, or not completely, in the cache {constants.HF_HUB_CACHE}"
    if cause is None or isinstance(cause, errors.OfflineModeIsEnabled):
        return (
            f"{absence}, and downloads are switched off: go online for a first fetch, without "
            "HF_HUB_OFFLINE"
        )
    return (
        f"{absence}, and the Hub cannot be reached ({type(cause).__name__}: {cause}): see to the "
        "network or the proxy"
    )


def _explain_status(error: errors.HfHubHTTPError, repository: str) -> str:
    """The Hub did answer, but not with the files."""
    status = error.response.status_code
    advice = {
        401: "set HF_TOKEN to a valid access token, or unset it",
        403: "give the access token the permission to read gated repositories",
    }.get(status, "try again later")
    said = error.server_message or str(error).strip()
    return f"the Hub answered {status} to the request for {repository} ({said}): {advice}"
