"""Text from tokens: pieces add up, characters stay whole, stop strings never show, whatever the token borders."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lorasrv.engine.detokenizer import Detokenizer


class PieceTokenizer:
    """Token i is the i-th piece of bytes."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces

    def token_bytes(self, token_id: int) -> bytes:
        return self.pieces[token_id]


def stream(pieces: list[bytes], stop: tuple[str, ...] = ()) -> tuple[list[str], str | None]:
    """The texts given out, the flush last, and the stop string met."""
    detokenizer = Detokenizer(PieceTokenizer(pieces), stop)
    texts = []
    for token_id in range(len(pieces)):
        texts.append(detokenizer.push(token_id))
        if detokenizer.stop_string is not None:
            return texts, detokenizer.stop_string
    return [*texts, detokenizer.flush()], detokenizer.stop_string


def cut(text: str, stop: tuple[str, ...]) -> tuple[str, str | None]:
    """What a stream must give, by definition: the stop string that is complete first, the longest if several are."""
    for end in range(1, len(text) + 1):
        matches = [string for string in stop if text[:end].endswith(string)]
        if matches:
            longest = max(matches, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(pieces=st.lists(st.binary(max_size=5), max_size=12))
def test_pieces_of_any_bytes_add_up_to_decoding_all_at_once(pieces: list[bytes]) -> None:
    texts, _ = stream(pieces)
    assert "".join(texts) == b"".join(pieces).decode("utf-8", errors="replace")


@given(text=st.text(alphabet="aé中😀", max_size=12), data=st.data())
def test_no_piece_splits_a_character(text: str, data: st.DataObject) -> None:
    raw = text.encode()
    borders = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    pieces = [raw[start:end] for start, end in zip([0, *borders], [*borders, len(raw)], strict=True)]
    texts, _ = stream(pieces)
    assert "".join(texts) == text
    assert "\ufffd" not in "".join(texts)


@given(
    text=st.text(alphabet="ab", max_size=14),
    stop=st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=3).map(tuple),
    data=st.data(),
)
def test_stop_strings_cut_at_the_same_place_whatever_the_token_borders(
    text: str, stop: tuple[str, ...], data: st.DataObject
) -> None:
    borders = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end].encode() for start, end in zip([0, *borders], [*borders, len(text)], strict=True)]
    texts, met = stream(pieces, stop)
    assert ("".join(texts), met) == cut(text, stop)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    texts, met = stream([b"one <", b"e", b"x> two <e", b"nd", b">three"], ("<end>",))
    assert texts == ["one ", "", "<ex> two ", "", ""]
    assert met == "<end>"


def test_a_beginning_that_leads_nowhere_comes_with_the_flush() -> None:
    assert stream([b"a<e", b"n"], ("<end>",)) == (["a", "", "<en"], None)


def test_an_incomplete_character_waits_and_is_replaced_at_the_end() -> None:
    euro = "€".encode()
    assert stream([b"5" + euro[:1], euro[1:2], euro[2:] + b"!"])[0] == ["5", "", "€!", ""]
    assert stream([b"5" + euro[:2]])[0] == ["5", "\ufffd"]


def test_a_stop_string_of_several_bytes_a_character() -> None:
    raw = "x→y→→z".encode()
    texts, met = stream([raw[i : i + 1] for i in range(len(raw))], ("→→",))
    assert ("".join(texts), met) == ("x→y", "→→")


def test_special_tokens_add_nothing() -> None:
    assert stream([b"a", b"", b"b"])[0] == ["a", "", "b", ""]


@pytest.mark.parametrize("stop", [("aa", "baa"), ("baa", "aa")])
def test_of_two_that_are_complete_together_the_longest_counts(stop: tuple[str, ...]) -> None:
    assert stream([b"xba", b"a"], stop) == (["x", ""], "baa")


@pytest.mark.parametrize(("text", "stop"), [("aaab", "aab"), ("abababc", "ababc"), ("aabaabaaac", "aabaaac")])
def test_a_beginning_that_fails_may_contain_another_beginning(text: str, stop: str) -> None:
    texts, met = stream([character.encode() for character in text], (stop,))
    assert ("".join(texts), met) == cut(text, (stop,)) == (text[: -len(stop)], stop)
