"""Which stream goes where: masks, the layout of the files, and specs that others bring."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asupervise import DefaultLogsSpecs, LogsSpecs, RunProcsResult, Std, start_processes, to_map
from asupervise.logs import LogsDest, line_prefixes, load_logs_specs

masks = st.sampled_from(list(Std))


def envs(nprocs: int, run_id: str = "job", attempt: int = 0) -> dict[int, dict[str, str]]:
    named = {"TORCHELASTIC_RUN_ID": run_id, "TORCHELASTIC_RESTART_COUNT": str(attempt)}
    return {rank: dict(named) for rank in range(nprocs)}


# --- masks --------------------------------------------------------------------------------------


@given(masks)
def test_a_mask_for_all(mask: Std) -> None:
    assert Std.from_str(str(int(mask))) is mask


@given(st.dictionaries(st.integers(0, 20_000), masks, min_size=1))
def test_masks_by_rank(by_rank: dict[int, Std]) -> None:
    text = ",".join(f"{rank}:{int(mask)}" for rank, mask in by_rank.items())
    assert Std.from_str(text) == by_rank


def test_ranks_of_several_digits() -> None:
    """torch's pattern knows ranks of one digit only."""
    assert Std.from_str("10:3") == {10: Std.ALL}
    assert Std.from_str("0:1,127:2") == {0: Std.OUT, 127: Std.ERR}


@pytest.mark.parametrize(
    "text",
    [
        *("", "4", "-1", "out", "0:", ":1", "0:4", "0:1,", ",0:1", "0:1,0:2", "0:1,00:2"),
        *("0:1;1:1", "a:1", "-1:1", "1.0:1", " 0:1", "0: 1", "٣:1", "²:1", "1:٣", "0:1 "),
        *("0x1:1", "1:1:1"),
    ],
)
def test_what_is_no_mask(text: str) -> None:
    with pytest.raises(ValueError, match="expected 0") as failed:
        Std.from_str(text)
    assert repr(text) in str(failed.value)


@given(st.text(max_size=12))
def test_anything_else_is_a_value_error(text: str) -> None:
    try:
        masks = Std.from_str(text)
    except ValueError:
        return
    assert isinstance(masks, Std | dict)


@given(masks, st.integers(0, 300))
def test_one_mask_for_every_rank(mask: Std, nprocs: int) -> None:
    assert to_map(mask, nprocs) == {rank: mask for rank in range(nprocs)}


@given(st.dictionaries(st.integers(0, 20), masks), st.integers(0, 20))
def test_ranks_that_are_not_named_have_none(by_rank: dict[int, Std], nprocs: int) -> None:
    before = dict(by_rank)
    filled = to_map(by_rank, nprocs)
    assert list(filled) == list(range(nprocs))
    assert all(filled[rank] is by_rank.get(rank, Std.NONE) for rank in filled)
    assert by_rank == before


def test_prefixes() -> None:
    assert line_prefixes("w", 2, None) == ["[w0]:", "[w1]:"]
    assert line_prefixes("w", 3, {1: "> ", 2: ""}) == ["[w0]:", "> ", ""]


# --- the layout ---------------------------------------------------------------------------------


def test_files_are_where_torch_has_them(tmp_path: Path) -> None:
    specs = DefaultLogsSpecs(str(tmp_path), redirects={0: Std.ERR}, tee={1: Std.ALL, 2: Std.OUT})
    given = envs(4, attempt=2)
    dest = specs.reify(given)
    assert given == envs(4, attempt=2), "the caller's dictionaries are left alone"
    assert list(tmp_path.iterdir()) == [], "names only"
    run = Path(dest.run_dir)
    assert run.parent == tmp_path
    assert run.name.startswith("job_")
    attempt = run / "attempt_2"
    assert dest.stdouts == {
        0: "", 1: f"{attempt}/1/stdout.log", 2: f"{attempt}/2/stdout.log", 3: "",
    }  # fmt: skip
    assert dest.stderrs == {
        0: f"{attempt}/0/stderr.log", 1: f"{attempt}/1/stderr.log", 2: "", 3: "",
    }  # fmt: skip
    assert dest.tee_stdouts == {rank: dest.stdouts[rank] for rank in (1, 2)}
    assert dest.tee_stderrs == {1: dest.stderrs[1]}
    assert dest.error_files == {rank: f"{attempt}/{rank}/error.json" for rank in range(4)}
    assert dest.filtered_stdout == f"{attempt}/filtered_stdout.log"
    assert dest.filtered_stderr == f"{attempt}/filtered_stderr.log"
    assert not dest.temporary
    assert specs.root_log_dir == str(tmp_path)


def test_ranks_that_are_not_shown() -> None:
    specs = DefaultLogsSpecs("/logs", tee={0: Std.OUT, 1: Std.OUT}, local_ranks_filter={1})
    dest = specs.reify(envs(3))
    assert dest.stdouts[0].endswith("/0/stdout.log")
    assert dest.stdouts[2] == os.devnull
    assert dest.stderrs == {0: os.devnull, 1: "", 2: os.devnull}
    assert list(dest.tee_stdouts) == [1]


def test_nowhere() -> None:
    specs = DefaultLogsSpecs(os.devnull, redirects={0: Std.OUT}, tee=Std.ERR)
    dest = specs.reify(envs(2))
    assert dest == LogsDest(stdouts={0: os.devnull, 1: ""}, stderrs={0: "", 1: ""})


def test_a_relative_folder_is_ours_and_not_the_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    dest = DefaultLogsSpecs("logs", tee=Std.OUT).reify(envs(1))
    assert dest.stdouts[0].startswith(f"{tmp_path}/logs/job_")


def test_a_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    dest = DefaultLogsSpecs().reify(envs(1))
    assert Path(dest.run_dir).parent == tmp_path
    assert Path(dest.run_dir).name.startswith("asupervise_job_")
    assert dest.temporary
    assert DefaultLogsSpecs().root_log_dir == ""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    assert Path(DefaultLogsSpecs().reify(envs(1)).run_dir).parent == Path("/tmp")


@pytest.mark.parametrize("run_id", ["a/b", "../../etc", "nul\0", "x" * 1000, ""])
def test_a_run_id_that_is_no_file_name(tmp_path: Path, run_id: str) -> None:
    dest = DefaultLogsSpecs(str(tmp_path)).reify(envs(1, run_id))
    run = Path(dest.run_dir)
    assert run.parent == tmp_path
    run.mkdir()


def test_attempts_of_one_run_share_its_folder_and_runs_do_not() -> None:
    specs = DefaultLogsSpecs("/logs", tee=Std.OUT)
    first, restart, second = (specs.reify(envs(1, attempt=a)) for a in (0, 1, 0))
    assert first.run_dir == restart.run_dir
    assert first.stdouts != restart.stdouts
    assert second.run_dir != first.run_dir


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(NotADirectoryError, match=r"log_dir: '.*/file' is a file"):
        DefaultLogsSpecs(str(file))


def test_a_folder_that_is_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not with chmod: root may write everywhere.
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match="is not writable"):
        DefaultLogsSpecs(str(tmp_path))


def test_equal_specs_are_equal() -> None:
    specs = DefaultLogsSpecs("/logs", tee=Std.OUT)
    assert specs == DefaultLogsSpecs("/logs", tee=Std.OUT)
    assert specs != DefaultLogsSpecs("/logs", tee=Std.ERR)
    assert specs != "specs"
    assert "tee=<Std.OUT: 1>" in repr(specs)


# --- as real groups have them -------------------------------------------------------------------


async def run(script: str, specs: LogsSpecs | None, nprocs: int = 1) -> RunProcsResult:
    args = {rank: (script,) for rank in range(nprocs)}
    async with start_processes("w", ["/bin/sh", "-c"], args, envs(nprocs), specs) as ctx:
        result = await ctx.wait()
    assert result is not None
    return result


def mode(path: str | Path) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


async def test_files_and_folders_are_the_users_alone(tmp_path: Path) -> None:
    base = tmp_path / "made" / "logs"
    old = os.umask(0)
    try:
        result = await run("echo a; echo b >&2", DefaultLogsSpecs(str(base), redirects=Std.ALL), 2)
    finally:
        os.umask(old)
    for rank in (0, 1):
        assert Path(result.stdouts[rank]).read_text() == "a\n"
        assert Path(result.stderrs[rank]).read_text() == "b\n"
        assert mode(result.stdouts[rank]) == mode(result.stderrs[rank]) == 0o600
        folder = Path(result.stdouts[rank]).parent
        while folder != tmp_path:
            assert mode(folder) == 0o700, folder
            folder = folder.parent


async def test_a_temporary_folder_goes_with_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    result = await run("echo a", DefaultLogsSpecs(redirects=Std.ALL))
    assert list(tmp_path.iterdir()) == []
    assert result.stdouts == {}
    assert result.log_dir is None


async def test_a_temporary_folder_stays_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    result = await run("echo a; exit 3", DefaultLogsSpecs(redirects=Std.ALL))
    assert result.is_failed()
    (folder,) = tmp_path.iterdir()
    assert result.log_dir == str(folder)
    assert Path(result.stdouts[0]).read_text() == "a\n"


async def test_specs_that_are_used_twice(tmp_path: Path) -> None:
    specs = DefaultLogsSpecs(str(tmp_path), redirects=Std.OUT)
    first, second = await run("echo a", specs), await run("echo b", specs)
    assert Path(first.stdouts[0]).read_text() == "a\n"
    assert Path(second.stdouts[0]).read_text() == "b\n"


async def test_a_folder_in_whose_place_a_file_is_put(tmp_path: Path) -> None:
    specs = DefaultLogsSpecs(str(tmp_path / "file" / "logs"), redirects=Std.OUT)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        await run("echo a", specs)


# --- specs that others bring --------------------------------------------------------------------

OTHERS = """
from asupervise import LogsSpecs
from asupervise.logs import LogsDest

class {name}(LogsSpecs):
    root_log_dir = ""

    def reify(self, envs):
        return LogsDest(stdouts={{r: "" for r in envs}}, stderrs={{r: "" for r in envs}})
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package that registers specs under both groups."""
    (tmp_path / "others_specs.py").write_text(
        OTHERS.format(name="Ours") + OTHERS.format(name="Torchs")
    )
    info = tmp_path / "others-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[asupervise.logs_specs]\nours = others_specs:Ours\nboth = others_specs:Ours\n"
        "gone = others_specs:Gone\n"
        "[torchrun.logs_specs]\ntorchs = others_specs:Torchs\nboth = others_specs:Torchs\n"
        "default = others_specs:Torchs\nmissing = no_such_module:Specs\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("others_specs", None)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "found"), [("ours", "Ours"), ("torchs", "Torchs"), ("both", "Ours")]
)
def test_specs_by_name(name: str, found: str) -> None:
    assert load_logs_specs(name).__name__ == found


@pytest.mark.usefixtures("installed")
def test_the_default_is_ours() -> None:
    assert load_logs_specs(None) is DefaultLogsSpecs
    assert load_logs_specs("default") is DefaultLogsSpecs


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nope", r"no logs specs named 'nope'.*known: both, both, default, gone, "),
        ("gone", r"'gone': others_specs:Gone cannot be imported: .*Gone"),
        ("missing", r"'missing': no_such_module:Specs cannot be imported: .*no_such_module"),
    ],
)
def test_a_name_that_leads_nowhere(name: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        load_logs_specs(name)


@pytest.mark.usefixtures("installed")
async def test_a_group_with_others_specs(tmp_path: Path) -> None:
    result = await run("true", load_logs_specs("ours")())
    assert not result.is_failed()
    assert result.log_dir is None


@dataclass
class TorchsDest:
    """What `reify` returns under torch: the same, without what only ours has."""

    stdouts: dict[int, str] = field(default_factory=dict)
    stderrs: dict[int, str] = field(default_factory=dict)
    tee_stdouts: dict[int, str] = field(default_factory=dict)
    tee_stderrs: dict[int, str] = field(default_factory=dict)
    error_files: dict[int, str] = field(default_factory=dict)
    filtered_stdout: str = ""
    filtered_stderr: str = ""


def test_what_specs_for_torch_return() -> None:
    torchs = TorchsDest(stdouts={0: "a"}, error_files={0: "e"}, filtered_stdout="f")
    ours = LogsDest(stdouts={0: "a"}, error_files={0: "e"}, filtered_stdout="f")
    assert LogsDest.of(torchs) == ours
    assert LogsDest.of(ours) is ours


def test_specs_that_are_not_complete() -> None:
    class Specs(LogsSpecs):
        def reify(self, envs: Mapping[int, Mapping[str, str]]) -> LogsDest:
            return LogsDest()

    incomplete: Any = Specs
    with pytest.raises(TypeError, match="root_log_dir"):
        incomplete()
