"""A GPU of which another kernel holds all multiprocessors but a few, for tests of what calls wait for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

SOURCE = r"""
extern "C" __global__ void __launch_bounds__(1024) hold(volatile int* released, volatile int* held, int seconds) {
  // One thread polls, since memory is the host's: a thousand of each multiprocessor would leave others no bandwidth.
  if (threadIdx.x == 0) {
    held[blockIdx.x] = 1;
    unsigned long long begin, now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin));
    do {
      __nanosleep(100000);
      asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    } while (*released == 0 && now - begin < seconds * 1000000000ull);
  }
  __syncthreads();
}
"""
SHARED_BYTES = 160 * 1024  # no block of a kernel that needs a multiprocessor's shared memory fits beside it
MOST_SECONDS = 10  # it releases them by itself, so that a call that waits for it fails its test and nothing else


class Occupant:
    """Holds multiprocessors from :meth:`hold` to :meth:`release`."""

    def __init__(self) -> None:
        compile_kernel = getattr(torch.cuda, "_compile_kernel", None)
        if compile_kernel is None:
            pytest.skip("this torch compiles no CUDA source, which the occupying kernel is")
        self.kernel = compile_kernel(SOURCE, "hold")
        self.kernel.set_shared_memory_config(SHARED_BYTES)
        self.count = torch.cuda.get_device_properties(0).multi_processor_count
        self.released = torch.zeros(1, dtype=torch.int32).pin_memory()
        self.held = torch.zeros(self.count, dtype=torch.int32).pin_memory()
        self.stream = torch.cuda.Stream(priority=-1)
        self.hold(1)  # loads its code, for which the device must be idle
        self.release()

    def hold(self, multiprocessors: int) -> None:
        torch.cuda.synchronize()
        self.released.zero_()
        self.held.zero_()
        arguments = [self.released, self.held, MOST_SECONDS]
        with torch.cuda.stream(self.stream):
            self.kernel(
                (multiprocessors, 1, 1), (1024, 1, 1), arguments, shared_mem=SHARED_BYTES, stream=self.stream
            )  # fmt: skip
        assert wait_until(lambda: int(self.held.sum()) == multiprocessors, 5), "the occupying kernel did not begin"

    def release(self) -> None:
        self.released.fill_(1)
        torch.cuda.synchronize()

    def beside(self, function: Callable[[], Any], free: int, seconds: float = 5) -> tuple[bool, Any]:
        """Whether what ``function`` launches ends while all multiprocessors but ``free`` are held; its result."""
        stream, done = torch.cuda.Stream(), torch.cuda.Event()
        with torch.cuda.stream(stream):
            function()  # the code of its kernels is loaded, and there is memory
        self.hold(self.count - free)
        with torch.cuda.stream(stream):
            result = function()
            done.record()
        ended = wait_until(done.query, seconds)
        self.release()
        return ended, result


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.001)
    return True
