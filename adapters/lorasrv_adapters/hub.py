"""Adapters from the Hugging Face Hub: allow-listed repositories, named revisions, an adapter's own files and no others.

Each commit gets a folder of its own, which appears completely or not at all. It knows the Hub's interface through
huggingface_hub, and nothing of what the files mean.
"""

import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import HfApi

# HTTPError is the transport's base error: of httpx or httpx2, by huggingface_hub's release
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo

from lorasrv_adapters.config import CONFIG_NAME
from lorasrv_adapters.errors import (
    AdapterIncompatibleError,
    AdapterSourceError,
    HubAccessDeniedError,
    HubUnreachableError,
    SourceNotAllowedError,
    SourceNotFoundError,
)
from lorasrv_adapters.provenance import PROVENANCE_NAME
from lorasrv_adapters.weights import DEFAULT_LIMITS, WEIGHTS_NAME, WeightLimits, pickle_hint

TIMEOUT_SECONDS = 10.0

_REFERENCE = re.compile(r"(?P<repository>\w[\w.-]{0,95}/\w[\w.-]{0,95})@(?P<revision>\w[\w./-]{0,127})", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSource:
    """The Hub, and what may be fetched from it.

    Attributes:
        allowed: Repositories as "org/name", or "org/*" for all of an organisation.
        folder: Where downloads are kept; created when first needed.
        endpoint: The Hub's address; None: the public one.
        token: Sent with each request; None: none is, whatever the machine has stored.
        limits: Larger files are refused before they are downloaded.
    """

    allowed: tuple[str, ...]
    folder: Path
    endpoint: str | None = None
    token: str | None = field(default=None, repr=False)
    limits: WeightLimits = DEFAULT_LIMITS

    def fetch(self, reference: str) -> Path:
        """Return the local folder of "org/name@revision", downloading it unless that commit is here already. Blocks.

        Raises:
            SourceNotAllowedError: The reference is malformed or not on the allow-list.
            SourceNotFoundError: There is no such repository, revision or adapter file.
            HubUnreachableError: No connection, or a fault of the Hub.
            HubAccessDeniedError: The Hub refused the token.
            AdapterIncompatibleError: The weights are pickled, or too large.
        """
        match = _REFERENCE.fullmatch(reference)
        if match is None or ".." in reference:
            raise SourceNotAllowedError(reference, "a Hub source is org/name@revision, the revision included")
        repository, revision = match["repository"], match["revision"]
        if not any(fnmatchcase(repository, pattern) for pattern in self.allowed):
            raise SourceNotAllowedError(reference, f"{repository} is not on the allow-list")
        if (here := self._folder_of(repository, revision)).is_dir():
            return here
        api = HfApi(endpoint=self.endpoint, token=self.token or False)
        with _translated_errors(reference):
            info = api.model_info(repository, revision=revision, files_metadata=True, timeout=TIMEOUT_SECONDS)
            self._check_files(reference, info)
            return self._download(api, repository, str(info.sha), self._wanted_files(info))

    def _folder_of(self, repository: str, commit: str) -> Path:
        return self.folder / repository.replace("/", "--") / commit.replace("/", "--")

    def _check_files(self, reference: str, info: ModelInfo) -> None:
        sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
        if WEIGHTS_NAME not in sizes and (hint := pickle_hint(sizes)):
            raise AdapterIncompatibleError([hint])
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if name not in sizes:
                raise SourceNotFoundError(reference, f"the repository has no {name}")
            if sizes[name] > self.limits.total_bytes + self.limits.header_bytes:
                raise AdapterIncompatibleError([f"{name} has {sizes[name]} bytes, beyond the limit"])

    def _wanted_files(self, info: ModelInfo) -> tuple[str, ...]:
        recorded = any(sibling.rfilename == PROVENANCE_NAME for sibling in info.siblings or ())
        return (CONFIG_NAME, WEIGHTS_NAME, PROVENANCE_NAME) if recorded else (CONFIG_NAME, WEIGHTS_NAME)

    def _download(self, api: HfApi, repository: str, commit: str, names: Sequence[str]) -> Path:
        target = self._folder_of(repository, commit)
        if target.is_dir():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=target.parent))
        try:
            for name in names:
                api.hf_hub_download(repository, name, revision=commit, local_dir=draft, etag_timeout=TIMEOUT_SECONDS)
            shutil.rmtree(draft / ".cache", ignore_errors=True)
            _move_in(draft, target)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return target


def _move_in(draft: Path, target: Path) -> None:
    try:
        draft.rename(target)
    except OSError:
        # somebody else brought the same commit meanwhile
        if not target.is_dir():
            raise


@contextmanager
def _translated_errors(reference: str) -> Iterator[None]:
    try:
        yield
    except GatedRepoError as error:
        raise HubAccessDeniedError(reference, "the repository is gated, and the token has no access to it") from error
    except RepositoryNotFoundError as error:
        raise SourceNotFoundError(reference, "there is no such repository, or it needs a token") from error
    except RevisionNotFoundError as error:
        raise SourceNotFoundError(reference, "the repository has no such revision") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise HubUnreachableError(reference, "the Hub cannot be reached") from error
    except EntryNotFoundError as error:
        raise SourceNotFoundError(reference, "the revision lacks an adapter file") from error
    except HfHubHTTPError as error:
        raise _status_error(reference, error.response.status_code) from error
    except HTTPError as error:
        raise HubUnreachableError(reference, "the Hub cannot be reached") from error


def _status_error(reference: str, status: int) -> AdapterSourceError:
    if status in (401, 403):
        return HubAccessDeniedError(reference, f"the Hub refused access ({status})")
    if status == 404:
        return SourceNotFoundError(reference, "the Hub does not know it")
    return HubUnreachableError(reference, f"the Hub answered {status}")
