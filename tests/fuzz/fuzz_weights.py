"""The safetensors header pre-check under atheris: `make fuzz`."""

import atheris
import atheris_driver

with atheris.instrument_imports(include=["lorasrv_adapters"]):
    from weights_property import SEEDS, check_weights_file, pack


def check(content: bytes) -> None:
    check_weights_file(content)
    # most changes spoil the length of the header, so the same bytes are tried with the right one
    header, brace, data = content[8:].rpartition(b"}")
    check_weights_file(pack(header + brace, data))


atheris_driver.fuzz(check, SEEDS)
