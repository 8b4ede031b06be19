"""The edge of every call: its id, its status if it fails, and its place in the metrics.

The one place besides the engine's loop that catches everything. Knows no service and no message.
"""

import asyncio
import logging
import re
import uuid
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
from grpc import aio

from lorasrv.rpc.ports import CallObserver
from lorasrv.rpc.status import status_of

REQUEST_ID_KEY = "x-request-id"

Context: TypeAlias = "aio.ServicerContext[Any, Any]"
"""The context of any call; its methods check their messages themselves."""

_REQUEST_ID = re.compile(r"[!-~]{1,128}", re.ASCII)

_log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class Call:
    """One call while it runs.

    Attributes:
        request_id: the client's, or a new one where it gave none that can be logged.
        metadata: what came with the call; of a key given twice, the last value.
        finish_reason: set by a generation that ended well: "stop", "length" or "eos".
    """

    request_id: str
    metadata: dict[str, str]
    finish_reason: str = ""


@asynccontextmanager
async def served(method: str, context: Context, *, observer: CallObserver) -> AsyncIterator[Call]:
    """Runs the body of a call; an exception in it becomes the call's status.

    Cancellation, of the client or by a passed deadline, goes through untouched.

    Args:
        method: the method's name, for metrics and log.
        context: the call's context.
        observer: told how the call ended.
    """
    call = _call(context.invocation_metadata())
    code = grpc.StatusCode.OK
    try:
        yield call
    except asyncio.CancelledError:
        code = grpc.StatusCode.CANCELLED
        raise
    # everything: whatever is not named in the table of statuses must not reach the client as it is
    except Exception as error:
        status = status_of(error)
        code = status.code
        await context.abort(
            status.code,
            status.message,
            trailing_metadata=(*status.trailing_metadata, (REQUEST_ID_KEY, call.request_id)),
        )
    finally:
        observer.call_finished(method=method, code=code.name, finish_reason=call.finish_reason)
        _log.debug("call finished", extra={"method": method, "code": code.name, "request_id": call.request_id})


async def announce(call: Call, context: Context) -> None:
    """Sends the call's id ahead of the answer.

    Only when the call is accepted: a client retries by itself only while it has received nothing.
    """
    await context.send_initial_metadata(((REQUEST_ID_KEY, call.request_id),))


def _call(entries: Iterable[tuple[str, str | bytes]] | None) -> Call:
    metadata = {key: value for key, value in entries or () if isinstance(value, str)}
    given = metadata.get(REQUEST_ID_KEY, "")
    return Call(request_id=given if _REQUEST_ID.fullmatch(given) else str(uuid.uuid4()), metadata=metadata)
