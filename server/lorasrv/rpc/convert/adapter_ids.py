"""Adapter ids, references and digests of a message, checked; what is wrong becomes violations of its fields.

The grammar itself is `lorasrv_adapters.references`. Knows no message.
"""

import re
from collections.abc import Iterator

from lorasrv_adapters.errors import InvalidAdapterIdError
from lorasrv_adapters.references import DIGEST_CHARS, check_adapter_id, parse_reference

_DIGEST = re.compile(rf"[0-9a-f]{{{DIGEST_CHARS}}}")


def id_violations(adapter_id: str) -> Iterator[tuple[str, str]]:
    """Yields what is wrong with an id without version, as (field, text)."""
    try:
        check_adapter_id(adapter_id)
    except InvalidAdapterIdError as error:
        yield "adapter_id", error.rule


def reference_violations(reference: str) -> Iterator[tuple[str, str]]:
    """Yields what is wrong with "id" or "id@digest"; an empty reference names the base and is fine."""
    if not reference:
        return
    try:
        parse_reference(reference)
    except InvalidAdapterIdError as error:
        yield "adapter_id", error.rule


def digest_violations(digest: str, *, field: str) -> Iterator[tuple[str, str]]:
    """Yields what is wrong with a digest."""
    if not _DIGEST.fullmatch(digest):
        yield field, f"must be the {DIGEST_CHARS} lower-case hexadecimal digits of a digest"
