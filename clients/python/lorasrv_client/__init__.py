"""The Python client of lorasrv: `Client` and, in asyncio, `AsyncClient`.

Needs grpc and protobuf only. What calls take and return is in `lorasrv_client.types`, what they raise in
`lorasrv_client.errors`.
"""

from lorasrv_client.aio import AsyncClient, AsyncStream
from lorasrv_client.client import Client, Stream
from lorasrv_client.errors import ClientError

__all__ = ["AsyncClient", "AsyncStream", "Client", "ClientError", "Stream"]
