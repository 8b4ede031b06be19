"""Where an adapter came from, as far as its folder records it: `provenance.json`, which need not be there.

Of it, only the digest of the base and how that was quantized are read; the rest is for people.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from lorasrv_adapters.base import BaseModel
from lorasrv_adapters.errors import AdapterCorruptError
from lorasrv_adapters.fields import MAX_JSON_BYTES, parse_json
from lorasrv_adapters.weights import open_regular

PROVENANCE_NAME = "provenance.json"
BASE_DIGEST_KEY = "base_digest"
BASE_QUANTIZATION_KEY = "base_quantization"
"""nf4, or none where the adapter was trained on the original weights."""

_DIGEST = re.compile(r"[0-9a-f]{64}")


def read_provenance(folder: Path) -> Mapping[str, object]:
    """Read `provenance.json`; empty if there is none.

    Raises:
        AdapterCorruptError: It is a link, no bounded JSON object, or its digest is none.
    """
    path = folder / PROVENANCE_NAME
    if not path.exists() and not path.is_symlink():
        return {}
    with open_regular(path) as file:
        content = parse_json(file.read(MAX_JSON_BYTES + 1), PROVENANCE_NAME)
    if not isinstance(content, Mapping):
        raise AdapterCorruptError([f"{PROVENANCE_NAME} is not a JSON object"])
    digest = content.get(BASE_DIGEST_KEY)
    if digest is not None and not (isinstance(digest, str) and _DIGEST.fullmatch(digest)):
        raise AdapterCorruptError([f"{PROVENANCE_NAME}: {BASE_DIGEST_KEY} must be 64 hexadecimal digits"])
    return content


def check_base(provenance: Mapping[str, object], base: BaseModel) -> list[str]:
    """Return a reason to refuse the adapter if it records the digest of another base."""
    recorded = provenance.get(BASE_DIGEST_KEY)
    if not isinstance(recorded, str) or recorded == base.digest:
        return []
    return [f"{PROVENANCE_NAME}: it was trained on a base with digest {recorded[:12]}; this one has {base.digest[:12]}"]
