"""GPU tests skip, with their reason, where there is none. How many cases hypothesis draws, and which."""

from contextlib import suppress

import pytest
import torch

from flashkda_ops import cuda

if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):  # what flashkda_ops.distributed builds on
    collect_ignore = [
        f"test_{name}.py" for name in ("context_parallel", "sharding", "tensor_parallel", "train_distributed")
    ]

with suppress(ImportError):  # tests that draw cases say themselves that it is missing
    from hypothesis import HealthCheck, Phase, settings

    _drawn = {"deadline": None, "suppress_health_check": list(HealthCheck), "phases": set(Phase) - {Phase.explain}}
    settings.register_profile("quick", max_examples=15, derandomize=True, database=None, **_drawn)
    settings.register_profile("fuzz", max_examples=200, print_blob=True, **_drawn)  # of each test; `make fuzz`
    settings.register_profile("fuzz-gpu", max_examples=50, print_blob=True, **_drawn)
    settings.load_profile("quick")

torch.set_num_threads(1)  # small cases, and the workers of pytest-xdist share the cores


def _no_gpu_reason() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device here"
    return cuda.device_reason(torch.device("cuda", 0))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _no_gpu_reason()
    for item in items:
        if reason is not None and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))
