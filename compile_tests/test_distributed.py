"""Data-parallel training steps on two CPU processes, compiled: what one process does with both halves of the batch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from layers import Layer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

WORLD = 2
STEPS = 2

pytestmark = pytest.mark.skipif(not dist.is_available() or sys.platform == "win32", reason="needs gloo")


def batches() -> Tensor:
    return torch.randn(STEPS, WORLD * 2, 6, 12, generator=torch.Generator().manual_seed(0))


def model() -> nn.Sequential:
    return nn.Sequential(Layer(), nn.Linear(12, 12), Layer())


def compiled(module: Any) -> Any:
    return torch.compile(module, fullgraph=True, backend="aot_eager")


def train(module: nn.Module, data: Tensor) -> nn.Module:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for x in data:
        module(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return module


def ddp(data: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(0)
    # Not as one graph: DDP cuts it at its buckets, to reduce one while it computes the next.
    module = train(torch.compile(DistributedDataParallel(model()), backend="aot_eager"), data)
    return {name.rsplit("module.", 1)[1]: p.detach() for name, p in module.named_parameters()}


def fsdp2(data: Tensor) -> dict[str, Tensor]:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    mesh, module = init_device_mesh("cpu", (WORLD,)), model()
    for i in (0, 2):
        module[i] = compiled(module[i])
        fully_shard(module[i], mesh=mesh)
    fully_shard(module, mesh=mesh)
    train(module, data)
    return {name.replace("_orig_mod.", ""): p.full_tensor().detach() for name, p in module.named_parameters()}


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    own = batches().chunk(WORLD, dim=1)[rank]
    torch.save({way.__name__: way(own) for way in (ddp, fsdp2)}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    mp.spawn(process, (str(tmp_path),), nprocs=WORLD)
    torch.manual_seed(0)
    before = {name: p.detach().clone() for name, p in model().named_parameters()}
    torch.manual_seed(0)
    expected = {name: p.detach() for name, p in train(model(), batches()).named_parameters()}
    for rank in range(WORLD):
        for actual in torch.load(tmp_path / f"{rank}.pt").values():
            torch.testing.assert_close(actual, expected)
    assert not any(torch.equal(p, before[name]) for name, p in expected.items())
