"""Loading, replacing, unloading and leasing, one step at a time."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from lorasrv_adapters.errors import (
    AdapterCorruptError,
    AdapterExistsError,
    AdapterIncompatibleError,
    AdapterInUseError,
    AdapterNotFoundError,
    InvalidAdapterIdError,
    SourceNotFoundError,
)
from lorasrv_adapters.host_cache import HostCache
from lorasrv_adapters.references import check_adapter_id, parse_reference
from lorasrv_adapters.registry import AdapterRegistry

IMAGE_BYTES = 64 * 4 + 8 * 8


@pytest.fixture
def cache() -> HostCache:
    return HostCache(10 * IMAGE_BYTES)


@pytest.fixture
def registry(loader, cache: HostCache, observer) -> AdapterRegistry:
    return AdapterRegistry(loader, cache, observer=observer, clock=lambda: 1234.5)


def test_a_loaded_adapter_is_found_and_described(registry: AdapterRegistry, observer) -> None:
    record = registry.load("team/poet", "x:one")
    assert (record.adapter_id, record.source, record.kind, record.num_modules) == ("team/poet", "x:one", "lora", 1)
    assert (record.num_in_use, record.num_bytes, record.loaded_at_seconds) == (0, IMAGE_BYTES, 1234.5)
    assert (record.ranks.min, record.ranks.max, record.ranks.sum) == (1, 1, 1)
    assert registry.get("team/poet") == record
    registry.load("a", "x:two")
    assert [record.adapter_id for record in registry.list()] == ["a", "team/poet"]
    assert observer.events == [("loaded", "team/poet"), ("loaded", "a")]


def test_a_lease_counts_until_its_first_release(registry: AdapterRegistry) -> None:
    record = registry.load("a", "x:one")
    lease, other = registry.acquire("a"), registry.acquire("a")
    assert (lease.adapter_id, lease.digest, lease.kind) == ("a", record.digest, "lora")
    assert registry.get("a").num_in_use == 2
    lease.release()
    lease.release()
    assert registry.get("a").num_in_use == 1
    with other:
        pass
    assert registry.get("a").num_in_use == 0


@pytest.mark.parametrize("reference", ["b", "a@0123456789ab", "a/b"])
def test_unknown_adapters_and_versions_are_not_found(registry: AdapterRegistry, reference: str) -> None:
    registry.load("a", "x:one")
    with pytest.raises(AdapterNotFoundError):
        registry.acquire(reference)
    with pytest.raises(AdapterNotFoundError):
        registry.get("b")
    with pytest.raises(AdapterNotFoundError):
        registry.unload("b")


OUTSIDE_THE_GRAMMAR = [
    *("", "/a", "a/", "a//b", "a/../b", "..", ".a", "-a", "a b", "a,b", "a/b/c/d/e", "\u00e9", "a\n"),
    *("a@", "a@0123", "a@0123456789AB", "a@main", "a@" + "0" * 65, "a" * 64, "/".join(["a" * 60] * 3)),
]


@pytest.mark.parametrize("reference", OUTSIDE_THE_GRAMMAR)
def test_ids_outside_the_grammar_are_refused(registry: AdapterRegistry, reference: str) -> None:
    with pytest.raises(InvalidAdapterIdError):
        registry.acquire(reference)
    if "@" not in reference:
        with pytest.raises(InvalidAdapterIdError):
            registry.load(reference, "x:one")


def test_ids_inside_the_grammar() -> None:
    for adapter_id in ("a", "A-1_b.c", "org/team/name/v1", "a" * 63):
        check_adapter_id(adapter_id)
        assert parse_reference(adapter_id) == (adapter_id, "")
    assert parse_reference("a/b@0123456789ab") == ("a/b", "0123456789ab")


def test_loading_the_same_digest_again_changes_nothing(registry: AdapterRegistry) -> None:
    record = registry.load("a", "x:one")
    lease = registry.acquire("a")
    again = registry.load("a", "y:one")
    assert (again.digest, again.num_in_use, again.source) == (record.digest, 1, "y:one")
    lease.release()


def test_another_digest_needs_replace(registry: AdapterRegistry, observer) -> None:
    old = registry.load("a", "x:one")
    with pytest.raises(AdapterExistsError) as caught:
        registry.load("a", "x:two")
    assert caught.value.served_digest == old.digest
    assert registry.get("a") == old
    new = registry.load("a", "x:two", replace=True)
    assert new.digest == caught.value.new_digest
    assert observer.events == [("loaded", "a"), ("failed", "ADAPTER_EXISTS"), ("loaded", "a")]


def test_running_requests_keep_the_version_they_began_with(registry: AdapterRegistry, cache: HostCache) -> None:
    old = registry.load("a", "x:one")
    running = registry.acquire("a")
    new = registry.load("a", "x:two", replace=True)
    assert registry.acquire("a").digest == new.digest
    pinned = registry.acquire(f"a@{old.digest[:12]}")
    assert pinned.digest == running.digest == old.digest
    assert torch.equal(pinned.image.flat, running.image.flat)
    assert registry.get("a").num_in_use == 3
    running.release()
    assert old.digest in cache.digests()
    pinned.release()
    assert old.digest not in cache.digests()
    with pytest.raises(AdapterNotFoundError):
        registry.acquire(f"a@{old.digest}")
    assert registry.acquire(f"a@{new.digest}").digest == new.digest


def test_rolling_back_to_a_version_that_is_still_in_use(registry: AdapterRegistry, cache: HostCache) -> None:
    first = registry.load("a", "x:one")
    running = registry.acquire("a")
    second = registry.load("a", "x:two", replace=True)
    assert registry.load("a", "x:one", replace=True).digest == first.digest
    assert set(cache.digests()) == {first.digest}
    with pytest.raises(AdapterNotFoundError):
        registry.acquire(f"a@{second.digest}")
    running.release()
    assert registry.acquire("a").digest == first.digest


def test_unloading_answers_not_found_at_once_and_frees_after_the_last_lease(
    registry: AdapterRegistry, cache: HostCache, observer
) -> None:
    record = registry.load("a", "x:one")
    lease = registry.acquire("a")
    with pytest.raises(AdapterInUseError) as caught:
        registry.unload("a", if_idle=True)
    assert caught.value.num_in_use == 1
    assert registry.unload("a").num_in_use == 1
    for reference in ("a", f"a@{record.digest}"):
        with pytest.raises(AdapterNotFoundError):
            registry.acquire(reference)
    assert registry.list() == []
    assert cache.digests() == (record.digest,)
    lease.release()
    lease.release()
    assert cache.num_bytes == 0
    assert observer.events == [("loaded", "a"), ("unloaded", "a")]


def test_an_id_loaded_again_does_not_bring_back_what_was_unloaded(registry: AdapterRegistry) -> None:
    old = registry.load("a", "x:one")
    lease = registry.acquire("a")
    registry.unload("a")
    new = registry.load("a", "x:two")
    with pytest.raises(AdapterNotFoundError):
        registry.acquire(f"a@{old.digest}")
    assert registry.get("a").num_in_use == 0
    lease.release()
    assert registry.acquire("a").digest == new.digest


def test_unloading_withdraws_replaced_versions_too(registry: AdapterRegistry) -> None:
    old = registry.load("a", "x:one")
    lease = registry.acquire("a")
    registry.load("a", "x:two", replace=True)
    registry.unload("a")
    registry.load("a", "x:three")
    with pytest.raises(AdapterNotFoundError):
        registry.acquire(f"a@{old.digest}")
    assert registry.get("a").num_in_use == 0
    lease.release()


def test_ids_that_share_a_digest_share_its_image(registry: AdapterRegistry, cache: HostCache) -> None:
    registry.load("a", "x:one")
    registry.load("b", "x:one")
    assert cache.num_bytes == IMAGE_BYTES
    registry.unload("a")
    assert cache.num_bytes == IMAGE_BYTES
    registry.unload("b")
    assert cache.num_bytes == 0


def test_an_unexpected_digest_is_refused(registry: AdapterRegistry, observer) -> None:
    with pytest.raises(AdapterCorruptError):
        registry.load("a", "x:one", expected_digest="0" * 64)
    assert registry.list() == []
    assert observer.events == [("failed", "ADAPTER_CORRUPT")]
    digest = registry.load("a", "x:one").digest
    assert registry.load("b", "x:one", expected_digest=digest).digest == digest


def test_a_failed_load_leaves_the_served_version(registry: AdapterRegistry, loader, observer) -> None:
    record = registry.load("a", "x:one")
    loader.failure = AdapterIncompatibleError(["bad"])
    with pytest.raises(AdapterIncompatibleError):
        registry.load("a", "x:two", replace=True)
    assert registry.get("a") == record
    assert observer.events[-1] == ("failed", "ADAPTER_INVALID")


class TestEviction:
    @pytest.fixture
    def cache(self) -> HostCache:
        return HostCache(2 * IMAGE_BYTES)

    def test_idle_images_go_and_are_read_again(self, registry: AdapterRegistry, loader, cache, observer) -> None:
        digests = [registry.load(name, f"{name}:{name}").digest for name in "abc"]
        assert cache.digests() == tuple(digests[1:])
        assert observer.events[-2:] == [("evicted", "host"), ("loaded", "c")]
        with registry.acquire("a") as lease:
            assert loader.num_loads == 4
            assert lease.digest == digests[0]
            assert digests[0] in cache.digests()

    def test_images_in_use_stay(self, registry: AdapterRegistry, cache: HostCache) -> None:
        leases = []
        for name in "abcd":
            registry.load(name, f"{name}:{name}")
            leases.append(registry.acquire(name))
        assert cache.num_bytes == 4 * IMAGE_BYTES
        for lease in leases:
            lease.release()
        assert cache.num_bytes == 2 * IMAGE_BYTES

    def test_a_source_that_changed_meanwhile_is_corrupt(self, registry: AdapterRegistry, loader) -> None:
        for name in "abc":
            registry.load(name, f"{name}:{name}")
        loader.places["a"] = "something else"
        with pytest.raises(AdapterCorruptError, match="has changed since"):
            registry.acquire("a")
        assert registry.get("a").num_in_use == 0
        loader.failure = SourceNotFoundError("a", "gone")
        with pytest.raises(SourceNotFoundError):
            registry.acquire("a")
        loader.failure = None
        del loader.places["a"]
        assert registry.acquire("a").adapter_id == "a"

    def test_an_adapter_unloaded_while_its_image_is_read(self, registry: AdapterRegistry, loader, cache) -> None:
        for name in "abc":
            registry.load(name, f"{name}:{name}")
            loader.started.acquire()
        loader.gate = threading.Event()
        with ThreadPoolExecutor() as pool:
            acquired = pool.submit(registry.acquire, "a")
            loader.started.acquire(timeout=30)
            registry.unload("a")
            loader.gate.set()
            lease = acquired.result(timeout=30)
        assert lease.digest in cache.digests()
        lease.release()
        assert lease.digest not in cache.digests()

    def test_waiting_requests_share_one_read(self, registry: AdapterRegistry, loader) -> None:
        source = counted("a:a")
        for name, place in (("a", source), ("b", "b:b"), ("c", "c:c")):
            registry.load(name, place)
            loader.started.acquire()
        leases = together(loader, source, 6, lambda: registry.acquire("a"))
        assert loader.num_loads == 4
        assert registry.get("a").num_in_use == 6
        for lease in leases:
            lease.release()


class CountedSource(str):
    """A source that tells when it is looked up, which callers do before they wait for one another."""

    __slots__ = ("lookups",)

    def __hash__(self) -> int:
        self.lookups.release()
        return super().__hash__()


def counted(text: str) -> CountedSource:
    source = CountedSource(text)
    source.lookups = threading.Semaphore(0)
    return source


def together(loader, source: CountedSource, num_calls: int, call: Callable[[], object]) -> list:
    """Make equal calls; the first is held in the loader until the others have found it there."""
    loader.gate = threading.Event()
    with ThreadPoolExecutor(num_calls) as pool:
        first = pool.submit(call)
        assert loader.started.acquire(timeout=30)
        while source.lookups.acquire(blocking=False):
            pass
        others = [pool.submit(call) for _ in range(num_calls - 1)]
        for _ in others:
            assert source.lookups.acquire(timeout=30)
        loader.gate.set()
        return [future.result(timeout=30) for future in (first, *others)]


def test_equal_loads_share_one_read(registry: AdapterRegistry, loader) -> None:
    source = counted("x:one")
    records = together(loader, source, 6, lambda: registry.load("a", source))
    assert loader.num_loads == 1
    assert all(record is records[0] for record in records)


def test_a_shared_load_shares_its_failure(registry: AdapterRegistry, loader, observer) -> None:
    source = counted("x:one")
    loader.failure = AdapterIncompatibleError(["bad"])

    def call() -> str:
        with pytest.raises(AdapterIncompatibleError):
            registry.load("a", source)
        return "refused"

    assert together(loader, source, 3, call) == ["refused"] * 3
    assert observer.events == [("failed", "ADAPTER_INVALID")]
    loader.failure = None
    assert registry.load("a", "x:one").adapter_id == "a"
