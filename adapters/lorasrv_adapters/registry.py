"""Which adapters are loaded, and who uses them: loading, replacing, unloading and leasing, from any thread.

An id names a digest; replacing an id never changes what a running request computes. It knows ids, digests and images;
files are the loader's business, the device is `slots`'.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

from lorasrv_adapters.errors import (
    AdapterCorruptError,
    AdapterError,
    AdapterExistsError,
    AdapterInUseError,
    AdapterNotFoundError,
)
from lorasrv_adapters.host_cache import HostCache
from lorasrv_adapters.image import AdapterImage
from lorasrv_adapters.records import (
    AdapterLoader,
    AdapterObserver,
    AdapterRecord,
    LoadedAdapter,
    RankSummary,
    SilentObserver,
)
from lorasrv_adapters.references import check_adapter_id, parse_reference
from lorasrv_adapters.single_flight import SingleFlight

__all__ = [
    "AdapterLease",
    "AdapterLoader",
    "AdapterObserver",
    "AdapterRecord",
    "AdapterRegistry",
    "LoadedAdapter",
    "RankSummary",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    """A loaded adapter without its image, which only the cache and leases hold."""

    digest: str
    kind: str
    ranks: RankSummary
    num_modules: int
    num_bytes: int

    @classmethod
    def of(cls, loaded: LoadedAdapter) -> "_Facts":
        return cls(
            digest=loaded.digest,
            kind=loaded.kind,
            ranks=loaded.ranks,
            num_modules=loaded.num_modules,
            num_bytes=loaded.image.num_bytes,
        )


@dataclass(slots=True, eq=False)
class _Version:
    """One digest under one id, from its load until it is neither current nor leased."""

    adapter_id: str
    source: str
    facts: _Facts
    loaded_at_seconds: float
    num_users: int = 0
    current: bool = True


class AdapterLease:
    """One request's hold on one version: its image stays in memory until `release`.

    Attributes:
        adapter_id: The id it was acquired under.
        digest: Digest of the version held, whatever the id names later.
        kind: "lora", "rslora", "dora" or "adalora".
        image: What the device reads.
    """

    __slots__ = ("_on_release", "adapter_id", "digest", "image", "kind")

    def __init__(
        self, *, adapter_id: str, digest: str, kind: str, image: AdapterImage, on_release: Callable[[], None]
    ) -> None:
        self.adapter_id = adapter_id
        self.digest = digest
        self.kind = kind
        self.image = image
        self._on_release = on_release

    def release(self) -> None:
        """Let go; any thread. Only the first call counts."""
        self._on_release()

    def __enter__(self) -> "AdapterLease":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class AdapterRegistry:
    """Loaded adapters by id. Every method may be called from any thread; `load` and `acquire` may block on files.

    Args:
        loader: Reads adapters; called without a lock held, from several threads at once.
        cache: Images in host memory; the registry takes it over, nobody else may call it.
        observer: Told what happens; None: nobody is.
        clock: Unix time in seconds, for records.
        timer: Monotonic seconds, for durations.
    """

    def __init__(
        self,
        loader: AdapterLoader,
        cache: HostCache,
        *,
        observer: AdapterObserver | None = None,
        clock: Callable[[], float] = time.time,
        timer: Callable[[], float] = time.monotonic,
    ) -> None:
        self._loader = loader
        self._cache = cache
        self._observer = observer or SilentObserver()
        self._clock = clock
        self._timer = timer
        self._lock = threading.Lock()
        self._current: dict[str, _Version] = {}
        self._replaced: dict[str, list[_Version]] = {}
        self._digest_versions: Counter[str] = Counter()
        self._loads: SingleFlight[tuple[str, str, bool, str | None], AdapterRecord] = SingleFlight()
        self._reads: SingleFlight[tuple[str, str], AdapterImage] = SingleFlight()

    def load(
        self, adapter_id: str, source: str, *, replace: bool = False, expected_digest: str | None = None
    ) -> AdapterRecord:
        """Load an adapter; loading the same digest again changes nothing. Blocks; equal calls share one load.

        Args:
            adapter_id: The id to answer to.
            source: Where it is, in the loader's terms.
            replace: Whether the id may change to another digest; requests under way keep the old one.
            expected_digest: All 64 digits the adapter must have.

        Raises:
            InvalidAdapterIdError: The id breaks the grammar.
            AdapterExistsError: The id names another digest, and `replace` is false.
            AdapterCorruptError: The digest is not the expected one, or the files are damaged.
            AdapterError: The loader's reason.
        """
        check_adapter_id(adapter_id)
        key = (adapter_id, source, replace, expected_digest)
        return self._loads.run(key, lambda: self._load(adapter_id, source, replace, expected_digest))

    def unload(self, adapter_id: str, *, if_idle: bool = False) -> AdapterRecord:
        """Stop answering to an id at once; requests under way finish on what they hold.

        Returns:
            The record as it was.

        Raises:
            AdapterNotFoundError: The id is not loaded.
            AdapterInUseError: `if_idle` is true, and requests use it.
        """
        with self._lock:
            version = self._find(adapter_id)
            record = self._record(version)
            if if_idle and record.num_in_use:
                raise AdapterInUseError(adapter_id, num_in_use=record.num_in_use)
            del self._current[adapter_id]
            self._replaced.pop(adapter_id, None)
            version.current = False
            self._forget_if_done(version)
        self._observer.adapter_unloaded(adapter_id)
        return record

    def acquire(self, reference: str) -> AdapterLease:
        """Look an adapter up and count it in use, in one step; the caller releases the lease.

        Blocks on files only if the image was evicted from host memory.

        Args:
            reference: `id`, or `id@` and at least 12 digits of a digest, current or replaced but still in use.

        Raises:
            InvalidAdapterIdError: The reference breaks the grammar.
            AdapterNotFoundError: No such adapter, or no such version of it.
            AdapterCorruptError: The image was evicted, and the source has changed since.
            AdapterError: The image was evicted, and reading it again failed.
        """
        adapter_id, digest_prefix = parse_reference(reference)
        evicted: Sequence[str] = ()
        with self._lock:
            version = self._find(adapter_id, digest_prefix)
            version.num_users += 1
            image = self._cache.get(version.facts.digest)
            if image is not None:
                evicted = self._cache.retain(version.facts.digest, image)
        if image is None:
            image, evicted = self._retain_from_source(version)
        self._report_evicted(evicted)
        return AdapterLease(
            adapter_id=adapter_id,
            digest=version.facts.digest,
            kind=version.facts.kind,
            image=image,
            on_release=self._releaser(version),
        )

    def get(self, adapter_id: str) -> AdapterRecord:
        """Return an adapter's record.

        Raises:
            AdapterNotFoundError: The id is not loaded.
        """
        with self._lock:
            return self._record(self._find(adapter_id))

    def list(self) -> Sequence[AdapterRecord]:
        """Return every adapter's record, by id."""
        with self._lock:
            return [self._record(self._current[adapter_id]) for adapter_id in sorted(self._current)]

    def _load(self, adapter_id: str, source: str, replace: bool, expected_digest: str | None) -> AdapterRecord:
        start = self._timer()
        try:
            loaded = self._loader.load(source)
            if expected_digest is not None and loaded.digest != expected_digest:
                raise AdapterCorruptError([f"its digest is {loaded.digest}, not {expected_digest}"])
            record, evicted = self._install(adapter_id, source, replace, loaded)
        except AdapterError as error:
            self._observer.adapter_load_failed(error.reason)
            raise
        self._report_evicted(evicted)
        self._observer.adapter_loaded(record, self._timer() - start)
        return record

    def _install(
        self, adapter_id: str, source: str, replace: bool, loaded: LoadedAdapter
    ) -> tuple[AdapterRecord, Sequence[str]]:
        with self._lock:
            current = self._current.get(adapter_id)
            if current is not None and current.facts.digest == loaded.digest:
                current.source = source
                return self._record(current), self._cache.put(loaded.digest, loaded.image)
            if current is not None and not replace:
                raise AdapterExistsError(adapter_id, served_digest=current.facts.digest, new_digest=loaded.digest)
            version = _Version(adapter_id, source, _Facts.of(loaded), self._clock())
            self._current[adapter_id] = version
            self._digest_versions[loaded.digest] += 1
            if current is not None:
                current.current = False
                self._replaced.setdefault(adapter_id, []).append(current)
                self._forget_if_done(current)
            return self._record(version), self._cache.put(loaded.digest, loaded.image)

    def _retain_from_source(self, version: _Version) -> tuple[AdapterImage, Sequence[str]]:
        """Read an evicted image again for a version that is already counted in use."""
        digest, source = version.facts.digest, version.source
        try:
            image = self._reads.run((digest, source), lambda: self._reread(digest, source))
        except BaseException:
            with self._lock:
                self._drop_user(version)
            raise
        with self._lock:
            return image, self._cache.retain(digest, image)

    def _reread(self, digest: str, source: str) -> AdapterImage:
        loaded = self._loader.load(source)
        if loaded.digest != digest:
            raise AdapterCorruptError(
                [f"{source} has changed since it was loaded: its digest is {loaded.digest}, not {digest}"]
            )
        return loaded.image

    def _releaser(self, version: _Version) -> Callable[[], None]:
        pending = [version]

        def release() -> None:
            with self._lock:
                if not pending:
                    return
                pending.clear()
                evicted = self._cache.release(version.facts.digest)
                self._drop_user(version)
            self._report_evicted(evicted)

        return release

    def _drop_user(self, version: _Version) -> None:
        version.num_users -= 1
        self._forget_if_done(version)

    def _forget_if_done(self, version: _Version) -> None:
        if version.current or version.num_users:
            return
        replaced = self._replaced.get(version.adapter_id, [])
        if version in replaced:
            replaced.remove(version)
        if not replaced:
            self._replaced.pop(version.adapter_id, None)
        digest = version.facts.digest
        self._digest_versions[digest] -= 1
        if not self._digest_versions[digest]:
            del self._digest_versions[digest]
            self._cache.drop(digest)

    def _find(self, adapter_id: str, digest_prefix: str = "") -> _Version:
        current = self._current.get(adapter_id)
        if current is None:
            raise AdapterNotFoundError(adapter_id)
        for version in (current, *reversed(self._replaced.get(adapter_id, []))):
            if version.facts.digest.startswith(digest_prefix):
                return version
        raise AdapterNotFoundError(f"{adapter_id}@{digest_prefix}")

    def _record(self, version: _Version) -> AdapterRecord:
        facts, replaced = version.facts, self._replaced.get(version.adapter_id, [])
        return AdapterRecord(
            adapter_id=version.adapter_id,
            source=version.source,
            digest=facts.digest,
            kind=facts.kind,
            ranks=facts.ranks,
            num_bytes=facts.num_bytes,
            num_modules=facts.num_modules,
            num_in_use=version.num_users + sum(old.num_users for old in replaced),
            loaded_at_seconds=version.loaded_at_seconds,
        )

    def _report_evicted(self, digests: Sequence[str]) -> None:
        for _ in digests:
            self._observer.adapter_evicted("host")
