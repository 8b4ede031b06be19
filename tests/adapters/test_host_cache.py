"""Images by digest, within a budget."""

import pytest
import torch
from lorasrv_adapters.host_cache import HostCache
from lorasrv_adapters.image import AdapterImage


def image(num_elements: int) -> AdapterImage:
    return AdapterImage(flat=torch.zeros(num_elements), table=torch.zeros((0, 4), dtype=torch.int64))


def test_the_least_recently_used_goes_first() -> None:
    cache = HostCache(3 * 40)
    for digest in "abc":
        assert cache.put(digest, image(10)) == []
    assert cache.get("a") is not None
    assert cache.put("d", image(10)) == ["b"]
    assert cache.digests() == ("c", "a", "d")
    assert cache.get("b") is None
    assert cache.put("e", image(20)) == ["c", "a"]
    assert cache.num_bytes == 40 + 80


def test_the_first_image_of_a_digest_stays() -> None:
    cache = HostCache(1000)
    first = image(10)
    cache.put("a", first)
    cache.put("a", image(10))
    assert cache.get("a") is first
    assert cache.num_bytes == 40


def test_what_is_retained_stays_until_the_last_release() -> None:
    cache = HostCache(40)
    cache.retain("a", image(10))
    cache.retain("a", image(10))
    assert cache.put("b", image(10)) == ["b"]
    assert not cache.drop("a")
    assert cache.release("a") == []
    cache.retain("c", image(10))
    assert cache.num_bytes == 80
    assert cache.release("a") == ["a"]
    assert cache.digests() == ("c",)
    cache.release("c")
    assert cache.drop("c")
    assert not cache.drop("c")
    assert cache.num_bytes == 0


def test_releasing_what_nobody_holds_is_an_error() -> None:
    cache = HostCache(1000)
    cache.put("a", image(10))
    with pytest.raises(ValueError, match="no users"):
        cache.release("a")


def test_a_negative_budget_is_an_error() -> None:
    with pytest.raises(ValueError, match="-1"):
        HostCache(-1)
