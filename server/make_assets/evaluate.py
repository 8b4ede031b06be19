"""Measures the embedded base and its adapters on every held-out text, as they are served, and writes the table.

    python server/make_assets/evaluate.py ASSETS_FOLDER TEXT_FOLDER STYLES_FOLDER

Nats per UTF-8 byte over the last 5 % of each text, 60 000 characters at most, those of the base as one, with the base
in NF4 and bfloat16 and the adapters through the serving kernels. Writes `voices.json` into ASSETS_FOLDER.
"""

import argparse
import json
from pathlib import Path

import torch
from base import CONTEXT, split_text
from lorasrv.engine.memory import DeviceMemory
from lorasrv.model.batch import StepBatch
from lorasrv.model.loader import load_model
from lorasrv_adapters.checkpoint import read_checkpoint
from lorasrv_adapters.image import pack_image
from lorasrv_kernels.attention import BLOCK_TOKENS, AttentionBatch, Span, tile_tokens
from lorasrv_kernels.batch import NO_SLOT
from tokenizers import Tokenizer

STYLES = {
    "shakespeare": "shakespeare_plays.txt",
    "whitman": "leaves_of_grass.txt",
    "federalist": "federalist_papers.txt",
    "devils_dictionary": "devils_dictionary.txt",
}
WINDOWS_AT_ONCE = 8
SAMPLE_CHARACTERS = 60_000


class Scorer:
    """The embedded base with its adapters resident, and every row's log-likelihood."""

    def __init__(self, assets: Path) -> None:
        self.model = load_model(assets / "base", dtype=torch.bfloat16, device="cpu")
        self.tokenizer = Tokenizer.from_file(str(assets / "base" / "tokenizer.json"))
        self.memory = DeviceMemory(
            self.model.config,
            self.model.base,
            dtype=torch.bfloat16,
            device="cpu",
            kv_bytes=64 << 20,
            adapter_bytes=16 << 20,
            max_rank=32,
            max_adapters=len(STYLES),
        )
        self.slots = {"": NO_SLOT} | {name: self._load(assets / "adapters" / name) for name in STYLES}

    def _load(self, folder: Path) -> int:
        adapter = read_checkpoint(folder, self.model.base)
        slot = self.memory.slots.acquire(adapter.digest, pack_image(adapter, self.model.base, torch.bfloat16))
        assert slot is not None
        return slot

    @torch.inference_mode()
    def nats_per_byte(self, texts: list[str], slot: int) -> float:
        """Windows overlap by half, so that every token but a text's first has half a context before it."""
        windows = [window for text in texts for window in self._windows(text)]
        nats = 0.0
        for first in range(0, len(windows), WINDOWS_AT_ONCE):
            part = windows[first : first + WINDOWS_AT_ONCE]
            logits = self._logits([ids[:-1] for ids, _ in part], slot)
            for rows, (ids, num_seen) in zip(logits, part, strict=True):
                losses = torch.nn.functional.cross_entropy(rows, torch.tensor(ids[1:]), reduction="none")
                nats += float(losses[num_seen:].sum())
        return nats / sum(len(text.encode()) for text in texts)

    def _windows(self, text: str) -> list[tuple[list[int], int]]:
        """Token ids with `<s>` in front, and how many of them an earlier window has scored."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        stride = CONTEXT // 2
        starts = range(0, len(ids), stride)
        lefts = [max(0, start - stride + 1) for start in starts]
        return [([0, *ids[a : start + stride]], start - a) for start, a in zip(starts, lefts, strict=True)]

    def _logits(self, rows: list[list[int]], slot: int) -> list[torch.Tensor]:
        config = self.model.config
        num_blocks = CONTEXT // BLOCK_TOKENS
        spans = [
            Span(start=0, num_tokens=len(ids), block_table=range(i * num_blocks, (i + 1) * num_blocks))
            for i, ids in enumerate(rows)
        ]
        lengths = [len(ids) for ids in rows]
        batch = StepBatch(
            positions=torch.cat([torch.arange(length) for length in lengths]),
            attention=AttentionBatch.from_spans(spans, tile_tokens=tile_tokens(config.num_heads, config.num_kv_heads)),
            adapters=self.memory.adapters([slot] * sum(lengths)),
            kv_cache=self.memory.kv_cache,
        )
        hidden = self.model.forward(torch.tensor([i for ids in rows for i in ids]), batch)
        return list(self.model.logits(hidden, batch.adapters).split(lengths))


def sample(paths: list[Path]) -> list[str]:
    """The beginning of the held-out part of each file, `SAMPLE_CHARACTERS` in all at most."""
    return [split_text(path)[1][: SAMPLE_CHARACTERS // len(paths)] for path in paths]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("styles", type=Path)
    arguments = parser.parse_args()
    held_out = {"base": sample(sorted(arguments.texts.glob("*.txt")))}
    held_out |= {name: sample([arguments.styles / file]) for name, file in STYLES.items()}
    scorer = Scorer(arguments.assets)
    table = {}
    for name, slot in scorer.slots.items():
        table[name or "base"] = {t: round(scorer.nats_per_byte(texts, slot), 4) for t, texts in held_out.items()}
        print(name or "base", table[name or "base"], flush=True)
    summary = {
        "unit": "nats per UTF-8 byte of held-out text",
        "base_dtype": "NF4, computed in bfloat16",
        "held_out_bytes": {name: sum(len(text.encode()) for text in texts) for name, texts in held_out.items()},
        "rows": table,
    }
    (arguments.assets / "voices.json").write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
