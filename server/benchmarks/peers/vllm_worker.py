"""Runs one batch at a time on vLLM, in vLLM's own environment, for `vllm_lane.py`: one JSON object a line, in and out.

    {"prompts": [[1, 2], [3, 4]], "adapters": [null, "a0"]}     starts a batch anew and prefills it
    {}                                                          one decode step

Each is answered by {"tokens": [[...], [...]]}, what was generated so far. Imports nothing of lorasrv.
"""

import argparse
import json
import os
import sys

NEW_TOKENS = 256


def main() -> None:
    """Answers until its input ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("--adapter", action="append", default=[], help="folders, named a0, a1, ...")
    parser.add_argument("--max-rank", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    # its libraries print; the answers go where stdout went
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # in this process, one step at a time
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{arguments.threads - 1}")
    import vllm

    batch = Batch(vllm.LLM(arguments.base, **_options(arguments)).llm_engine, arguments.adapter)
    print(json.dumps({"version": vllm.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if request:
            batch.start(request["prompts"], request["adapters"])
        print(json.dumps({"tokens": batch.step()}), file=answers, flush=True)


def _options(arguments):
    options = {
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "max_model_len": 512,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 4096,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "async_scheduling": False,
    }
    if arguments.adapter:
        # the ranks it takes
        max_rank = next(rank for rank in (8, 16, 32, 64, 128) if rank >= arguments.max_rank)
        options |= {"enable_lora": True, "max_loras": len(arguments.adapter), "max_lora_rank": max_rank}
    return options


class Batch:
    """The sequences that run on an engine."""

    def __init__(self, engine, adapter_folders):
        from vllm.lora.request import LoRARequest

        self._engine = engine
        self._adapters = {
            f"a{index}": LoRARequest(f"a{index}", index + 1, folder) for index, folder in enumerate(adapter_folders)
        }
        self._tokens = {}
        self._num_started = 0

    def start(self, prompts, names):
        """Ends what runs and adds these."""
        from vllm import SamplingParams

        self._engine.abort_request(list(self._tokens))
        self._num_started += 1
        self._tokens = {f"{self._num_started}-{index}": [] for index in range(len(prompts))}
        sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
        for request_id, prompt, name in zip(self._tokens, prompts, names, strict=True):
            self._engine.add_request(
                request_id, {"prompt_token_ids": prompt}, sampling, lora_request=self._adapters.get(name)
            )

    def step(self):
        """One step of the engine; the tokens of each sequence so far."""
        for output in self._engine.step():
            if output.request_id in self._tokens:
                self._tokens[output.request_id] = list(output.outputs[0].token_ids)
        return list(self._tokens.values())


if __name__ == "__main__":
    main()
