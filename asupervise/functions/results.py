"""What workers send back, taken while they run, so that none of them waits for us."""

from __future__ import annotations

import asyncio
import fcntl
import os
from typing import Any

from asupervise.functions import frames

__all__ = ["ResultChannel"]

# One turn of the event loop takes this much at the most, a fifth of a millisecond.
_TURN_BYTES = 1 << 20
_READ_BYTES = 1 << 16
# Worth a larger pipe: fewer turns, and fewer stops of the worker.
_LARGE_BYTES = 1 << 17
# How much may still be in the pipe when the worker has ended; somebody else may go on writing.
_REST_BYTES = 64 << 20
_F_SETPIPE_SZ = getattr(fcntl, "F_SETPIPE_SZ", 1031)


class _Unpickler(frames.Unpickler):
    """What a worker knows as ``__mp_main__`` is our own main module."""

    def find_class(self, module: str, name: str, /) -> Any:
        return super().find_class("__main__" if module == "__mp_main__" else module, name)


class ResultChannel:
    """The pipe by which one worker returns its value.

    Attributes:
        worker_end: the descriptor that the worker gets; see `hand_over`.

    Example::

        channel = ResultChannel.open()
        channel.listen()
        ...                             # the worker is started with channel.worker_end
        channel.hand_over()
        ...                             # it has ended
        channel.finish()
        value = channel.value()
    """

    def __init__(self, read_end: int, worker_end: int) -> None:
        self._fd = read_end
        self.worker_end = worker_end
        self._frames = frames.FrameReader()
        self._problem = ""
        self._enlarged = False
        self._loop = asyncio.get_running_loop()
        self._watching = False

    @classmethod
    def open(cls) -> ResultChannel:
        """A new pipe.

        Raises:
            OSError: no descriptor is left.
        """
        read_end, worker_end = os.pipe()
        os.set_blocking(read_end, False)
        return cls(read_end, worker_end)

    def listen(self) -> None:
        """A worker is about to be started; it may have ended before we know that it has begun."""
        self._loop.add_reader(self._fd, self._on_readable)
        self._watching = True

    def hand_over(self) -> None:
        """The worker has its end now: close ours."""
        if self.worker_end >= 0:
            os.close(self.worker_end)
            self.worker_end = -1

    def _on_readable(self) -> None:
        if not self._take(_TURN_BYTES):
            self._stop()
            if self._problem:
                self.close()  # who goes on writing gets an error, and does not wait for ever

    def _take(self, limit: int) -> bool:
        """Take what is there, up to about `limit` bytes; False at the end of the pipe."""
        taken = 0
        while taken < limit:
            try:
                count = self._read()
            except BlockingIOError:
                return True
            except frames.BadFrame as error:
                self._problem = str(error)
                return False
            if count == 0:
                return False
            taken += count
        return True

    def _read(self) -> int:
        target = self._frames.wanted()
        if target is None or target.nbytes < _READ_BYTES:
            data = os.read(self._fd, _READ_BYTES)
            self._frames.feed(data)
            return len(data)
        if target.nbytes >= _LARGE_BYTES and not self._enlarged:
            self._enlarge()
        count = os.readv(self._fd, [target[:_TURN_BYTES]])
        self._frames.filled(count)
        return count

    def _enlarge(self) -> None:
        self._enlarged = True
        try:
            fcntl.fcntl(self._fd, _F_SETPIPE_SZ, _TURN_BYTES)
        except OSError:
            pass  # the user's share of pipe memory is used up (pipe(7)): slower, but it works

    def finish(self) -> None:
        """The worker has ended: take the rest, and close the pipe."""
        if self._fd >= 0 and not self._problem and self._watching:
            self._take(_REST_BYTES)
        self.close()

    def close(self) -> None:
        """Take nothing more; what is complete stays."""
        self.hand_over()
        self._stop()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _stop(self) -> None:
        if self._watching:
            self._watching = False
            self._loop.remove_reader(self._fd)

    @property
    def problem(self) -> str:
        """Why there is no value although the worker has sent something; "" otherwise."""
        return self._problem

    def value(self) -> Any:
        """What the function returned; None where it returned nothing and ended well.

        To be called once, in a thread: unpickling may take a while, and may import modules.

        Raises:
            frames.BadFrame: somebody else has written into the channel.
            Exception: whatever unpickling it raises.
        """
        if self._problem:
            raise frames.BadFrame(self._problem)
        if self._frames.is_cut_off:
            raise frames.BadFrame("it is cut off")
        return self._frames.load(_Unpickler) if self._frames.kind == frames.VALUE else None

    def exception(self) -> BaseException | str | None:
        """The exception that it ended with, where it came; or why it cannot be unpickled. Once."""
        if self._frames.kind != frames.EXCEPTION:
            return None
        try:
            error = self._frames.load(_Unpickler)
        except Exception as problem:
            # Its class is not known here, or does not bear being pickled: its record remains.
            return f"{type(problem).__name__}: {problem}"
        return error if isinstance(error, BaseException) else None
