"""The grammar of adapter ids and references, as violations of a message's field. Knows no message."""

import re
from collections.abc import Iterator

MAX_ADAPTER_ID_BYTES = 128

_SEGMENT = r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}"
_ADAPTER_ID = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT}){{0,3}}", re.ASCII)
_DIGEST_PREFIX = re.compile(r"[0-9a-f]{12,64}", re.ASCII)


def id_violations(adapter_id: str) -> Iterator[tuple[str, str]]:
    """Yields what is wrong with an id without version, as (field, text)."""
    num_bytes = len(adapter_id.encode())
    if not adapter_id:
        yield "adapter_id", "must not be empty"
    elif num_bytes > MAX_ADAPTER_ID_BYTES:
        yield "adapter_id", f"must have at most {MAX_ADAPTER_ID_BYTES} bytes, has {num_bytes}"
    elif not _ADAPTER_ID.fullmatch(adapter_id):
        yield "adapter_id", f"must be 1 to 4 segments {_SEGMENT} separated by '/', is {adapter_id!r}"


def reference_violations(reference: str) -> Iterator[tuple[str, str]]:
    """Yields what is wrong with "id" or "id@digest"; an empty reference names the base and is fine."""
    if not reference:
        return
    adapter_id, at, digest = reference.partition("@")
    yield from id_violations(adapter_id)
    if at:
        yield from digest_violations(digest, field="adapter_id")


def digest_violations(digest: str, *, field: str) -> Iterator[tuple[str, str]]:
    """Yields what is wrong with a digest or the beginning of one."""
    if not _DIGEST_PREFIX.fullmatch(digest):
        yield field, "a digest is given by its first 12 to 64 hex digits, lower case"
