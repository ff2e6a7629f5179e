"""Functions that use torch, as workers: fresh interpreters, and forks of a zygote that has it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs torch: `make test-torch` installs it")

from asupervise import Zygote, rank_environments, start_processes  # noqa: E402
from tests import torch_workers as workers  # noqa: E402

# A fresh interpreter imports torch for seconds on two shared cores.
pytestmark = [pytest.mark.torch, pytest.mark.timeout(300)]

METHODS = ("spawn", "forkserver")


@pytest.fixture(autouse=True)
def _own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))


async def values_of(
    function: Any, *args: tuple[Any, ...], method: Any = "spawn", **options: Any
) -> list[Any]:
    """What the ranks return."""
    by_rank = dict(enumerate(args))
    envs = options.pop("envs", {rank: {} for rank in by_rank})
    group = start_processes("t", function, by_rank, envs, start_method=method, **options)
    async with group as ctx:
        result = await ctx.wait()
    assert result is not None
    result.raise_for_failure("t")
    assert result.warnings == ()
    return list(result.return_values.values())


@pytest.mark.parametrize("method", METHODS)
async def test_tensors_come_back(method: str) -> None:
    big, small = await values_of(workers.arange, (4_000_000,), (3,), method=method)
    assert torch.equal(big, torch.arange(4_000_000, dtype=torch.float32))
    assert small.tolist() == [0, 1, 2]


@pytest.mark.parametrize("method", METHODS)
async def test_tensors_as_arguments(method: str) -> None:
    """Also two that share their memory, and a model."""
    tensor = torch.arange(12.0).reshape(3, 4)
    model = torch.nn.Linear(4, 2)
    [(total, first, out)] = await values_of(workers.use, (tensor, tensor[0], model), method=method)
    assert total == 66
    assert first.tolist() == [0, 1, 2, 3]
    assert torch.allclose(out, model(tensor))


async def test_eight_workers_of_a_zygote_that_has_torch() -> None:
    async with Zygote(["torch"]) as zygote:
        for _ in range(2):
            seen = await values_of(workers.about, *([()] * 8), method=zygote)
            assert len({pid for pid, _ in seen}) == 8
            assert {total for _, total in seen} == {1000.0 * 1000}
    seen = await values_of(workers.about, (), (), method="forkserver", preload=["torch"])
    assert {total for _, total in seen} == {1000.0 * 1000}


@pytest.mark.parametrize("method", METHODS)
async def test_data_parallel_training(method: str) -> None:
    """Two ranks by gloo, which start with other weights and end with the same."""
    envs = rank_environments(2, parent_env=os.environ)
    for env in envs.values():
        env["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    preload = ["torch", "torch.distributed"] if method == "forkserver" else []
    one, other = await values_of(
        workers.train, (10,), (10,), method=method, envs=envs, preload=preload
    )
    assert torch.equal(one["weights"], other["weights"])
    assert one["losses"][-1] < one["losses"][0]


SCRIPT = """
import asyncio
import torch
import asupervise

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(3.0))
    def forward(self, x):
        return self.scale * x

def apply(x):
    return Model(), Model()(x).detach()

async def main(**how):
    group = asupervise.start_processes("t", apply, {0: (torch.ones(2),)}, {0: {}}, **how)
    async with group as ctx:
        result = await ctx.wait()
    result.raise_for_failure("t")
    model, y = result.return_values[0]
    print(type(model) is Model, y.tolist())

if __name__ == "__main__":
    asyncio.run(main())
    asyncio.run(main(start_method="forkserver", preload=["torch"]))
"""


def test_a_script_with_a_model_of_its_own(run_cli: Any, tmp_path: Path) -> None:
    """torch imports multiprocessing, which gives the name __mp_main__ away in the zygote."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = run_cli(script, command=(sys.executable,), timeout=120)
    assert done.stdout.decode() == "True [3.0, 3.0]\n" * 2
    assert done.returncode == 0
