"""How a model folder says that an adapter was merged into its weights. Knows nothing of merging."""

from pathlib import Path

MERGE_NAME = "merge.json"
"""The record of a merge, in the folder that came out of it."""


def is_merged(folder: Path) -> bool:
    """Whether an adapter was merged into the folder's weights, which quantization could take out again."""
    return (folder / MERGE_NAME).is_file()
