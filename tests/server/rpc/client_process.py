"""A client for tests, run as a process of its own: asks once each way and prints both answers as JSON."""

import json
import sys

import grpc
from lorasrv_proto.v1.generation_pb2 import GenerateRequest, GenerateStreamRequest
from lorasrv_proto.v1.generation_pb2_grpc import GenerationServiceStub

with grpc.insecure_channel(sys.argv[1]) as channel:
    stub = GenerationServiceStub(channel)
    request = GenerateRequest(adapter_id="alice", prompt="hi")
    chunks = [message.chunk for message in stub.GenerateStream(GenerateStreamRequest(request=request), timeout=50)]
    stream = ["".join(chunk.text for chunk in chunks), [token for chunk in chunks for token in chunk.token_ids]]
    answer = stub.Generate(request, timeout=50)
    print(json.dumps({"unary": [answer.text, list(answer.token_ids)], "stream": stream}))
