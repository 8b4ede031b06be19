"""The server as its users meet it: a process, spoken to over gRPC from another one, ended by a signal."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_status import rpc_status
from lorasrv_proto.v1 import adapters_pb2, generation_pb2, server_pb2
from lorasrv_proto.v1.adapters_pb2_grpc import AdapterServiceStub
from lorasrv_proto.v1.generation_pb2_grpc import GenerationServiceStub
from lorasrv_proto.v1.server_pb2_grpc import ServerServiceStub


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running server and a channel to it."""

    process: "subprocess.Popen[str]"
    channel: grpc.Channel

    def answer(self, prompt: str, *, adapter_id: str = "", num_tokens: int = 12) -> generation_pb2.GenerateResponse:
        request = _request(prompt, adapter_id=adapter_id, num_tokens=num_tokens)
        return GenerationServiceStub(self.channel).Generate(request, timeout=60)

    def info(self) -> server_pb2.GetServerInfoResponse:
        return ServerServiceStub(self.channel).GetServerInfo(server_pb2.GetServerInfoRequest(), timeout=60)

    def num_in_use(self) -> int:
        listed = AdapterServiceStub(self.channel).ListAdapters(adapters_pb2.ListAdaptersRequest(), timeout=60)
        return sum(adapter.num_in_use for adapter in listed.adapters)


def _request(prompt: str, *, adapter_id: str = "", num_tokens: int = 12) -> generation_pb2.GenerateRequest:
    return generation_pb2.GenerateRequest(
        adapter_id=adapter_id, prompt=prompt, max_new_tokens=num_tokens, temperature=0, ignore_eos=True
    )


@pytest.fixture(scope="module")
def server(base_folder: Path, adapter_folders: dict[str, Path]) -> Iterator[Server]:
    """Serves the random base and its first two adapters; the others may be loaded."""
    with _serving(base_folder, adapter_folders) as server:
        yield server


@contextmanager
def _serving(base_folder: Path, adapter_folders: dict[str, Path]) -> Iterator[Server]:
    root = next(iter(adapter_folders.values())).parent
    named = [f"--adapter={adapter_id}={folder}" for adapter_id, folder in list(adapter_folders.items())[:2]]
    options = ["--port=0", "--metrics-port=0", "--max-rank=32", "--max-adapters=8", "--max-num-seqs=16"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lorasrv", "serve", str(base_folder), *options, *named, f"--adapter-root={root}"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        with grpc.insecure_channel(_address(process)) as channel:
            yield Server(process=process, channel=channel)
    finally:
        process.kill()
        process.communicate()


def _address(process: "subprocess.Popen[str]") -> str:
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if found := re.search(r"listening on (\S+:\d+)", line):
            return found[1]
    raise AssertionError("the server ended:\n" + "".join(lines))


def test_a_life_of_a_server(server: Server, adapter_folders: dict[str, Path]) -> None:
    names = list(adapter_folders)
    adapters = AdapterServiceStub(server.channel)
    for adapter_id in names[2:]:
        adapters.LoadAdapter(
            adapters_pb2.LoadAdapterRequest(adapter_id=adapter_id, source=str(adapter_folders[adapter_id])), timeout=60
        )
    alone = {adapter_id: server.answer("Once", adapter_id=adapter_id) for adapter_id in ("", *names)}
    assert len({tuple(answer.token_ids) for answer in alone.values()}) == 9
    with ThreadPoolExecutor(9) as pool:
        mixed = dict(zip(alone, pool.map(lambda name: server.answer("Once", adapter_id=name), alone), strict=True))
    for adapter_id, answer in mixed.items():
        assert (answer.text, answer.token_ids) == (alone[adapter_id].text, alone[adapter_id].token_ids), adapter_id
        assert len(answer.adapter_digest) == (64 if adapter_id else 0)
    info = server.info()
    assert info.num_adapters == 8
    assert info.max_adapters_in_one_step >= 2
    assert server.num_in_use() == 0


def test_stream_equals_unary(server: Server, adapter_folders: dict[str, Path]) -> None:
    adapter_id = next(iter(adapter_folders))
    whole = server.answer("The sea", adapter_id=adapter_id, num_tokens=30)
    stream = GenerationServiceStub(server.channel).GenerateStream(
        generation_pb2.GenerateStreamRequest(request=_request("The sea", adapter_id=adapter_id, num_tokens=30)),
        timeout=60,
    )
    *chunks, last = stream
    assert len(chunks) > 1
    assert "".join(message.chunk.text for message in chunks) == whole.text
    assert [token for message in chunks for token in message.chunk.token_ids] == list(whole.token_ids)
    assert last.finish.usage == whole.usage
    assert last.finish.adapter_digest == whole.adapter_digest


def test_a_cancelled_stream_frees_everything(server: Server, adapter_folders: dict[str, Path]) -> None:
    request = _request("The sea", adapter_id=next(iter(adapter_folders)), num_tokens=400)
    stream = GenerationServiceStub(server.channel).GenerateStream(
        generation_pb2.GenerateStreamRequest(request=request), timeout=60
    )
    next(stream)
    assert server.num_in_use() == 1
    stream.cancel()
    # the engine takes the cancellation before its next step; an answer of 400 tokens outlasts far fewer looks
    assert any(not server.info().num_running and not server.num_in_use() for _ in range(200))


def test_an_unknown_adapter_is_not_found(server: Server) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        server.answer("Once", adapter_id="ghost")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    info = error_details_pb2.ErrorInfo()
    assert rpc_status.from_call(caught.value).details[0].Unpack(info)
    assert info.reason == "ADAPTER_NOT_FOUND"


def test_sigterm_lets_a_stream_finish(base_folder: Path, adapter_folders: dict[str, Path]) -> None:
    with _serving(base_folder, adapter_folders) as server:
        stream = GenerationServiceStub(server.channel).GenerateStream(
            generation_pb2.GenerateStreamRequest(request=_request("The sea", num_tokens=300)), timeout=60
        )
        num_tokens = len(next(stream).chunk.token_ids)
        watch = HealthStub(server.channel).Watch(HealthCheckRequest(service="ready"), timeout=60)
        assert next(watch).status == HealthCheckResponse.SERVING
        server.process.send_signal(signal.SIGTERM)
        assert next(watch).status == HealthCheckResponse.NOT_SERVING
        watch.cancel()
        *chunks, last = stream
        num_tokens += sum(len(message.chunk.token_ids) for message in chunks)
        assert last.finish.usage.generated_tokens == num_tokens == 300
        assert server.process.wait(timeout=30) == 0
