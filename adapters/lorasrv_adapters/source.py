"""From a source's text to a local folder: a folder below a root, or an allow-listed repository on the Hub.

It knows paths and permissions; what a folder holds is `checkpoint`'s business.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorasrv_adapters.errors import SourceNotAllowedError, SourceNotFoundError

if TYPE_CHECKING:
    from lorasrv_adapters.hub import HubSource

HUB_PREFIX = "hf:"


def resolve(source: str, *, roots: Sequence[Path], hub: "HubSource | None") -> Path:
    """Return the folder a source names.

    Args:
        source: An absolute folder, a folder relative to one of the roots, or "hf:org/name@revision".
        roots: Folders below which adapters may lie; a root itself may be one.
        hub: The Hub and what is allowed from it; None: nothing is.

    Returns:
        A path without symbolic links.

    Raises:
        SourceNotAllowedError: It lies outside every root, also by way of `..` or a link, or is not on the allow-list.
        SourceNotFoundError: There is no such folder.
        AdapterSourceError: The Hub's reasons.
    """
    if source.startswith(HUB_PREFIX):
        if hub is None:
            raise SourceNotAllowedError(source, "no Hub repositories are allowed here")
        return hub.fetch(source.removeprefix(HUB_PREFIX))
    if not source or "\0" in source:
        raise SourceNotAllowedError(source, "it is not a path")
    real_roots = [root.resolve() for root in roots]
    for root in real_roots:
        folder = (root / source).resolve()
        # what lies outside is never looked at, so that the answer does not tell whether it exists
        if any(folder.is_relative_to(allowed) for allowed in real_roots) and folder.is_dir():
            return folder
    if any((root / source).resolve().is_relative_to(allowed) for root in real_roots for allowed in real_roots):
        raise SourceNotFoundError(source, "there is no such folder")
    raise SourceNotAllowedError(source, "it lies outside the adapter roots")
