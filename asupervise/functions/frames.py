"""How a Python value travels through a file descriptor: pickled, in records, without copies.

A record is a kind (one byte), a length (eight bytes, little endian) and that many bytes:

* ``D``: a part of the pickle;
* ``B``: a buffer that the pickle refers to (PEP 574: the memory of an array goes as it is);
* ``V`` and ``E``, without bytes: the value, or the exception, is complete;
* ``X``, without bytes: what came so far is void.

Used by both ends. Workers pay for each import, so it is the C pickler alone, without the
``pickle`` module around it.
"""

from __future__ import annotations

import os

try:
    from _pickle import Pickler, Unpickler
except ImportError:  # another Python than CPython
    from pickle import Pickler, Unpickler

TYPE_CHECKING = False  # type checkers take this name for true; `typing` itself costs an import
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from mmap import mmap
    from pickle import PickleBuffer
    from typing import Any, TypeAlias

    Writer: TypeAlias = Callable[[int, Sequence[bytes | memoryview]], None]

__all__ = [
    "EXCEPTION",
    "VALUE",
    "BadFrame",
    "FrameReader",
    "Pickler",
    "Unpickler",
    "load",
    "read_exactly",
    "send",
    "write_all",
]

VALUE = b"V"
EXCEPTION = b"E"
_VOID = b"X"
_DATA = b"D"
_BUFFER = b"B"
_ENDS = (VALUE, EXCEPTION, _VOID)
_HEADER_BYTES = 9
_PROTOCOL = 5  # the first with buffers of their own
_GATHER_BYTES = 1 << 20
_IOV_MAX = 512  # POSIX promises 16, Linux has 1024
# Parts of this size are given back to the system one by one while they are unpickled.
_PART_BYTES = 4 << 20
# From here on memory comes from mmap: it is neither zeroed first nor kept once it is free.
_MAPPED_BYTES = 1 << 20


class BadFrame(Exception):
    """What came is no value: it is cut off, or somebody else wrote into the channel."""


# --- sending ------------------------------------------------------------------------------------


def write_all(fd: int, parts: Sequence[bytes | memoryview]) -> None:
    """Write all of `parts` in order; waits where the other end is slow.

    Raises:
        OSError: as os.writev.
    """
    left = [view for part in parts if (view := memoryview(part).cast("B")).nbytes]
    while left:
        written = os.writev(fd, left[:_IOV_MAX])
        while left and written >= left[0].nbytes:
            written -= left.pop(0).nbytes
        if written:
            left[0] = left[0][written:]


class _Gathered:
    """The file that a pickler writes to: what it writes goes out in records of a megabyte."""

    def __init__(self, fd: int, write: Writer) -> None:
        self._fd = fd
        self._write = write
        self._parts: list[bytes | memoryview] = []
        self._bytes = 0

    def write(self, data: bytes | memoryview) -> int:
        size = memoryview(data).nbytes
        self._parts.append(data)
        self._bytes += size
        if self._bytes >= _GATHER_BYTES:
            self.flush()
        return size

    def flush(self, *more: bytes | memoryview) -> None:
        head = [_header(_DATA, self._bytes)] if self._bytes else []
        parts, self._parts, self._bytes = self._parts, [], 0
        self._write(self._fd, [*head, *parts, *more])


def _header(kind: bytes, length: int) -> bytes:
    return kind + length.to_bytes(8, "little")


def send(
    fd: int,
    kind: bytes,
    value: object,
    pickler: Callable[..., Any] = Pickler,
    *,
    write: Writer = write_all,
) -> None:
    """Write `value` as one frame. Blocks until the other end has taken all but the last of it.

    Args:
        fd: a pipe, or a file.
        kind: `VALUE` or `EXCEPTION`.
        value: what is sent.
        pickler: called as ``pickle.Pickler``.
        write: takes the descriptor, and parts to be written to it.

    Raises:
        OSError: the other end is gone.
        Exception: whatever pickling it raises; the frame is then void, and another may follow.
    """
    buffers: list[PickleBuffer] = []
    out = _Gathered(fd, write)
    try:
        pickler(out, _PROTOCOL, buffer_callback=buffers.append).dump(value)
        views = [buffer.raw() for buffer in buffers]
    except OSError:
        raise
    except BaseException:
        out.flush(_header(_VOID, 0))
        raise
    tail: list[bytes | memoryview] = []
    for view in views:
        tail += [_header(_BUFFER, view.nbytes), view]
    out.flush(*tail, _header(kind, 0))


# --- receiving ----------------------------------------------------------------------------------


def _memory(length: int) -> bytearray | mmap:
    if length < _MAPPED_BYTES:
        return bytearray(length)
    import mmap  # hardly ever needed in a worker

    memory = mmap.mmap(-1, length)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass  # a kernel without them: more page faults
    return memory


class FrameReader:
    """Takes bytes as they come and puts the last complete frame together. Does no I/O.

    Attributes:
        kind: `VALUE` or `EXCEPTION` once a frame is complete; ``b""`` before.

    Example:
        >>> reader = FrameReader()
        >>> reader.feed(b"D" + (4).to_bytes(8, "little") + b"\\x80\\x05N." + b"V" + bytes(8))
        >>> reader.kind == VALUE, reader.load()
        (True, None)
    """

    def __init__(self) -> None:
        self.kind = b""
        self._parts: list[bytearray | mmap] = []
        self._buffers: list[bytearray | mmap] = []
        self._header = b""
        self._left = 0  # of the record that is being received
        self._target: memoryview | None = None  # where its next bytes go

    @property
    def is_cut_off(self) -> bool:
        """Whether a frame has begun that is not complete."""
        return not self.kind and bool(self._parts or self._buffers or self._header)

    def wanted(self) -> memoryview | None:
        """Where the next bytes may be put without passing through :meth:`feed`; see `filled`."""
        return self._target

    def filled(self, count: int) -> None:
        """`count` bytes have been put into the start of :meth:`wanted`."""
        assert self._target is not None, "wanted() was not None"
        self._target = self._target[count:] if count < self._target.nbytes else None
        self._left -= count
        if self._target is None and self._left:
            self._next_part()

    def feed(self, data: bytes | memoryview) -> None:
        """Take the next bytes.

        Raises:
            BadFrame: they belong to no frame.
        """
        view = memoryview(data)
        while view.nbytes:
            if self._target is not None:
                count = min(view.nbytes, self._target.nbytes)
                self._target[:count] = view[:count]
                self.filled(count)
            else:
                count = min(view.nbytes, _HEADER_BYTES - len(self._header))
                self._header += view[:count]
                if len(self._header) == _HEADER_BYTES:
                    header, self._header = self._header, b""
                    self._begin(header[:1], int.from_bytes(header[1:], "little"))
            view = view[count:]

    def _begin(self, kind: bytes, length: int) -> None:
        if self.kind:
            self._forget()  # a second value: the first was not the last word
        if kind in _ENDS and length == 0:
            if kind == _VOID:
                self._forget()
            else:
                self.kind = kind
            return
        if kind not in (_DATA, _BUFFER):
            raise BadFrame("somebody else has written into it")
        if kind == _DATA:
            self._left = length
            if length:
                self._next_part()
            return
        try:
            memory = _memory(length)
        except (MemoryError, OverflowError, ValueError, OSError) as error:
            raise BadFrame(f"no memory for its {length:,} bytes") from error
        self._buffers.append(memory)
        self._left = length
        self._target = memoryview(memory) if length else None

    def _next_part(self) -> None:
        self._parts.append(_memory(min(self._left, _PART_BYTES)))
        self._target = memoryview(self._parts[-1])

    def _forget(self) -> None:
        self.kind, self._parts, self._buffers = b"", [], []

    def load(self, unpickler: Callable[..., Any] = Unpickler) -> Any:
        """Unpickle the frame; once, for its memory is given back while that goes on.

        Raises:
            BadFrame: there is no complete frame.
            Exception: whatever unpickling it raises.
        """
        if not self.kind:
            raise BadFrame("it is incomplete")
        parts, buffers = _Parts(self._parts), self._buffers
        self._forget()
        return unpickler(parts, buffers=buffers).load()


class _Parts:
    """The file that an unpickler reads from: parts that go as they have been read."""

    def __init__(self, parts: list[bytearray | mmap]) -> None:
        self._parts = parts[::-1]
        self._view = memoryview(b"")

    def _more(self) -> bool:
        while not self._view.nbytes:
            if not self._parts:
                return False
            self._view = memoryview(self._parts.pop())
        return True

    def readinto(self, target: Any) -> int:
        out = memoryview(target).cast("B")
        done = 0
        while done < out.nbytes and self._more():
            count = min(out.nbytes - done, self._view.nbytes)
            out[done : done + count] = self._view[:count]
            self._view = self._view[count:]
            done += count
        return done

    def read(self, size: int = -1) -> bytes:
        if size < 0:
            size = self._view.nbytes + sum(map(len, self._parts))
        data = bytearray(min(size, self._view.nbytes + sum(map(len, self._parts))))
        del data[self.readinto(data) :]
        return bytes(data)

    def readline(self) -> bytes:
        line = bytearray()
        while not line.endswith(b"\n") and self._more():
            line += self._view[:1]
            self._view = self._view[1:]
        return bytes(line)


def read_exactly(fd: int, length: int) -> bytes:
    """Read `length` bytes of a file.

    Raises:
        BadFrame: it ends before.
    """
    data = b""
    while len(data) < length:
        more = os.read(fd, length - len(data))
        if not more:
            raise BadFrame("it is cut off")
        data += more
    return data


def load(fd: int) -> Any:
    """Read one frame from a file, and unpickle it.

    Raises:
        BadFrame: it is cut off.
        Exception: whatever unpickling it raises.
    """
    reader = FrameReader()
    while not reader.kind:
        target = reader.wanted()
        if target is not None:
            count = os.readv(fd, [target])
            if count:
                reader.filled(count)
                continue
        else:
            data = os.read(fd, _HEADER_BYTES)
            if data:
                reader.feed(data)
                continue
        raise BadFrame("it is cut off")
    return reader.load()
