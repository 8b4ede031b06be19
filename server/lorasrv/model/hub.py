"""Base models from the Hugging Face Hub: one commit, safetensors and JSON only. Knows no file format."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lorasrv.errors import ModelLoadError

_REFERENCE = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]
# folders hold other formats of the same weights, and so do consolidated files
_UNWANTED = ["*/*", "consolidated*"]
# what the library's HTTP client raises; which client that is depends on the library's version
_TransportError: type[Exception] = HfHubHTTPError.__bases__[0]
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSnapshot:
    """A downloaded model folder and exactly which one it is."""

    path: Path
    repo_id: str
    commit: str


def is_hub_reference(source: str) -> bool:
    """Whether `source` reads as "org/name" or "org/name@revision" and is no folder here."""
    return _REFERENCE.fullmatch(source) is not None and not Path(source).exists()


def model_folder(source: str) -> Path:
    """The folder of a model that is named by its folder or, to be downloaded, by "org/name@revision".

    Raises:
        ModelLoadError: it cannot be downloaded.
    """
    return download_model(source).path if is_hub_reference(source) else Path(source).expanduser().absolute()


def download_model(
    reference: str, *, endpoint: str | None = None, cache_dir: Path | None = None, token: str | None = None
) -> HubSnapshot:
    """Downloads a model, or finds it in the cache; blocks for as long as that takes.

    A branch or tag is resolved to its commit first, and the log says which; a full commit needs no network once cached.

    Args:
        reference: "org/name@revision"; without a revision, "main".
        endpoint: address of the Hub; by default the library's own.
        cache_dir: where downloads are kept; by default the library's own.
        token: for gated and private repositories.

    Raises:
        ModelLoadError: not found, not permitted, not reachable, or no reference.
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise ModelLoadError([f"{reference!r} must be a folder or org/name@revision"])
    repo_id, revision = match["repo"], match["revision"] or "main"
    try:
        path = snapshot_download(
            repo_id,
            revision=revision,
            endpoint=endpoint,
            cache_dir=cache_dir,
            token=token,
            allow_patterns=_WANTED,
            ignore_patterns=_UNWANTED,
        )
    except (_TransportError, HFValidationError, OSError) as error:
        raise ModelLoadError([_explain(error, repo_id, revision)]) from error
    # the library files a snapshot under its commit
    commit = Path(path).name
    if revision != commit:
        _log.warning("%s@%s is commit %s now; to pin it, ask for %s@%s", repo_id, revision, commit, repo_id, commit)
    return HubSnapshot(path=Path(path), repo_id=repo_id, commit=commit)


def _explain(error: Exception, repo_id: str, revision: str) -> str:
    if isinstance(error, GatedRepoError):
        return f"{repo_id} is gated: accept its terms on the Hub and give a token"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no revision {revision!r}"
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no model {repo_id} on the Hub, or the token does not permit it"
    return f"{repo_id}@{revision} could not be downloaded: {error}"
