# %% [markdown]
# Functions as ranked workers, as in a notebook: each `# %%` begins a cell (Jupyter, VS Code and
# Spyder run this file cell by cell). In a notebook `await` stands by itself, and functions that
# were defined in a cell travel by value, which needs cloudpickle
# (`pip install 'asupervise[functions]'`). As a script it runs as well:
#
#     python examples/notebook.py

# %%
import asyncio
import os

import asupervise

RANKS = 4


# %% [markdown]
# A worker is a plain function. It learns who it is from its environment, as under `torchrun`, and
# what it returns comes back as a Python object.


# %%
def estimate_pi(samples: int) -> dict[str, int]:
    """Throw darts; every rank with numbers of its own."""
    import random

    rank = int(os.environ["RANK"])
    rng = random.Random(rank)
    hits = sum(rng.random() ** 2 + rng.random() ** 2 < 1 for _ in range(samples))
    print(f"rank {rank} of {os.environ['WORLD_SIZE']}: {hits:,} of {samples:,} inside")
    return {"rank": rank, "hits": hits, "samples": samples}


# %% [markdown]
# `start_processes` takes the arguments and the environment of each rank. The zygote forks them:
# what it has imported is there at once, in this group and in the next.


# %%
async def estimate(zygote: asupervise.Zygote, samples: int) -> float:
    ctx = await asupervise.start_processes(
        "darts",
        estimate_pi,
        args={rank: (samples,) for rank in range(RANKS)},
        envs=asupervise.rank_environments(RANKS, parent_env=os.environ),
        logs_specs=asupervise.DefaultLogsSpecs(tee=asupervise.Std.ALL),
        start_method=zygote,
    )
    result = await ctx.wait()
    result.raise_for_failure("darts")
    counted = result.return_values.values()
    hits, darts = (sum(one[key] for one in counted) for key in ("hits", "samples"))
    return float(4 * hits / darts)


# %% [markdown]
# In a notebook, the next cell is these lines without `async def` and `asyncio.run`:
#
#     zygote = asupervise.Zygote(preload=["random"])
#     await zygote.start()
#     await estimate(zygote, 100_000)


# %%
async def main() -> None:
    async with asupervise.Zygote(preload=["random"]) as zygote:
        for samples in (1_000, 100_000):
            print(f"pi is about {await estimate(zygote, samples):.3f}")


if __name__ == "__main__":
    asyncio.run(main())
