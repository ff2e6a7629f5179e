"""Where workers' output goes: stream masks, and the log files by their names.

``Std``, ``LogsSpecs``, ``DefaultLogsSpecs`` and ``LogsDest`` have torch's names and meaning
(``torch.distributed.elastic.multiprocessing.api``). Unlike torch's they only name files: the
folders are made when the group starts, and the caller's dictionaries are left alone.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import IntFlag
from typing import TYPE_CHECKING, Final

from asupervise.errors import NotSupportedError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

# The number of an attempt's folder, where it is not that of the restarts.
ATTEMPT_VARIABLE = "ASUPERVISE_ATTEMPT"
_ENTRY_POINT_GROUPS = ("asupervise.logs_specs", "torchrun.logs_specs")


class Std(IntFlag):
    """Which of a worker's standard streams are meant, as a bit mask.

    Example:
        >>> Std.OUT | Std.ERR is Std.ALL
        True
    """

    NONE = 0
    OUT = 1
    ERR = 2
    ALL = OUT | ERR

    @classmethod
    def from_str(cls, vm: str) -> Std | dict[int, Std]:
        """Parse a mask for all ranks, or a map of masks by local rank.

        Args:
            vm: ``"0"`` to ``"3"``, or ``"<local rank>:<mask>,..."`` with ranks of any size.

        Raises:
            ValueError: for anything else.

        Example:
            >>> Std.from_str("3")
            <Std.ALL: 3>
            >>> Std.from_str("0:1,10:3")
            {0: <Std.OUT: 1>, 10: <Std.ALL: 3>}
        """
        if ":" not in vm:
            return _mask(vm, vm)
        masks: dict[int, Std] = {}
        for item in vm.split(","):
            rank, _, mask = item.partition(":")
            if not (rank.isascii() and rank.isdigit()):
                raise _bad_mask(vm, f": {rank!r} is not a local rank")
            if int(rank) in masks:
                raise _bad_mask(vm, f": local rank {int(rank)} is given twice")
            masks[int(rank)] = _mask(mask, vm)
        return masks


_NO_RUN_ID: Final = "none"


def _mask(text: str, whole: str) -> Std:
    if text not in ("0", "1", "2", "3"):
        raise _bad_mask(whole, "" if text == whole else f": {text!r} is not a stream mask")
    return Std(int(text))


def _bad_mask(text: str, why: str) -> ValueError:
    return ValueError(
        f"{text!r}{why}: expected 0 (none), 1 (stdout), 2 (stderr) or 3 (both), "
        "for all ranks or as <local rank>:<mask>,..."
    )


def _masks(name: str, given: object) -> Std | dict[int, Std]:
    """A mask for all, or one by local rank; torch's, which are numbers as well, become ours."""
    if isinstance(given, Mapping):
        return {rank: _one_mask(name, mask) for rank, mask in given.items()}
    return _one_mask(name, given)


def _one_mask(name: str, given: object) -> Std:
    if isinstance(given, int) and 0 <= given <= Std.ALL:
        return Std(int(given))
    raise ValueError(
        f"{name}: {given!r}: expected Std.NONE, OUT, ERR or ALL, or them by local rank"
    )


def to_map(val_or_map: Std | Mapping[int, Std], local_world_size: int) -> dict[int, Std]:
    """A mask for each local rank ``0..local_world_size-1``; ranks not named get ``Std.NONE``.

    Args:
        val_or_map: one mask for all, or masks by local rank.
        local_world_size: how many workers this node runs.

    Example:
        >>> to_map({1: Std.OUT}, local_world_size=2)
        {0: <Std.NONE: 0>, 1: <Std.OUT: 1>}
    """
    if isinstance(val_or_map, Std):
        return dict.fromkeys(range(local_world_size), val_or_map)
    return {rank: val_or_map.get(rank, Std.NONE) for rank in range(local_world_size)}


@dataclass
class LogsDest:
    """The files of one attempt of a group, by local rank.

    Attributes:
        stdouts: where stdout goes; ``""`` is the console (torch's sentinel).
        stderrs: likewise for stderr.
        tee_stdouts: those of `stdouts` that are shown on the console as well.
        tee_stderrs: likewise for stderr.
        error_files: where a worker's ``@record`` writes its exception.
        filtered_stdout: the one file for lines that match ``duplicate_stdout_filters``.
        filtered_stderr: likewise for stderr.
        run_dir: the run's folder, above its attempts; ``""`` if there is none.
        temporary: whether `run_dir` is to be removed after success.

    Example:
        >>> LogsDest(stdouts={0: "/logs/out.0"}, stderrs={0: ""}).stdouts[0]
        '/logs/out.0'
    """

    stdouts: dict[int, str] = field(default_factory=dict)
    stderrs: dict[int, str] = field(default_factory=dict)
    tee_stdouts: dict[int, str] = field(default_factory=dict)
    tee_stderrs: dict[int, str] = field(default_factory=dict)
    error_files: dict[int, str] = field(default_factory=dict)
    filtered_stdout: str = ""
    filtered_stderr: str = ""
    run_dir: str = ""
    temporary: bool = False

    @classmethod
    def of(cls, given: object) -> LogsDest:
        """What logs specs have returned: those that were made for torch have its own class."""
        if isinstance(given, cls):
            return given
        names = [each.name for each in fields(cls) if hasattr(given, each.name)]
        return cls(**{name: getattr(given, name) for name in names})


class LogsSpecs(ABC):
    """Decides where each worker's output goes. Subclass it to decide otherwise.

    A subclass is found by name through the entry point groups ``asupervise.logs_specs`` and
    ``torchrun.logs_specs`` (see :func:`load_logs_specs`).

    Args:
        log_dir: base folder; None for a temporary one, ``os.devnull`` for no files at all.
        redirects: streams that go to files only: one mask for all, or by local rank.
        tee: streams that go to files and, with a prefix before each line, to the console.
        local_ranks_filter: the local ranks shown on the console; None for all. Files are
            written for every rank.

    Raises:
        ValueError: for a mask that is none.

    Example:
        >>> class Flat(LogsSpecs):
        ...     def reify(self, envs):
        ...         base = self.root_log_dir
        ...         return LogsDest(
        ...             stdouts={rank: f"{base}/{rank}.out" for rank in envs},
        ...             stderrs={rank: f"{base}/{rank}.err" for rank in envs},
        ...         )
        ...
        ...     @property
        ...     def root_log_dir(self):
        ...         return self._root_log_dir or ""
        >>> Flat("/logs").reify({0: {}, 1: {}}).stdouts[1]
        '/logs/1.out'

    Each stream of each worker has a file of its own: what is in it is told as that worker's.
    """

    def __init__(
        self,
        log_dir: str | None = None,
        redirects: Std | Mapping[int, Std] = Std.NONE,
        tee: Std | Mapping[int, Std] = Std.NONE,
        local_ranks_filter: set[int] | None = None,
    ) -> None:
        self._root_log_dir = log_dir
        self._redirects = _masks("redirects", redirects)
        self._tee = _masks("tee", tee)
        self._local_ranks_filter = local_ranks_filter

    @abstractmethod
    def reify(self, envs: Mapping[int, Mapping[str, str]]) -> LogsDest:
        """Name the files of one attempt.

        Args:
            envs: each worker's environment by local rank; ``TORCHELASTIC_RUN_ID`` and
                ``TORCHELASTIC_RESTART_COUNT`` say which run and attempt it is, or
                ``ASUPERVISE_ATTEMPT``, where there were attempts that no failure has caused.
        """

    @property
    @abstractmethod
    def root_log_dir(self) -> str:
        """The base folder, or ``""`` where it is a temporary one."""


class DefaultLogsSpecs(LogsSpecs):
    """torch's layout: ``<log_dir>/<run_id>_<random>/attempt_<n>/<local_rank>/{stdout,stderr}.log``.

    Without a `log_dir` the run's folder is a temporary one. It stays only where a worker has failed
    by itself. The arguments are those of :class:`LogsSpecs`.

    Raises:
        NotADirectoryError: if `log_dir` is a file.
        PermissionError: if it is not writable.

    Example:
        >>> specs = DefaultLogsSpecs("/logs", tee=Std.OUT)
        >>> specs.reify({0: {"TORCHELASTIC_RUN_ID": "job"}}).stdouts[0]  # doctest: +ELLIPSIS
        '/logs/job_.../attempt_0/0/stdout.log'
    """

    def __init__(
        self,
        log_dir: str | None = None,
        redirects: Std | Mapping[int, Std] = Std.NONE,
        tee: Std | Mapping[int, Std] = Std.NONE,
        local_ranks_filter: set[int] | None = None,
    ) -> None:
        super().__init__(log_dir, redirects, tee, local_ranks_filter)
        if log_dir and log_dir != os.devnull and os.path.exists(log_dir):
            if not os.path.isdir(log_dir):
                raise NotADirectoryError(f"log_dir: {log_dir!r} is a file, not a folder")
            if not os.access(log_dir, os.W_OK | os.X_OK):
                raise PermissionError(f"log_dir: {log_dir!r} is not writable")
        self._run_dir = ""
        self._attempts: set[str] = set()

    @property
    def root_log_dir(self) -> str:
        """As given; ``""`` where the run's folder is a temporary one."""
        return self._root_log_dir or ""

    def reify(self, envs: Mapping[int, Mapping[str, str]]) -> LogsDest:
        """Name the files; see :meth:`LogsSpecs.reify`. Makes none of them.

        Attempts of one run have one folder; an attempt that has been named already begins a new
        run, so that nobody's files are overwritten.
        """
        ranks = range(len(envs))
        if self._root_log_dir == os.devnull:
            return self._nowhere(ranks)
        first = envs.get(0, {})
        restarts = first.get("TORCHELASTIC_RESTART_COUNT", "0")
        attempt = first.get(ATTEMPT_VARIABLE, restarts)
        run_dir = self._run_folder(first.get("TORCHELASTIC_RUN_ID", _NO_RUN_ID), attempt)
        attempt_dir = os.path.join(run_dir, f"attempt_{attempt}")
        return self._layout(ranks, attempt_dir)

    def _run_folder(self, run_id: str, attempt: str) -> str:
        # Restarts of one run share its folder; the same specs used for a second run do not
        # touch the first one's files (torch deletes them).
        if not self._run_dir or attempt in self._attempts:
            base = self._root_log_dir or _temporary_base()
            stem = run_id.replace("/", "_").replace("\0", "_")[:100]
            if not self._root_log_dir:
                # torch's word for a run without an id says nothing to who finds it in /tmp.
                stem = "asupervise" if stem == _NO_RUN_ID else f"asupervise_{stem}"
            self._run_dir = os.path.join(os.path.abspath(base), f"{stem}_{os.urandom(4).hex()}")
            self._attempts = set()
        self._attempts.add(attempt)
        return self._run_dir

    def _layout(self, ranks: range, attempt_dir: str) -> LogsDest:
        tees = to_map(self._tee, len(ranks))
        masks = {r: m | tees[r] for r, m in to_map(self._redirects, len(ranks)).items()}
        folder = {rank: os.path.join(attempt_dir, str(rank)) for rank in ranks}

        def streams(mask: Std, file: str) -> tuple[dict[int, str], dict[int, str]]:
            paths = {
                r: os.path.join(folder[r], file) if masks[r] & mask else self._console(r)
                for r in ranks
            }
            shown = {r: paths[r] for r in ranks if tees[r] & mask and self._is_shown(r)}
            return paths, shown

        stdouts, tee_stdouts = streams(Std.OUT, "stdout.log")
        stderrs, tee_stderrs = streams(Std.ERR, "stderr.log")
        return LogsDest(
            stdouts=stdouts,
            stderrs=stderrs,
            tee_stdouts=tee_stdouts,
            tee_stderrs=tee_stderrs,
            error_files={r: os.path.join(folder[r], "error.json") for r in ranks},
            filtered_stdout=os.path.join(attempt_dir, "filtered_stdout.log"),
            filtered_stderr=os.path.join(attempt_dir, "filtered_stderr.log"),
            run_dir=self._run_dir,
            temporary=not self._root_log_dir,
        )

    def _nowhere(self, ranks: range) -> LogsDest:
        """``log_dir=os.devnull``: what would be redirected is thrown away, nothing is teed."""
        masks = to_map(self._redirects, len(ranks))
        return LogsDest(
            stdouts={r: os.devnull if masks[r] & Std.OUT else self._console(r) for r in ranks},
            stderrs={r: os.devnull if masks[r] & Std.ERR else self._console(r) for r in ranks},
        )

    def _is_shown(self, rank: int) -> bool:
        return self._local_ranks_filter is None or rank in self._local_ranks_filter

    def _console(self, rank: int) -> str:
        return "" if self._is_shown(rank) else os.devnull

    def __repr__(self) -> str:
        return (
            f"DefaultLogsSpecs(log_dir={self._root_log_dir!r}, redirects={self._redirects!r}, "
            f"tee={self._tee!r}, local_ranks_filter={self._local_ranks_filter!r})"
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DefaultLogsSpecs):
            return NotImplemented
        mine = (self._root_log_dir, self._redirects, self._tee, self._local_ranks_filter)
        return mine == (
            other._root_log_dir,
            other._redirects,
            other._tee,
            other._local_ranks_filter,
        )

    __hash__ = None  # type: ignore[assignment]


def _temporary_base() -> str:
    # As `tempfile` does in the end, which takes as long to import as all of ours.
    named = os.environ.get("TMPDIR", "")
    return named if os.path.isdir(named) else "/tmp"


def load_logs_specs(name: str | None) -> type[LogsSpecs]:
    """The logs specs class registered under `name`; :class:`DefaultLogsSpecs` for None.

    ``"default"`` is that, too: torch registers its own under this name.

    Raises:
        ValueError: if no installed package registers that name, or what it registers cannot be
            imported.
    """
    if name is None or name == "default":
        return DefaultLogsSpecs
    from importlib.metadata import entry_points

    known: list[str] = []
    for group in _ENTRY_POINT_GROUPS:
        points = entry_points(group=group)
        known += points.names
        for point in points.select(name=name):
            return _loaded(point)
    raise NotSupportedError(
        f"no logs specs named {name!r} is installed (entry point groups "
        f"{' and '.join(_ENTRY_POINT_GROUPS)}); known: {', '.join(sorted(known)) or 'none'}"
    )


def _loaded(point: EntryPoint) -> type[LogsSpecs]:
    try:
        loaded: type[LogsSpecs] = point.load()
    except (ImportError, AttributeError) as exc:
        raise NotSupportedError(
            f"logs specs {point.name!r}: {point.value} cannot be imported: {exc}"
        ) from exc
    return loaded


def line_prefixes(name: str, nprocs: int, given: Mapping[int, str] | None) -> Sequence[str]:
    """The prefix of each local rank's lines: as given, else ``[<name><local_rank>]:``."""
    given = given or {}
    return [given.get(rank, f"[{name}{rank}]:") for rank in range(nprocs)]
