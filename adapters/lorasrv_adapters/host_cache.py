"""Adapter images kept in host memory, least recently used out first, counted in bytes.

It knows digests and images; it takes no lock (its owner does) and never reads a file.
"""

from collections import OrderedDict
from dataclasses import dataclass

from lorasrv_adapters.image import AdapterImage


@dataclass(slots=True)
class _Entry:
    image: AdapterImage
    num_users: int = 0


class HostCache:
    """An LRU of images by digest, within a budget of bytes.

    Images in use are never evicted: while they alone exceed the budget, so does the cache.

    Args:
        max_bytes: The budget for idle and used images together.
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes must not be negative, got {max_bytes}")
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._num_bytes = 0

    @property
    def max_bytes(self) -> int:
        """The budget."""
        return self._max_bytes

    @property
    def num_bytes(self) -> int:
        """Bytes of all images held now."""
        return self._num_bytes

    def digests(self) -> tuple[str, ...]:
        """Digests held now, least recently used first."""
        return tuple(self._entries)

    def get(self, digest: str) -> AdapterImage | None:
        """Return the image and make it the most recently used, or None."""
        entry = self._entries.get(digest)
        if entry is None:
            return None
        self._entries.move_to_end(digest)
        return entry.image

    def put(self, digest: str, image: AdapterImage) -> list[str]:
        """Hold an image (the first one given for a digest stays) and return the digests evicted for it.

        An image larger than what the budget leaves is evicted itself, unless it is retained first.
        """
        self._insert(digest, image)
        return self._shrink()

    def retain(self, digest: str, image: AdapterImage) -> list[str]:
        """Hold an image and count one user of it; return the digests evicted for it."""
        self._insert(digest, image).num_users += 1
        return self._shrink()

    def release(self, digest: str) -> list[str]:
        """Count one user less; return the digests evicted because the budget is exceeded."""
        entry = self._entries[digest]
        if entry.num_users == 0:
            raise ValueError(f"image {digest[:12]} has no users to release")
        entry.num_users -= 1
        return self._shrink()

    def drop(self, digest: str) -> bool:
        """Forget an idle image; False if it is in use or not here."""
        entry = self._entries.get(digest)
        if entry is None or entry.num_users:
            return False
        self._remove(digest)
        return True

    def _insert(self, digest: str, image: AdapterImage) -> _Entry:
        entry = self._entries.get(digest)
        if entry is None:
            entry = self._entries[digest] = _Entry(image)
            self._num_bytes += image.num_bytes
        self._entries.move_to_end(digest)
        return entry

    def _shrink(self) -> list[str]:
        evicted = []
        for digest, entry in list(self._entries.items()):
            if self._num_bytes <= self._max_bytes:
                break
            if entry.num_users == 0:
                self._remove(digest)
                evicted.append(digest)
        return evicted

    def _remove(self, digest: str) -> None:
        self._num_bytes -= self._entries.pop(digest).image.num_bytes
