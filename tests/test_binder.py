"""`binder.py`: binding on this very machine, with the tools that are here and with false ones."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from asupervise import (
    AffinityMode,
    BindingError,
    DefaultLogsSpecs,
    MemoryPolicy,
    NumaOptions,
    RunProcsResult,
    Std,
    plan_processes,
    start_processes,
)
from asupervise.binder import choose, find_tools
from asupervise.spec import GroupSpec
from tests.workers import PYTHON

needs_numactl = pytest.mark.skipif(shutil.which("numactl") is None, reason="numactl is missing")
needs_taskset = pytest.mark.skipif(shutil.which("taskset") is None, reason="taskset is missing")

# What the kernel says of the worker itself.
PROGRAM = """
import json, os
lines = open("/proc/self/status").read().splitlines()
status = dict(line.split(":", 1) for line in lines)
print(json.dumps([sorted(os.sched_getaffinity(0)), status["Mems_allowed_list"].strip()]))
"""

pytestmark = pytest.mark.usefixtures("own_temporary_folder")


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of PATH: the tools are those that a test puts there."""
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    for program in ("true", "sh"):
        (folder / program).symlink_to(f"/bin/{program}")
    return folder


def put(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def real(folder: Path, name: str) -> None:
    where = shutil.which(name, path="/usr/bin:/bin:/usr/local/bin")
    assert where is not None
    (folder / name).symlink_to(where)


async def run(nprocs: int, options: NumaOptions, logs: Path) -> RunProcsResult:
    async with start_processes(
        "t",
        [*PYTHON, PROGRAM],
        {rank: () for rank in range(nprocs)},
        {rank: {} for rank in range(nprocs)},
        DefaultLogsSpecs(str(logs), redirects=Std.ALL),
        numa_options=options,
    ) as ctx:
        result = await ctx.wait()
    assert result is not None
    return result


def told(result: RunProcsResult) -> list[Any]:
    assert not result.is_failed(), result.failures
    return [json.loads(Path(result.stdouts[r]).read_text()) for r in sorted(result.stdouts)]


def planned(nprocs: int, options: NumaOptions | None, **env: str) -> list[tuple[str, ...]]:
    plan = plan_processes(
        "t",
        "/bin/true",
        {rank: () for rank in range(nprocs)},
        {rank: env for rank in range(nprocs)},
        numa_options=options,
    )
    return [worker.argv for worker in plan.workers]


# --- bound for real -------------------------------------------------------------------------------


@needs_numactl
@pytest.mark.parametrize("mode", list(AffinityMode))
async def test_numactl_binds_workers(mode: AffinityMode, tmp_path: Path) -> None:
    options = NumaOptions(mode, memory_policy=MemoryPolicy.LOCAL)
    allowed = os.sched_getaffinity(0)
    nprocs = min(2, len(allowed))
    result = await run(nprocs, options, tmp_path)
    bound = [set(cpus) for cpus, _ in told(result)]
    plan = plan_processes(
        "t", "true", {r: () for r in range(nprocs)}, {r: {} for r in range(nprocs)},
        numa_options=options,
    )  # fmt: skip
    for cpus, worker in zip(bound, plan.workers, strict=True):
        assert worker.binding is not None
        assert cpus == worker.binding.cpus
        assert cpus <= allowed
        assert "numactl" in worker.argv[0]
        assert "--localalloc" in worker.argv
    if mode is AffinityMode.EXCLUSIVE and nprocs == 2:
        assert bound[0].isdisjoint(bound[1])
    assert result.warnings == ()


@needs_taskset
async def test_taskset_binds_workers_where_numactl_is_missing(tools: Path, tmp_path: Path) -> None:
    real(tools, "taskset")
    nprocs = min(2, len(os.sched_getaffinity(0)))
    options = NumaOptions(AffinityMode.EXCLUSIVE)
    assert all(argv[0] == str(tools / "taskset") for argv in planned(nprocs, options))
    bound = [set(cpus) for cpus, _ in told(await run(nprocs, options, tmp_path))]
    assert set.union(*bound) <= os.sched_getaffinity(0)
    assert len(set.union(*bound)) == sum(map(len, bound))


@needs_numactl
async def test_memory_comes_from_where_it_is_asked_for(tmp_path: Path) -> None:
    """numactl(8) sets a policy, not a cpuset: the policy is what the kernel reports."""
    program = "print(open('/proc/self/numa_maps').readline().split()[1])"
    for policy, says in ((MemoryPolicy.INTERLEAVE, "interleave"), (MemoryPolicy.PREFERRED, "pref")):
        async with start_processes(
            "t",
            [*PYTHON, program],
            {0: ()},
            {0: {}},
            DefaultLogsSpecs(str(tmp_path), redirects=Std.ALL),
            numa_options=NumaOptions(AffinityMode.NODE, memory_policy=policy),
        ) as ctx:
            result = await ctx.wait()
        assert result is not None
        assert not result.is_failed(), result.failures
        assert Path(result.stdouts[0]).read_text().startswith(says)


# --- not possible ---------------------------------------------------------------------------------

REFUSES = "echo 'set_mempolicy: Operation not permitted' >&2; exit 1"


async def test_a_tool_that_fails_is_quoted_and_nothing_is_started(
    tools: Path, tmp_path: Path
) -> None:
    put(tools, "numactl", REFUSES)
    with pytest.raises(BindingError, match="failed: set_mempolicy: Operation not permitted"):
        await run(1, NumaOptions(AffinityMode.NODE), tmp_path / "logs")
    assert not (tmp_path / "logs").exists()


async def test_a_tool_that_fails_without_a_word(tools: Path, tmp_path: Path) -> None:
    put(tools, "numactl", "exit 3")
    with pytest.raises(BindingError, match=r"numactl .* failed: exit status 3"):
        await run(1, NumaOptions(AffinityMode.NODE), tmp_path)


async def test_a_tool_that_cannot_be_started(tools: Path, tmp_path: Path) -> None:
    (tools / "numactl").write_text("#!/nonexistent\n")
    (tools / "numactl").chmod(0o755)
    with pytest.raises(BindingError, match=r"failed: No such file or directory"):
        await run(1, NumaOptions(AffinityMode.NODE), tmp_path)


async def test_a_tool_that_leaves_somebody_with_its_pipe(tools: Path, tmp_path: Path) -> None:
    """Who holds the pipe open does not hold us up."""
    pid = tmp_path / "pid"
    put(tools, "numactl", f"/bin/sleep 1000 & echo $! > {pid}; exit 1")
    try:
        with pytest.raises(BindingError, match="failed: exit status 1"):
            await run(1, NumaOptions(AffinityMode.NODE), tmp_path)
    finally:
        os.kill(int(pid.read_text()), 9)


async def test_without_a_tool(tools: Path, tmp_path: Path) -> None:
    with pytest.raises(BindingError, match="numactl"):
        await run(1, NumaOptions(AffinityMode.NODE), tmp_path)
    with pytest.raises(BindingError, match="numactl"):
        planned(1, NumaOptions(AffinityMode.NODE))


@pytest.mark.parametrize("script", [REFUSES, None], ids=["fails", "missing"])
async def test_falling_back_runs_unbound_and_says_so(
    script: str | None, tools: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if script is not None:
        put(tools, "numactl", script)
    options = NumaOptions(AffinityMode.NODE, should_fall_back_if_binding_fails=True)
    result = await run(2, options, tmp_path)
    assert [set(cpus) for cpus, _ in told(result)] == [os.sched_getaffinity(0)] * 2
    [warning] = result.warnings
    assert warning.startswith("running unbound: ")
    assert ("Operation not permitted" in warning) is (script is not None)
    assert capfd.readouterr() == ("", "")


async def test_a_failure_keeps_the_warning(tools: Path) -> None:
    options = NumaOptions(AffinityMode.NODE, should_fall_back_if_binding_fails=True)
    ctx = await start_processes("t", "sh", {0: ("-c", "exit 3")}, {0: {}}, numa_options=options)
    assert len(ctx.plan.warnings) == 1
    result = await ctx.wait()
    assert result is not None
    assert result.is_failed()
    assert result.warnings == ctx.plan.warnings


def test_without_options_nothing_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        pytest.fail("the topology was read")

    monkeypatch.setattr("asupervise.topology.read_topology", forbidden)
    assert planned(1, None) == [("/bin/true",)]


def test_tools_are_found_on_the_given_path(tmp_path: Path) -> None:
    put(tmp_path, "taskset", "exit 0")
    (tmp_path / "numactl").write_text("not executable")
    found = find_tools({"PATH": f"/nowhere:{tmp_path}"})
    assert (found.numactl, found.taskset) == (None, str(tmp_path / "taskset"))
    assert find_tools({"PATH": ""}) == find_tools({"PATH": "/nowhere"})


def test_choosing_leaves_the_spec_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    env: Mapping[str, str] = {"PATH": "/nowhere"}
    spec = GroupSpec("t", "true", {0: ()}, {0: {}}, DefaultLogsSpecs(), warnings=("before",))
    options = NumaOptions(AffinityMode.NODE, should_fall_back_if_binding_fails=True)
    chosen = choose(spec, options, env)
    assert spec.warnings == ("before",)
    assert chosen.warnings[0] == "before"
    assert len(chosen.warnings) == 2
    assert chosen.bindings == ()
