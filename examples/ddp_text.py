"""Train a small character model on Python's own sources, with DistributedDataParallel over gloo.

The same file runs under asupervise and under torchrun, and gives the same loss::

    python -m asupervise --nproc-per-node 2 examples/ddp_text.py
    torchrun --nproc-per-node 2 examples/ddp_text.py

With ``--checkpoint FILE`` it goes on from where it was, after a restart and with another number of
ranks too; ``--curve FILE`` keeps a record of each step over all of that.

It needs torch, and no GPU.
"""

import argparse
import inspect
import json
import os
import textwrap
import typing
from typing import Any

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


class Training:
    """A model on its way: what a checkpoint holds, and what is written of the course.

    Attributes:
        step: how many steps have been made.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        text = read_text()
        self._text, self._held_out = text[:-HELD_OUT], text[-HELD_OUT:]
        torch.manual_seed(options.seed)
        self._model = CharModel()
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=2e-3)
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            self._optimizer, T_max=options.steps
        )
        self.step = 0
        self._options = options
        self._resume()
        # From here on all ranks have what rank 0 has.
        self._ranks = DistributedDataParallel(self._model)

    def run(self) -> float:
        """Train to the last step; the loss at the end, which is the same in every rank."""
        every = self._options.checkpoint_every
        while self.step < self._options.steps:
            if self.step % STEPS_A_REPORT == 0:
                report(self.step, self.loss())
            self._record("step", self._make_step())
            if self.step % every == 0 and self._options.checkpoint:
                self._save()
        loss = self.loss()
        report(self.step, loss)
        difference = largest_difference(self._model)
        if difference != 0.0:
            raise RuntimeError(f"the ranks' parameters differ by up to {difference}")
        return loss

    def loss(self) -> float:
        """On what is held out."""
        loss: float = held_out_loss(self._model, self._held_out)
        return loss

    def _make_step(self) -> float:
        # By step and rank, so that a run which was interrupted draws what one that was not does.
        seed = (self._options.seed * 1_000_003 + self.step) * 1009 + dist.get_rank()
        sampler = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(self._text) - CONTEXT, (BATCH_A_RANK,), generator=sampler)
        contexts, targets = examples_at(self._text, starts)
        self._optimizer.zero_grad()
        loss = functional.cross_entropy(self._ranks(contexts), targets)
        loss.backward()
        self._optimizer.step()
        self._schedule.step()
        self.step += 1
        value: float = loss.item()
        return value

    def _save(self) -> None:
        loss = self.loss()
        if dist.get_rank() == 0:
            path = self._options.checkpoint
            state = {
                "step": self.step,
                "loss": loss,
                "model": self._model.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "schedule": self._schedule.state_dict(),
            }
            # Either the former or this one is there, whenever we are killed.
            torch.save(state, f"{path}.new")
            os.replace(f"{path}.new", path)
            self._record("checkpoint", loss)
            report(self.step, loss, "  saved")

    def _resume(self) -> None:
        path = self._options.checkpoint
        # Rank 0 says whether there is one: it may be the only one to see it in time.
        state = [torch.load(path) if path and dist.get_rank() == 0 and os.path.exists(path) else {}]
        dist.broadcast_object_list(state, src=0)
        if not state[0]:
            return
        self.step = state[0]["step"]
        self._model.load_state_dict(state[0]["model"])
        self._optimizer.load_state_dict(state[0]["optimizer"])
        self._schedule.load_state_dict(state[0]["schedule"])
        loss, saved = self.loss(), state[0]["loss"]
        self._record("resume", loss, saved=saved)
        report(self.step, loss, "  resumed")

    def _record(self, event: str, loss: float, **more: Any) -> None:
        """A line of JSON."""
        if self._options.curve and dist.get_rank() == 0:
            line = {"event": event, "step": self.step, "loss": loss, "ranks": dist.get_world_size()}
            with open(self._options.curve, "a", encoding="utf-8") as file:
                file.write(json.dumps(line | more) + "\n")


def report(step: int, loss: float, more: str = "") -> None:
    if dist.get_rank() == 0:
        print(f"step {step:>4}  loss {loss:.4f}  ranks {dist.get_world_size()}{more}", flush=True)


@record
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=7)
    # Fixed, because launchers differ in OMP_NUM_THREADS and the number of threads decides in
    # which order a sum is taken, and so its last digits.
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpoint", metavar="FILE", help="saved there, and gone on from")
    parser.add_argument("--checkpoint-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--curve", metavar="FILE", help="gets a line of JSON for each step")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dist.init_process_group("gloo")
    try:
        loss = Training(options).run()
        # All digits: whoever compares two runs wants to see whether they are equal.
        print(f"rank {dist.get_rank()} final loss {loss!r}")
        # Gloo's threads let go of the last tensors meanwhile. One that does so when the interpreter
        # is ending, and cannot have the GIL any more, aborts the process (pytorch/pytorch#179291).
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
