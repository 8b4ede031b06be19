"""Any order of steps, and any interleaving of threads, keeps the registry's promises."""

import hashlib
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from lorasrv_adapters.errors import AdapterExistsError, AdapterInUseError, AdapterNotFoundError
from lorasrv_adapters.host_cache import HostCache
from lorasrv_adapters.registry import AdapterLease, AdapterRegistry

IMAGE_BYTES = 64 * 4 + 8 * 8
BUDGET = 2 * IMAGE_BYTES

ids = st.sampled_from(["a", "b", "c"])
contents = st.sampled_from(["one", "two", "three", "four"])


def first_value(digest: str) -> float:
    return float(int(digest[:4], 16))


@pytest.mark.parametrize("seed", range(3))
def test_threads_never_see_a_wrong_image_or_leak_a_lease(loader, seed: int) -> None:
    cache = HostCache(BUDGET)
    registry = AdapterRegistry(loader, cache)
    barrier = threading.Barrier(6)

    def work(worker: int) -> None:
        choose = random.Random(seed * 100 + worker)
        leases: list[AdapterLease] = []
        barrier.wait(timeout=30)
        for _ in range(150):
            adapter_id, content = choose.choice("abc"), choose.choice(["one", "two", "three"])
            try:
                match choose.randrange(6):
                    case 0:
                        registry.load(adapter_id, f"x:{content}", replace=choose.random() < 0.7)
                    case 1:
                        registry.unload(adapter_id, if_idle=choose.random() < 0.5)
                    case 2 | 3 | 4:
                        leases.append(registry.acquire(adapter_id))
                        assert leases[-1].image.flat[0] == first_value(leases[-1].digest)
                    case 5 if leases:
                        leases.pop(choose.randrange(len(leases))).release()
            except (AdapterNotFoundError, AdapterExistsError, AdapterInUseError):
                continue
        for lease in leases:
            lease.release()

    with ThreadPoolExecutor(6) as pool:
        for future in [pool.submit(work, worker) for worker in range(6)]:
            future.result(timeout=60)
    assert all(record.num_in_use == 0 for record in registry.list())
    assert cache.num_bytes <= BUDGET
    assert set(cache.digests()) <= {record.digest for record in registry.list()}
    for record in registry.list():
        registry.unload(record.adapter_id)
    assert cache.num_bytes == 0


@pytest.fixture
def machine(new_loader):
    class RegistryMachine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.cache = HostCache(BUDGET)
            self.registry = AdapterRegistry(new_loader(), self.cache)
            self.served: dict[str, str] = {}
            self.leases: list[tuple[AdapterLease, bool]] = []  # and whether its id was unloaded since

        @rule(adapter_id=ids, content=contents, replace=st.booleans())
        def load(self, adapter_id: str, content: str, replace: bool) -> None:
            source, digest = f"x:{content}", hashlib.sha256(content.encode()).hexdigest()
            if not replace and self.served.get(adapter_id, digest) != digest:
                with pytest.raises(AdapterExistsError):
                    self.registry.load(adapter_id, source)
                return
            assert self.registry.load(adapter_id, source, replace=replace).digest == digest
            self.served[adapter_id] = digest

        @rule(adapter_id=ids)
        def acquire(self, adapter_id: str) -> None:
            if adapter_id not in self.served:
                with pytest.raises(AdapterNotFoundError):
                    self.registry.acquire(adapter_id)
                return
            lease = self.registry.acquire(adapter_id)
            assert lease.digest == self.served[adapter_id]
            self.leases.append((lease, False))

        @precondition(lambda self: self.leases)
        @rule(data=st.data())
        def acquire_pinned(self, data: st.DataObject) -> None:
            held, unloaded = data.draw(st.sampled_from(self.leases))
            reference = f"{held.adapter_id}@{held.digest[:16]}"
            if unloaded and not self.reachable(held):
                with pytest.raises(AdapterNotFoundError):
                    self.registry.acquire(reference)
                return
            lease = self.registry.acquire(reference)
            assert lease.digest == held.digest
            self.leases.append((lease, False))

        @precondition(lambda self: self.leases)
        @rule(data=st.data(), times=st.integers(1, 3))
        def release(self, data: st.DataObject, times: int) -> None:
            lease, _ = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
            for _ in range(times):
                lease.release()

        @rule(adapter_id=ids, if_idle=st.booleans())
        def unload(self, adapter_id: str, if_idle: bool) -> None:
            busy = self.num_users(adapter_id) > 0
            if adapter_id not in self.served:
                with pytest.raises(AdapterNotFoundError):
                    self.registry.unload(adapter_id, if_idle=if_idle)
            elif if_idle and busy:
                with pytest.raises(AdapterInUseError):
                    self.registry.unload(adapter_id, if_idle=True)
            else:
                assert self.registry.unload(adapter_id, if_idle=if_idle).digest == self.served.pop(adapter_id)
                self.leases = [(lease, gone or lease.adapter_id == adapter_id) for lease, gone in self.leases]

        @invariant()
        def records_tell_the_truth(self) -> None:
            records = {record.adapter_id: record for record in self.registry.list()}
            assert {name: record.digest for name, record in records.items()} == self.served
            for name, record in records.items():
                assert record.num_in_use == self.num_users(name)

        @invariant()
        def images_in_use_stay_and_idle_ones_keep_the_budget(self) -> None:
            held = {lease.digest for lease, _ in self.leases}
            digests = set(self.cache.digests())
            assert held <= digests <= held | set(self.served.values())
            assert self.cache.num_bytes == IMAGE_BYTES * len(digests)
            assert self.cache.num_bytes <= BUDGET or digests == held
            for lease, _ in self.leases:
                assert lease.image.flat[0] == first_value(lease.digest)

        def num_users(self, adapter_id: str) -> int:
            return sum(lease.adapter_id == adapter_id and not unloaded for lease, unloaded in self.leases)

        def reachable(self, held: AdapterLease) -> bool:
            """Whether the digest is served under the id again, or still leased since it was."""
            return self.served.get(held.adapter_id) == held.digest or any(
                lease.adapter_id == held.adapter_id and lease.digest == held.digest and not unloaded
                for lease, unloaded in self.leases
            )

    return RegistryMachine


def test_any_order_of_steps_keeps_the_promises(machine) -> None:

    run_state_machine_as_test(machine, settings=settings(max_examples=60, stateful_step_count=30, deadline=None))
