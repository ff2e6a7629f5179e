"""The last line of each worker's output, from the ends of its log files."""

from __future__ import annotations

import os
import stat
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Final, Generic, NamedTuple, TypeVar

__all__ = ["LastLines"]

K = TypeVar("K", bound=Hashable)

# Enough for a line that is worth showing.
_BYTES: Final = 4096
# Those of more workers than a terminal has rows.
_KEPT_FILES: Final = 128


class _Seen(NamedTuple):
    """A file when it was last looked at."""

    changed_ns: int
    size: int
    line: str


class LastLines(Generic[K]):
    """Reads them; for a thread. Files that have not changed since are not read again.

    Each is held open: when a run has ended well its folder may be gone before the last look.
    """

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}
        self._open: dict[str, int] = {}
        self._kept: set[str] = set()

    def keep(self, paths: Iterable[str]) -> None:
        """Hold some of these open although nobody asks for them yet: their run may be short."""
        for path in paths:
            if len(self._kept) < _KEPT_FILES and path not in self._kept:
                self._kept.add(path)
                self._look(path)

    def close(self) -> None:
        """Let go of all files."""
        while self._open:
            os.close(self._open.popitem()[1])

    def read(self, files: Mapping[K, Sequence[str]]) -> dict[K, str]:
        """The last lines of the files that were written to last.

        Args:
            files: by whose they are.

        Returns:
            By whose they are; who has said nothing is missing.
        """
        known = {path for paths in files.values() for path in paths}
        self._seen = {path: seen for path, seen in self._seen.items() if path in known}
        for path in self._open.keys() - known - self._kept:
            os.close(self._open.pop(path))
        lines = {key: self._latest(paths) for key, paths in files.items()}
        return {key: line for key, line in lines.items() if line}

    def _latest(self, paths: Iterable[str]) -> str:
        found = [seen for path in paths if (seen := self._look(path)) is not None and seen.line]
        return max(found, key=lambda seen: seen.changed_ns).line if found else ""

    def _opened(self, path: str) -> int | None:
        """What stands there now, or what did when it was looked at last."""
        with suppress(OSError, ValueError):
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            # The file is the worker's, who may have put anything in its place.
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                os.close(fd)
                return None
            if (before := self._open.get(path)) is not None:
                os.close(before)
            self._open[path] = fd
        return self._open.get(path)

    def _look(self, path: str) -> _Seen | None:
        if (fd := self._opened(path)) is None:
            return None
        with suppress(OSError):
            now = os.fstat(fd)
            before = self._seen.get(path)
            if before is not None and before[:2] == (now.st_mtime_ns, now.st_size):
                return before
            end = os.pread(fd, _BYTES, max(now.st_size - _BYTES, 0))
            line = last_line(end, whole=now.st_size <= _BYTES)
            seen = _Seen(now.st_mtime_ns, now.st_size, line or (before.line if before else ""))
            self._seen[path] = seen
            return seen
        return None


def last_line(end: bytes, *, whole: bool = True) -> str:
    r"""The last line with something in it.

    Args:
        end: of a file.
        whole: whether that is all of it; otherwise it begins anywhere in a line.

    Example:
        >>> last_line(b"one\ntwo 10%\rtwo 20%\r\n\n")
        'two 20%'
    """
    text = end.decode("utf-8", "backslashreplace")
    for line in reversed(text.split("\n")):
        # What a carriage return has overwritten is not there any more.
        shown = line.rstrip("\r").rpartition("\r")[2]
        if shown.strip():
            return shown.strip()
    return ""
