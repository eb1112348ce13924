"""Ranks to test on: processes that stay, and run functions of the tests together."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

TIMEOUT = datetime.timedelta(seconds=30)

# A process that has imported torch forks each rank: importing it again in each takes longer than the tests do.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch.distributed.tensor", "torch._dynamo", "flashkda_ops.distributed"])


def _serve(rank: int, size: int, backend: str, store: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, f"file://{store}", rank=rank, world_size=size, timeout=TIMEOUT)
    while True:
        try:
            function, args, kwargs = connection.recv()
        except EOFError:
            os._exit(0)  # the tests are over
        try:
            connection.send((function(*args, **kwargs), None))
        except BaseException:
            connection.send((None, traceback.format_exc()))


class World:
    """``size`` ranks in a group of the backend; with NCCL each has a GPU."""

    def __init__(self, size: int, backend: str = "gloo") -> None:
        self.size = size
        self.folder = tempfile.TemporaryDirectory()
        store = str(Path(self.folder.name) / "store")
        self.connections: list[Connection] = []
        self.processes = []
        for rank in range(size):
            here, there = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_serve, args=(rank, size, backend, store, there), daemon=True)
            process.start()
            there.close()
            self.connections.append(here)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, lost: int | None = None, **kwargs: Any) -> list[Any]:
        """What the function returns on each rank. It is one that other processes can import; it ends rank ``lost``."""
        for connection in self.connections:
            connection.send((function, args, kwargs))
        results, errors = [], []
        for rank, connection in enumerate(self.connections):
            if not connection.poll(60):
                pytest.fail(f"rank {rank} of {self.size} does not answer")
            try:
                result, error = connection.recv()
            except EOFError:
                result, error = None, "the process ended"
            results.append(result)
            if error is not None and rank != lost:
                errors.append(f"rank {rank} of {self.size}:\n{error}")
        if errors:
            pytest.fail("\n".join(errors), pytrace=False)
        return results

    def close(self) -> None:
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(5)
            process.kill()
        self.folder.cleanup()
