"""Writes README's tables of what is served and refused from the code's own tables, or checks that they are fresh.

python server/make_readme.py            writes the tables between their marks
python server/make_readme.py --check    exits 1 if one differs
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from lorasrv.model.families import FAMILIES, Family
from lorasrv_adapters.keys import HONOURED, INERT, INERT_ADALORA, NOT_OF_ADALORA, UNSUPPORTED

README = Path(__file__).parent.parent / "README.md"


def bases() -> str:
    """The families of base models."""
    rows = [
        (f"`{name}`", _biases(family), "yes" if family.qk_norm else "-", _window(family))
        for name, family in FAMILIES.items()
    ]
    return _table(("architecture", "biases", "norms of query and key heads", "sliding window"), rows)


def adapter_keys() -> str:
    """The keys of `adapter_config.json`."""
    rows = [
        *((f"`{key}`", "served", text) for key, text in HONOURED.items()),
        *((f"`{key}`", "changes nothing", text) for key, text in INERT.items()),
        (_listed(INERT_ADALORA), "changes nothing", "of AdaLoRA: its training schedule"),
        *((f"`{key}`", "refused", text) for key, text in UNSUPPORTED.items()),
        (_listed(NOT_OF_ADALORA), "refused", "of AdaLoRA, which PEFT has without them"),
        ("any other key with a live value", "refused", "unknown"),
    ]
    return _table(("key", "", ""), rows)


TABLES = {"bases": bases, "adapter keys": adapter_keys}


def fresh(text: str) -> str:
    """README with its tables written anew."""
    for name, make in TABLES.items():
        marks = rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- end -->)"
        # the table has no backslashes, which a replacement would read
        text, count = re.subn(marks, rf"\g<1>{make()}\g<2>", text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"{README.name} needs one pair of marks for the table {name!r}, and has {count}")
    return text


def _biases(family: Family) -> str:
    by_key = [f"{_projections(modules)} by `{key}`" for key, modules in family.bias_keys.items()]
    return "; ".join([_projections(family.biased)] * bool(family.biased) + by_key) or "-"


def _projections(modules: Sequence[str]) -> str:
    return ", ".join(module.rpartition(".")[2].removesuffix("_proj") for module in modules)


def _window(family: Family) -> str:
    if "sliding_window" not in family.keys:
        return "-"
    return "some layers, by `use_sliding_window`" if "use_sliding_window" in family.keys else "all layers"


def _listed(keys: Sequence[str] | dict[str, str]) -> str:
    return ", ".join(f"`{key}`" for key in keys)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write README's generated tables.")
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 if a table is stale")
    text = README.read_text(encoding="utf-8")
    written = fresh(text)
    if not parser.parse_args().check:
        README.write_text(written, encoding="utf-8")
    elif text != written:
        print("README.md is stale: run python server/make_readme.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
