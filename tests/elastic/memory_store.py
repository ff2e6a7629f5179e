"""A store like torch's, in this process: its calls block, and it can be made to lose things."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

__all__ = ["MemoryStore"]

T = TypeVar("T")

# A call that nobody answers ends after so long, as torch's do.
TIMEOUT_S = 30.0


class MemoryStore:
    """What connections share.

    Attributes:
        keys: what it holds.
        before: called with the name and the key of a call, on the thread that makes it, before it
            has an effect; what it raises is what the caller gets.
    """

    def __init__(self) -> None:
        self.keys: dict[str, str] = {}
        self.before: Callable[[str, str], None] = lambda name, key: None
        self.changed = threading.Condition()
        self.generation = 0

    async def reachable(self) -> None:
        """As soon as a connection can be made: at once."""

    def connect(self) -> Connection:
        return Connection(self)

    def lose(self) -> None:
        """End all connections, and forget everything."""
        with self.changed:
            self.keys.clear()
            self.drop()

    def drop(self) -> None:
        """End all connections."""
        with self.changed:
            self.generation += 1
            self.changed.notify_all()

    def wait_for(self, key: str) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: key in self.keys, TIMEOUT_S)


class Connection:
    """One way to it, with the calls of torch's `Store`."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self._generation = store.generation

    def add(self, key: str, value: int, /) -> int:
        return int(self._do("add", key, lambda keys: self._add(keys, key, value)))

    def check(self, keys: list[str], /) -> bool:
        return self._do("check", keys[0], lambda known: all(key in known for key in keys))

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes:
        def do(keys: dict[str, str]) -> bytes:
            if keys.get(key, "") == expected:
                keys[key] = desired
            return keys.get(key, expected).encode()

        return self._do("compare_set", key, do)

    def delete_key(self, key: str, /) -> bool:
        return self._do("delete_key", key, lambda keys: keys.pop(key, None) is not None)

    def get(self, key: str, /) -> bytes:
        store = self._store
        with store.changed:
            store.changed.wait_for(lambda: key in store.keys or self._ended, TIMEOUT_S)
            if key not in store.keys and not self._ended:
                raise RuntimeError(f"wait timeout, keys: {key}")
        return self._do("get", key, lambda keys: keys[key].encode())

    def set(self, key: str, value: str, /) -> None:
        self._do("set", key, lambda keys: keys.update({key: value}))

    @property
    def _ended(self) -> bool:
        return self._generation != self._store.generation

    def _do(self, name: str, key: str, do: Callable[[dict[str, str]], T]) -> T:
        self._store.before(name, key)
        with self._store.changed:
            if self._ended:
                raise RuntimeError("Connection was likely closed")
            result = do(self._store.keys)
            self._store.changed.notify_all()
            return result

    @staticmethod
    def _add(keys: dict[str, str], key: str, value: int) -> str:
        keys[key] = str(int(keys.get(key, "0")) + value)
        return keys[key]
