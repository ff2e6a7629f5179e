"""The files of a group: programs checked before, folders made, temporary ones removed after."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress

from asupervise.plan import GroupPlan, WorkerPlan
from asupervise.worker import STACKS_VARIABLE

_FOLDER_MODE = 0o700


def check_programs(
    workers: Iterable[WorkerPlan], parent_env: Mapping[str, str], cwd: str | None
) -> None:
    """Check that every worker's program is there and may be executed, before any is started.

    Raises:
        FileNotFoundError: naming the rank and the program.
        PermissionError: likewise.
        NotADirectoryError: if `cwd` is no folder.
    """
    if cwd is not None and not os.path.isdir(cwd):
        raise NotADirectoryError(errno.ENOTDIR, "cwd: no such folder", cwd)
    checked: set[tuple[str, str]] = set()
    for worker in workers:
        path = worker.env.get("PATH", parent_env.get("PATH", os.defpath))
        if not worker.function and (worker.program, path) not in checked:
            checked.add((worker.program, path))
            _check_program(worker, path, cwd)


def _check_program(worker: WorkerPlan, path: str, cwd: str | None) -> None:
    program = worker.program
    if os.path.dirname(program):
        found = [os.path.join(cwd or "", program)]
    else:
        # An empty or relative entry starts from the working directory, as in execvp(3).
        found = [os.path.join(cwd or "", folder, program) for folder in path.split(os.pathsep)]
    there = [candidate for candidate in found if os.path.isfile(candidate)]
    if not there:
        where = "" if os.path.dirname(program) else " on PATH"
        error = FileNotFoundError(
            errno.ENOENT, f"local rank {worker.local_rank}: no such program{where}", program
        )
        if where and os.path.isfile(os.path.join(cwd or "", program)):
            error.add_note(f"hint: there is ./{program}; a Python script is (sys.executable, ...)")
        raise error
    if not any(os.access(candidate, os.X_OK) for candidate in there):
        raise PermissionError(
            errno.EACCES, f"local rank {worker.local_rank}: the program is not executable",
            there[0],
        )  # fmt: skip


def make_folders(plan: GroupPlan) -> None:
    """Make the folders of all the files that the plan names, for the user alone.

    Raises:
        OSError: if one cannot be made, naming it.
    """
    logs = plan.logs
    paths = [*logs.stdouts.values(), *logs.stderrs.values(), *logs.error_files.values()]
    folders = {os.path.dirname(p) for p in paths if p and p != os.devnull}
    known: set[str] = set()
    for folder in sorted(folders):
        _make(folder, known)


def _make(folder: str, known: set[str]) -> None:
    # From the top down, for `os.makedirs` gives its mode to the last folder only.
    if not folder or folder in known:
        return
    parent = os.path.dirname(folder)
    if parent not in known and not os.path.isdir(folder):
        _make(parent, known)
    known.add(folder)
    try:
        os.mkdir(folder, _FOLDER_MODE)
    except FileExistsError:
        if not os.path.isdir(folder):
            raise NotADirectoryError(
                errno.ENOTDIR, "log folder: a file stands there", folder
            ) from None


async def remove_run_folder(plan: GroupPlan) -> bool:
    """Remove a temporary run folder with all that is in it; True if it is gone."""
    folder = plan.logs.run_dir
    if not (folder and plan.logs.temporary):
        return False
    if _remove_empty(plan):
        return True
    return await asyncio.to_thread(_remove_tree, folder)


def _remove_tree(folder: str) -> bool:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
    return not os.path.exists(folder)


def _remove_empty(plan: GroupPlan) -> bool:
    """The common case, without a thread: nothing was redirected and nothing has failed.

    At the most there are the empty files in which workers would have told where they are.
    """
    stacks = {worker.env.get(STACKS_VARIABLE, "") for worker in plan.workers}
    folders = {os.path.dirname(p) for p in plan.logs.error_files.values()}
    attempts = {os.path.dirname(f) for f in folders}
    for path in stacks:
        with suppress(OSError):
            os.unlink(path)
    try:
        for folder in (*folders, *attempts, plan.logs.run_dir):
            os.rmdir(folder)
    except OSError:
        return False
    return True


def full_disk_warning(plan: GroupPlan) -> str | None:
    """A sentence, if the disk that the logs are on has no space left for them."""
    logged = [w for w in plan.workers if w.stdout or w.stderr]
    if not logged or not plan.logs.run_dir:
        return None
    try:
        disk = os.statvfs(plan.logs.run_dir)
    except OSError:
        return None
    if disk.f_bavail > 0 or disk.f_blocks == 0:
        return None
    return f"{plan.logs.run_dir}: no space is left on this disk: logs may be cut short"


def read_tail(path: str, limit_bytes: int) -> str:
    """The last lines of a regular file, at most `limit_bytes` of it; "" if it cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            return ""
        start = max(0, status.st_size - limit_bytes)
        data = os.pread(fd, limit_bytes, start)
    except OSError:
        return ""
    finally:
        os.close(fd)
    text = data.decode(errors="backslashreplace")
    return text.partition("\n")[2] if start else text
