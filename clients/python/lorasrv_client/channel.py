"""How a channel to a server is set up: limits, and which calls gRPC itself tries again.

The retry policy is part of the channel, so that every attempt stays inside the call's deadline. It tries again on
UNAVAILABLE (no server, or one that drains) and RESOURCE_EXHAUSTED (queue full), at most three more times, waiting
about 0.2, 0.4 and 0.8 seconds. A server that sends `grpc-retry-pushback-ms` decides the wait itself, and a negative
value ends the attempts. A stream is tried again only as long as nothing of it has arrived. Health checks are never
tried again: they are to tell what is.
"""

import json
from collections.abc import Mapping
from typing import Any

MAX_MESSAGE_BYTES = 16 * 1024**2
HEALTH_METHOD = "/grpc.health.v1.Health/Check"

RETRY_SERVICE_CONFIG: Mapping[str, Any] = {
    "methodConfig": [
        {
            "name": [
                {"service": "lorasrv.v1.GenerationService"},
                {"service": "lorasrv.v1.AdapterService"},
                {"service": "lorasrv.v1.ServerService"},
            ],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.2s",
                "maxBackoff": "5s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
            },
        }
    ]
}
"""The gRPC service config that both clients use unless they are made with `retry=False`."""


def channel_options(*, retry: bool) -> list[tuple[str, Any]]:
    """The options of a channel; with `retry`, `RETRY_SERVICE_CONFIG` is one of them."""
    options: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.enable_retries", int(retry)),
    ]
    if retry:
        options.append(("grpc.service_config", json.dumps(RETRY_SERVICE_CONFIG)))
    return options
