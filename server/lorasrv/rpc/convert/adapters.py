"""Adapters: load, unload and list requests into checked values, records into messages.

Knows the shape of a registry's record, not the registry; knows no file.
"""

import base64
import binascii
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from google.protobuf.timestamp_pb2 import Timestamp
from lorasrv_proto.v1 import adapters_pb2

from lorasrv.errors import InvalidRequestError
from lorasrv.rpc.convert.adapter_ids import digest_violations, id_violations
from lorasrv.rpc.ports import AdapterRecord

MAX_SOURCE_BYTES = 4096
MAX_PAGE_SIZE = 1000
DEFAULT_PAGE_SIZE = 100

_KINDS = {
    "lora": adapters_pb2.ADAPTER_KIND_LORA,
    "rslora": adapters_pb2.ADAPTER_KIND_RSLORA,
    "dora": adapters_pb2.ADAPTER_KIND_DORA,
    "adalora": adapters_pb2.ADAPTER_KIND_ADALORA,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadCall:
    """A checked load request; the fields are those of the message.

    Attributes:
        adapter_id: the name to publish the adapter under.
        source: a folder or a Hub repository.
        replace: whether it may take the place of other weights.
        expected_digest: the digest it must have; None for any.
    """

    adapter_id: str
    source: str
    replace: bool
    expected_digest: str | None


def load_call(message: adapters_pb2.LoadAdapterRequest) -> LoadCall:
    """Checks a load request.

    Raises:
        InvalidRequestError: with every violated field.
    """
    violations = list(id_violations(message.adapter_id))
    num_bytes = len(message.source.encode())
    if not 1 <= num_bytes <= MAX_SOURCE_BYTES:
        violations.append(("source", f"must have 1 to {MAX_SOURCE_BYTES} bytes, has {num_bytes}"))
    if "\0" in message.source:
        violations.append(("source", "must not contain NUL"))
    if message.expected_digest:
        violations.extend(digest_violations(message.expected_digest, field="expected_digest"))
    _refuse(violations)
    return LoadCall(
        adapter_id=message.adapter_id,
        source=message.source,
        replace=message.replace,
        expected_digest=message.expected_digest or None,
    )


def unload_if_idle(message: adapters_pb2.UnloadAdapterRequest) -> bool:
    """Checks an unload request; returns whether it is for an idle adapter only.

    Raises:
        InvalidRequestError: with every violated field.
    """
    violations = list(id_violations(message.adapter_id))
    if message.mode not in adapters_pb2.UnloadMode.values():
        violations.append(("mode", f"must be one of {', '.join(adapters_pb2.UnloadMode.keys())}, is {message.mode}"))
    _refuse(violations)
    return message.mode == adapters_pb2.UNLOAD_MODE_IF_IDLE


def adapter_id(message: adapters_pb2.GetAdapterRequest) -> str:
    """Checks the id of a get request and returns it.

    Raises:
        InvalidRequestError: it breaks the grammar.
    """
    _refuse(list(id_violations(message.adapter_id)))
    return message.adapter_id


def page(
    message: adapters_pb2.ListAdaptersRequest, records: Iterable[AdapterRecord]
) -> adapters_pb2.ListAdaptersResponse:
    """Returns one page of `records`, ordered by id. A page token is the last id before the page, so that adapters
    that come and go between pages make none of the others appear twice or not at all.

    Raises:
        InvalidRequestError: the page token is none of ours.
    """
    after = _read_page_token(message.page_token)
    size = min(message.page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
    rest = sorted((record for record in records if record.adapter_id > after), key=lambda record: record.adapter_id)
    shown = rest[:size]
    return adapters_pb2.ListAdaptersResponse(
        adapters=[adapter(record) for record in shown],
        next_page_token=_page_token(shown[-1].adapter_id) if len(rest) > size else "",
    )


def adapter(record: AdapterRecord) -> adapters_pb2.Adapter:
    """Returns a loaded adapter as a message."""
    load_time = Timestamp()
    load_time.FromNanoseconds(int(record.loaded_at_seconds * 1e9))
    return adapters_pb2.Adapter(
        adapter_id=record.adapter_id,
        source=record.source,
        digest=record.digest,
        kind=_KINDS.get(record.kind, adapters_pb2.ADAPTER_KIND_UNSPECIFIED),
        min_rank=record.ranks.min,
        max_rank=record.ranks.max,
        total_rank=record.ranks.sum,
        num_modules=record.num_modules,
        num_bytes=record.num_bytes,
        num_in_use=record.num_in_use,
        state=adapters_pb2.ADAPTER_STATE_READY,
        load_time=load_time,
    )


def withdrawn_adapter(record: AdapterRecord) -> adapters_pb2.Adapter:
    """Returns an unloaded adapter as a message: draining while requests still run on it."""
    message = adapter(record)
    message.state = adapters_pb2.ADAPTER_STATE_DRAINING if record.num_in_use else adapters_pb2.ADAPTER_STATE_UNLOADED
    return message


def _page_token(last_id: str) -> str:
    return base64.urlsafe_b64encode(last_id.encode()).decode()


def _read_page_token(token: str) -> str:
    try:
        return base64.b64decode(token.encode("ascii"), altchars=b"-_", validate=True).decode()
    except (binascii.Error, UnicodeError):
        raise InvalidRequestError([("page_token", "must be a next_page_token of this server, or empty")]) from None


def _refuse(violations: Sequence[tuple[str, str]]) -> None:
    if violations:
        raise InvalidRequestError(violations)
