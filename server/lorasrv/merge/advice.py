"""What to make of a merge, in sentences: how it was verified, what rounding cost, and what to do instead.

Reads the record of a merge; knows no model and no terminal.
"""

from collections.abc import Iterator, Mapping
from typing import Any

_PERCENT = 100.0


def advice(record: Mapping[str, Any]) -> Iterator[str]:
    """What the record of a merge says to its reader.

    Args:
        record: what `merge.json` holds.
    """
    found = record["verification"]
    yield (
        f"verified at {found['tokens']} positions: logits differ by at most {found['max_difference']:.3g} "
        f"({found['relative_difference']:.2g} of their standard deviations), KL divergence {found['kl']:.2g} nats, "
        f"same greedy token at {_PERCENT * found['agreement']:.1f} %"
    )
    if not found["holds"]:
        yield f"warning: this is beyond the tolerance of {found['tolerance']['limit']:g}; it was written by --force"
    rounded = [one["module"] for one in record["modules"] if one["rounded"]]
    if rounded:
        yield (
            f"warning: in {len(rounded)} of {len(record['modules'])} weights, {rounded[0]} among them, the update is "
            f"so small that {record['dtype']} rounds it as coarsely as it is large; --dtype float32 keeps it, or serve "
            "it unmerged"
        )
    if record["quantize"] == "nf4":
        yield (
            f"4 bits lose {_PERCENT * found['lost']:.1f} % of what the adapter does; the NF4 base with the adapter "
            "unmerged loses nothing, and is what to serve where 4 bits are wanted"
        )
