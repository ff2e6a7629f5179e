"""Train a small character model on Python's own sources, with DistributedDataParallel over gloo.

The same file runs under asupervise and under torchrun, and gives the same loss::

    python -m asupervise --nproc-per-node 2 examples/ddp_text.py
    torchrun --nproc-per-node 2 examples/ddp_text.py

It needs torch, and no GPU.
"""

import argparse
import inspect
import json
import textwrap
import typing

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

try:
    from asupervise import record
except ImportError:  # under torchrun alone
    from torch.distributed.elastic.multiprocessing.errors import record  # type: ignore[no-redef]

# ASCII; what lies outside of it becomes the character 0.
ALPHABET = 128
CONTEXT = 32
BATCH_A_RANK = 256
HELD_OUT = 16_384
STEPS_A_REPORT = 100
SOURCES = (argparse, inspect, json, textwrap, typing)


class CharModel(nn.Module):
    """Predicts a character from the `CONTEXT` characters before it."""

    def __init__(self, embedding: int = 24, hidden: int = 384) -> None:
        super().__init__()
        self.embed = nn.Embedding(ALPHABET, embedding)
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(CONTEXT * embedding, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, ALPHABET),
        )

    def forward(self, contexts: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.layers(self.embed(contexts))
        return logits


def read_text() -> torch.Tensor:
    """The sources of some modules of the standard library, a number for each character."""
    text = "".join(inspect.getsource(module) for module in SOURCES)
    return torch.tensor([code if (code := ord(char)) < ALPHABET else 0 for char in text])


def examples_at(text: torch.Tensor, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The contexts that begin at `starts`, and the character that follows each."""
    windows = text[starts[:, None] + torch.arange(CONTEXT + 1)]
    return windows[:, :-1], windows[:, -1]


def mean_over_ranks(value: torch.Tensor) -> float:
    total = value.detach().clone()
    dist.all_reduce(total)
    mean: float = total.item() / dist.get_world_size()
    return mean


@torch.no_grad()
def held_out_loss(model: nn.Module, text: torch.Tensor) -> float:
    """The loss on text that was not trained on, each rank its share, the mean of all."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    starts = torch.arange(rank, len(text) - CONTEXT, ranks)
    contexts, targets = examples_at(text, starts)
    return mean_over_ranks(functional.cross_entropy(model(contexts), targets))


@torch.no_grad()
def largest_difference(model: nn.Module) -> float:
    """How far any parameter of any rank is from rank 0's: 0.0, or the training is broken."""
    mine = nn.utils.parameters_to_vector(model.parameters())
    first = mine.clone()
    dist.broadcast(first, src=0)
    difference = (mine - first).abs().max()
    dist.all_reduce(difference, op=dist.ReduceOp.MAX)
    return float(difference)


def train(steps: int, seed: int) -> float:
    """Train for `steps` steps; the loss at the end, which is the same in every rank."""
    text = read_text()
    training, held_out = text[:-HELD_OUT], text[-HELD_OUT:]
    torch.manual_seed(seed)
    model = DistributedDataParallel(CharModel())
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    sampler = torch.Generator().manual_seed(seed * 1000 + dist.get_rank())
    for step in range(steps):
        if step % STEPS_A_REPORT == 0:
            report(step, held_out_loss(model, held_out))
        starts = torch.randint(len(training) - CONTEXT, (BATCH_A_RANK,), generator=sampler)
        contexts, targets = examples_at(training, starts)
        optimizer.zero_grad()
        functional.cross_entropy(model(contexts), targets).backward()
        optimizer.step()
        schedule.step()
    loss: float = held_out_loss(model, held_out)
    report(steps, loss)
    difference = largest_difference(model)
    if difference != 0.0:
        raise RuntimeError(f"the ranks' parameters differ by up to {difference}")
    return loss


def report(step: int, loss: float) -> None:
    if dist.get_rank() == 0:
        print(f"step {step:>4}  loss {loss:.4f}")


@record
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=7)
    # Fixed, because launchers differ in OMP_NUM_THREADS and the number of threads decides in
    # which order a sum is taken, and so its last digits.
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dist.init_process_group("gloo")
    try:
        loss = train(options.steps, options.seed)
        # All digits: whoever compares two runs wants to see whether they are equal.
        print(f"rank {dist.get_rank()} final loss {loss!r}")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
