"""The process group that a trial trains in: the one that its caller made, or one of this process alone."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Worker:
    """This process among the workers of a trial."""

    rank: int
    workers: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """True for the one that writes to storage."""
        return self.rank == 0


def ensure_process_group() -> None:
    """Joins the group that torchrun's environment describes, or makes one of a single process, unless there is one already."""
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks the environment, not the process group
    if dist.is_initialized():
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def this_worker() -> Worker:
    """Rank, group size and device of this process; makes its GPU, if it has one, the current one."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return Worker(dist.get_rank(), dist.get_world_size(), device)
