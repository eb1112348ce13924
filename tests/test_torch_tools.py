"""Profiler, deterministic mode, copies and pickles."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers import Call, kernel_call, make_call, paged, requiring_grad
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from flashkda_ops import chunk_kda, chunk_kda_paged, recurrent_kda_paged

BACKWARD = "flashkda::chunk_kda_backward"


def call_on(device: str, T: int) -> Call:
    """A call of two sequences; on a GPU one that the kernels serve."""
    return make_call(T, B=2, initial_state=True) if device == "cpu" else kernel_call(T, B=2)


def train(device: str = "cpu") -> list[Tensor]:
    call = requiring_grad(call_on(device, 70))
    o, state = chunk_kda(**call, output_final_state=True)
    (o.square().sum() + state.sum()).backward()
    return [o.detach(), state.detach(), *(x.grad for x in call.values() if isinstance(x, Tensor))]


def serve(device: str = "cpu") -> list[Tensor]:
    prompt, token = call_on(device, 20), call_on(device, 1)
    pool = torch.ones(5, 4, prompt["q"].shape[-1], prompt["v"].shape[-1], device=device)
    rows = torch.tensor([3, 1], device=device)
    o = chunk_kda_paged(**paged(prompt, pool, rows))
    return [o, recurrent_kda_paged(**paged(token, pool, rows)), pool]


OPS = {
    train: {"flashkda::chunk_kda", BACKWARD},
    serve: {"flashkda::chunk_kda_paged", "flashkda::recurrent_kda_paged"},
}


@pytest.mark.parametrize("function", OPS)
def test_the_profiler_shows_the_ops_by_name_with_their_shapes(function: Callable[[], object]) -> None:
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        function()
    events = [event for event in profiler.events() if event.name.startswith("flashkda::")]
    assert {event.name for event in events} == OPS[function]
    for event in events:
        q = event.input_shapes[2 if event.name == BACKWARD else 0]
        assert q[0] == 2 and q[2:] == [2, 16]


@pytest.mark.gpu
def test_the_ops_run_under_emit_nvtx() -> None:
    # What a range is called cannot be read back here: emit_nvtx names the events that the profiler shows above.
    expected = train("cuda")
    with torch.autograd.profiler.emit_nvtx(record_shapes=True):
        actual = train("cuda")
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # also fills what torch.empty returns with NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("function", [train, serve])
def test_deterministic_mode_runs_every_op_and_gives_the_same_bits(
    function: Callable[[str], list[Tensor]], device: str, deterministic: None
) -> None:
    first, second = function(device), function(device)
    for x, y in zip(first, second, strict=True):
        assert torch.isfinite(x).all()
        assert torch.equal(x, y)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.A_log, self.dt_bias = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4, 16))
        self.kda = chunk_kda  # as an attribute: it is copied and pickled too

    def forward(self, **call: Tensor) -> Tensor:
        return self.kda(**call | {"A_log": self.A_log, "dt_bias": self.dt_bias})[0]


def saved(layer: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), saved],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_module_is_copied_and_pickled_before_and_after_a_step(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    layer, call = Layer(), make_call(9, B=2)
    for _ in range(2):
        twin = duplicate(layer)
        assert twin.A_log is not layer.A_log
        assert torch.equal(twin(**call), layer(**call))
        layer(**call).square().sum().backward()
        with torch.no_grad():
            layer.A_log -= 0.1 * layer.A_log.grad
        assert not torch.equal(twin(**call), layer(**call))
