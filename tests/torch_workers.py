"""Functions with torch that tests run as workers; imported by them alone, for it takes seconds."""

from __future__ import annotations

import os
from typing import Any

import torch


def arange(size: int) -> Any:
    return torch.arange(size, dtype=torch.float32)


def use(tensor: Any, part: Any, model: Any) -> tuple[float, Any, Any]:
    return tensor.sum().item(), part, model(tensor).detach()


def about() -> tuple[int, float]:
    """By all threads that it has: those of the zygote are not there after a fork."""
    return os.getpid(), torch.ones(1000, 1000).sum().item()


def train(steps: int) -> dict[str, Any]:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo")
    try:
        rank = dist.get_rank()
        torch.manual_seed(rank)
        model = DistributedDataParallel(torch.nn.Linear(8, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        inputs = torch.randn(64, 8)
        losses = []
        for _ in range(steps):
            loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total = loss.detach().clone()
            dist.all_reduce(total)
            losses.append(total.item())
        # See examples/ddp_text.py: gloo's threads let go of the last tensors meanwhile.
        dist.barrier()
        return {"weights": model.module.weight.detach().clone(), "losses": losses}
    finally:
        dist.destroy_process_group()
