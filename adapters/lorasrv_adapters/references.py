"""The grammar of adapter ids and of references to one version: `id` and `id@digest-prefix`."""

import re

from lorasrv_adapters.errors import InvalidAdapterIdError

MAX_ID_BYTES = 128
MAX_SEGMENTS = 4
MIN_DIGEST_PREFIX = 12
DIGEST_CHARS = 64

_SEGMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_DIGEST_PREFIX = re.compile(rf"[0-9a-f]{{{MIN_DIGEST_PREFIX},{DIGEST_CHARS}}}")


def check_adapter_id(adapter_id: str) -> None:
    """Check an id: at most 4 segments between slashes, 128 bytes, letters, digits and `._-`.

    Raises:
        InvalidAdapterIdError: It breaks a rule; the error says which.
    """
    segments = adapter_id.split("/")
    if len(adapter_id) > MAX_ID_BYTES:
        raise InvalidAdapterIdError(adapter_id, f"it has more than {MAX_ID_BYTES} bytes")
    if len(segments) > MAX_SEGMENTS:
        raise InvalidAdapterIdError(adapter_id, f"it has more than {MAX_SEGMENTS} segments")
    if ".." in adapter_id or not all(_SEGMENT.fullmatch(segment) for segment in segments):
        raise InvalidAdapterIdError(
            adapter_id, "a segment starts with a letter or digit and goes on with at most 62 of A-Z a-z 0-9 . _ -"
        )


def parse_reference(reference: str) -> tuple[str, str]:
    """Split a reference into the id and the digest prefix, which is empty for the current version.

    Raises:
        InvalidAdapterIdError: The id or the prefix breaks a rule.
    """
    adapter_id, separator, prefix = reference.partition("@")
    check_adapter_id(adapter_id)
    if separator and not _DIGEST_PREFIX.fullmatch(prefix):
        raise InvalidAdapterIdError(
            reference, f"after @ come {MIN_DIGEST_PREFIX} to {DIGEST_CHARS} lower-case hexadecimal digits of the digest"
        )
    return adapter_id, prefix
