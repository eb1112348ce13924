"""The demo's train step in a CUDA graph."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from itertools import islice
from unittest import mock

import pytest
import torch
from kda_lm import Config, KdaLM
from torch import Tensor

pytest.importorskip("matplotlib", reason="the example's plots")

from train_and_generate import CapturedStep, Moments, Plan, make_train_step, packed


def test_a_captured_step_keeps_alive_what_its_graph_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", mock.Mock)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: nullcontext())
    model = KdaLM(Config(hidden_size=16, num_layers=1, num_heads=1, head_dim=8, sequences=1))
    step = make_train_step(model, Moments.of(model), lambda function: function)
    model, parameter = None, weakref.ref(model.embeddings.weight)
    batch = torch.tensor([[1, 2]]), torch.tensor([[2, 3]]), torch.tensor([0, 2])
    step = CapturedStep(step, *batch, torch.tensor(0.1), torch.tensor(1.0))
    gc.collect()
    assert parameter() is not None


@pytest.mark.gpu
def test_a_captured_step_has_the_losses_of_an_eager_one() -> None:
    config = Config(hidden_size=128, num_layers=2, num_heads=2, head_dim=128, sequences=4, dtype=torch.bfloat16)
    plan = Plan(config, 512, 8, 30, 2e-3, 1)
    files = [bytes(range(256)) * 8, b"the same words again and again, " * 40]
    batches = list(islice(packed(files, plan, torch.device("cuda"), seed=0), plan.steps))

    def losses(capture: bool) -> list[Tensor]:
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = KdaLM(config)
            step = make_train_step(model, Moments.of(model), lambda function: function)
        found = []
        for i, batch in enumerate(batches):
            inputs = (*batch, *torch.tensor([plan.lr, i + 1.0], device="cuda").unbind())
            found.append(step(*inputs))
            if i == 0 and capture:
                step = CapturedStep(step, *inputs)
        return found

    # Not bit by bit: torch's gradient of an embedding may differ in its last bit from run to run.
    eager, captured = (torch.stack(losses(capture)) for capture in (False, True))
    assert eager[-1] < eager[0] - 0.5
    torch.testing.assert_close(captured, eager, rtol=0, atol=1e-4)
