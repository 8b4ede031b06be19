"""The structures that Python fills for the native decoder layers are those of the C++ side, member by member."""

import ctypes
import re
from pathlib import Path

import pytest
from lorasrv_kernels.cpu import decoder

SOURCE = (Path(decoder.__file__).parent / "decoder.cpp").read_text()
TWINS = {
    "Projection": decoder._Projection,
    "NormWeight": decoder._Norm,
    "DecoderLayer": decoder._Layer,
    "Decoder": decoder._Decoder,
    "DecoderStep": decoder._Step,
}
NESTED = {"Projection", "NormWeight"}


def members(name: str) -> list[tuple[str, str]]:
    """(type, name) of every member, in order."""
    found = re.search(rf"^struct {name} {{\n(.*?)^}};", SOURCE, re.M | re.S)
    assert found is not None
    declarations = [line.partition("//")[0].strip().rstrip(";") for line in found[1].splitlines()]
    listed = []
    for declaration in filter(None, declarations):
        kind, names = re.fullmatch(r"(.+?[ *])((?:\w+, )*\w+)", declaration).groups()  # type: ignore[union-attr]
        listed += [(kind.strip(), member) for member in names.split(", ")]
    return listed


@pytest.mark.parametrize("name", TWINS)
def test_members_and_sizes(name: str) -> None:
    expected, twin = members(name), TWINS[name]
    assert [field[0] for field in twin._fields_] == [member for _, member in expected]
    sizes = [ctypes.sizeof(TWINS[kind]) if kind in NESTED else 8 for kind, _ in expected]
    # pointers, numbers of 64 bits and doubles alike
    assert all("*" in kind or kind in NESTED or kind in ("int64_t", "double") for kind, _ in expected)
    assert ctypes.sizeof(twin) == sum(sizes)
