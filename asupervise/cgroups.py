"""A cgroup v2 of the group's own, where one has been delegated to us.

Whatever a worker's descendants do to their session, their parent or their environment, they stay
in the cgroup: there they are found and, with ``cgroup.kill`` (Linux 5.14), killed at once
(kernel documentation, admin-guide/cgroup-v2). Used only below a cgroup that its manager has
given to us (``Delegate=yes`` of systemd, or a folder that our user owns): elsewhere, making
cgroups would interfere with whoever manages them. Used only by programs that own their process,
because that is moved itself while the workers start.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from asupervise import procfs

_MOUNTS = ("sys/fs/cgroup", "sys/fs/cgroup/unified")
_DELEGATION = ("user.delegate", "trusted.delegate")


class OwnCgroup:
    """One group's cgroup; made by :func:`make`, or found again by its folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Be in it ourselves, so that what we start is born there.

        Moving each worker in after its start would be too late for what it has forked by then,
        and every move waits for the kernel's other processors (``synchronize_rcu``): two moves
        of ours are cheaper than one of each worker.
        """
        if not _write(os.path.join(self.folder, "cgroup.procs"), str(os.getpid())):
            yield
            return
        try:
            yield
        finally:
            parent = os.path.dirname(self.folder)
            _write(os.path.join(parent, "cgroup.procs"), str(os.getpid()))

    def pids(self) -> list[int]:
        """Everybody in it, and in the cgroups that they have made below it."""
        found: list[int] = []
        for folder in self._folders():
            text = procfs.read_text(os.path.join(folder, "cgroup.procs"))
            found += map(int, text.split())
        return found

    def kill(self) -> bool:
        """SIGKILL everybody in it at once, also those that are being forked just now."""
        return _write(os.path.join(self.folder, "cgroup.kill"), "1")

    def remove(self) -> None:
        """Remove it; it stays if somebody in it could not be ended."""
        for folder in reversed(list(self._folders())):
            try:
                os.rmdir(folder)
            except OSError:
                return

    def _folders(self) -> Iterator[str]:
        for folder, _, _ in os.walk(self.folder):
            yield folder


def make(name: str, root: str = "/") -> OwnCgroup | None:
    """A new cgroup below ours; None where none has been delegated, or the kernel cannot kill it.

    Args:
        name: its folder's name.
        root: the file system's root, for tests.
    """
    parent = delegated(root)
    if parent is None:
        return None
    folder = os.path.join(parent, name)
    try:
        os.mkdir(folder, 0o755)
    except OSError:
        return None
    own = OwnCgroup(folder)
    if not os.access(os.path.join(folder, "cgroup.kill"), os.W_OK):
        own.remove()
        return None
    return own


def delegated(root: str = "/") -> str | None:
    """The folder of our own cgroup, if its manager has left it to us."""
    path = _own_path(root)
    if path is None:
        return None
    for mount in _MOUNTS:
        folder = os.path.join(root, mount, path.lstrip("/"))
        if os.path.exists(os.path.join(folder, "cgroup.procs")):
            return folder if _is_left_to_us(folder) else None
    return None


def _own_path(root: str) -> str | None:
    for line in procfs.read_text(os.path.join(root, "proc/self/cgroup")).splitlines():
        number, _, path = line.split(":", 2)
        if number == "0":
            return path
    return None


def _is_left_to_us(folder: str) -> bool:
    if not os.access(os.path.join(folder, "cgroup.procs"), os.W_OK):
        return False
    owner = os.stat(folder).st_uid
    return (owner != 0 and owner == os.geteuid()) or any(
        _attribute(folder, name) == b"1" for name in _DELEGATION
    )


def _attribute(folder: str, name: str) -> bytes:
    try:
        return os.getxattr(folder, name)
    except (OSError, AttributeError):
        return b""


def _write(path: str, text: str) -> bool:
    try:
        with open(path, "w") as file:
            file.write(text)
    except OSError:
        return False
    return True
