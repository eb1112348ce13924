"""Every test starts with nothing compiled."""

from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)  # small cases, and the workers of pytest-xdist share the cores


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
