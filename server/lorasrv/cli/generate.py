"""`lorasrv generate`: one answer from a running server."""

import argparse
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from lorasrv.cli.console import print_json
from lorasrv.cli.environment import resolve_from_process
from lorasrv.cli.exit_codes import ExitCode
from lorasrv.cli.layers import add_flags
from lorasrv.config import ConnectConfig

if TYPE_CHECKING:
    from lorasrv_client import Client
    from lorasrv_client.types import SamplingOptions


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "generate",
        help="ask a running server for an answer",
        description="Ask a running server for an answer. What is not given is the server's default.",
        allow_abbrev=False,
    )
    parser.add_argument("prompt", metavar="PROMPT", help="The prompt; - reads it from stdin.")
    parser.add_argument("--adapter", metavar="ID", default="", help="Which adapter answers. Default: the base model.")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, help="The most tokens to generate.")
    parser.add_argument("--temperature", metavar="T", type=float, help="0 is greedy decoding.")
    parser.add_argument("--top-k", metavar="K", type=int, help="Sample among the K likeliest tokens; 0: all.")
    parser.add_argument("--top-p", metavar="P", type=float, help="Sample among the likeliest that add up to P.")
    parser.add_argument("--seed", metavar="N", type=int, help="The same seed gives the same tokens.")
    parser.add_argument("--stop", metavar="TEXT", action="append", default=[], help="End before TEXT. Repeatable.")
    parser.add_argument(
        "--stop-token-id", metavar="N", type=int, action="append", default=[], help="End at this token. Repeatable."
    )
    parser.add_argument(
        "--ignore-eos", action="store_true", default=None, help="Go on past the model's end of sequence."
    )
    parser.add_argument("--logprobs", metavar="N", type=int, help="Report log-probabilities, and N alternatives.")
    parser.add_argument("--stream", action="store_true", help="Write the answer as it comes; with --json, by the line.")
    parser.add_argument("--json", action="store_true", help="Write the answer's fields as JSON.")
    add_flags(parser, ConnectConfig)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Generate and write the answer to stdout."""
    config = resolve_from_process(ConnectConfig, arguments)
    from lorasrv_client import Client

    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    with Client(config.server) as client:
        write = _write_stream if arguments.stream else _write_whole
        write(client, prompt, arguments, config.timeout_seconds)
    return ExitCode.OK


def _write_whole(client: "Client", prompt: str, arguments: argparse.Namespace, timeout_seconds: float | None) -> None:
    answer = client.generate(
        prompt, adapter_id=arguments.adapter, timeout_seconds=timeout_seconds, **_sampling(arguments)
    )
    if arguments.json:
        print_json(asdict(answer))
    else:
        print(answer.text)


def _write_stream(client: "Client", prompt: str, arguments: argparse.Namespace, timeout_seconds: float | None) -> None:
    stream = client.stream(
        prompt, adapter_id=arguments.adapter, timeout_seconds=timeout_seconds, **_sampling(arguments)
    )
    with stream:
        for chunk in stream:
            if arguments.json:
                print_json({"chunk": asdict(chunk)})
            else:
                print(chunk.text, end="", flush=True)
        if arguments.json:
            print_json({"finish": asdict(stream.result())})
        else:
            print()


def _sampling(arguments: argparse.Namespace) -> "SamplingOptions":
    return {
        "max_new_tokens": arguments.max_new_tokens,
        "temperature": arguments.temperature,
        "top_k": arguments.top_k,
        "top_p": arguments.top_p,
        "seed": arguments.seed,
        "stop": arguments.stop,
        "stop_token_ids": arguments.stop_token_id,
        "ignore_eos": arguments.ignore_eos,
        "logprobs": arguments.logprobs,
    }
