"""The pattern matcher under atheris: `make fuzz`."""

import atheris
import atheris_driver

with atheris.instrument_imports(include=["lorasrv_adapters"]):
    from pattern_property import SEEDS, TOKENS, check_pattern

# Python's engine, which says what is right, is slow in long patterns
MOST_CHARACTERS = 60
MOST_TOKENS = 8


def check(content: bytes) -> None:
    check_pattern(content[:MOST_CHARACTERS].decode("latin-1"))
    check_pattern("".join(TOKENS[byte % len(TOKENS)] for byte in content[:MOST_TOKENS]))


atheris_driver.fuzz(check, SEEDS)
