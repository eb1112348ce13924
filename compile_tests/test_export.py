"""``torch.export``: programs with dynamic sizes are saved, loaded, and run with others."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from layers import Decoder, Layer, kda_nodes
from torch import nn
from torch.export import Dim, ExportedProgram


def round_trip(program: ExportedProgram) -> nn.Module:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return torch.export.load(buffer).module()


CASES: dict[str, tuple[Any, Any, Any]] = {  # example sizes, dynamic dimensions, further sizes
    "dense": (
        [(3, 37)],
        ({0: Dim("B", min=2), 1: Dim("T", min=2)},),
        ([(2, 70)], [(8, 2)]),
    ),
    "packed": (
        [(1, 37), [0, 5, 11, 30]],
        ({1: Dim("T", min=2)}, {0: Dim("entries", min=3)}),
        ([(1, 70), [0, 3, 70]], [(1, 9), [0, 1, 1, 1, 4, 6]]),
    ),
}


def layer_inputs(sizes: Any) -> tuple[torch.Tensor, ...]:
    """Tokens of a shape, then perhaps the bounds of their sequences."""
    shape, *bounds = sizes
    return (torch.randn(*shape, 12), *(torch.tensor(b) for b in bounds))


@pytest.mark.parametrize("case", CASES)
def test_a_layer_is_exported_with_dynamic_sizes(case: str) -> None:
    example, dynamic, others = CASES[case]
    layer = Layer().requires_grad_(False)
    program = torch.export.export(layer, layer_inputs(example), dynamic_shapes=dynamic)
    assert kda_nodes(program.graph_module) == {"chunk_kda": 1}
    module = round_trip(program)
    for sizes in (example, *others):
        given = layer_inputs(sizes)
        assert torch.equal(module(*given), layer(*given))


def test_decoding_is_exported_with_its_pool_as_a_buffer() -> None:
    decoder = Decoder().requires_grad_(False)
    N = Dim("N", min=2, max=9)
    example = (torch.randn(3, 1, 12), torch.tensor([5, 0, 2]))
    program = torch.export.export(copy.deepcopy(decoder), example, dynamic_shapes=[{0: N}, {0: N}])
    module = round_trip(program)
    for slots in ([5, 0, 2], [1, -1, 5, 0, 7], [5, 7]):
        x, indices = torch.randn(len(slots), 1, 12), torch.tensor(slots)
        assert torch.equal(module(x, indices), decoder(x, indices))
        assert torch.equal(dict(module.named_buffers())["state_pool"], decoder.state_pool)
    assert decoder.state_pool[7].any()


IN_A_FRESH_PROCESS = """
import sys
import torch
import flashkda_ops  # registers the ops, and is all that the process knows of the model

package, data = sys.argv[1:]
model = torch._inductor.aoti_load_package(package)
torch.save([model(*inputs) for inputs in torch.load(data)], data)
"""


def test_an_aot_inductor_package_runs_in_a_process_that_imports_only_the_ops(tmp_path: Path) -> None:
    example, dynamic, others = CASES["packed"]
    layer = Layer().requires_grad_(False)
    program = torch.export.export(layer, layer_inputs(example), dynamic_shapes=dynamic)
    package, data = tmp_path / "layer.pt2", tmp_path / "data.pt"
    quick = {"aot_inductor.compile_wrapper_opt_level": "O0"}  # for g++, which takes most of this test's time
    torch._inductor.aoti_compile_and_package(program, package_path=str(package), inductor_configs=quick)
    inputs = [layer_inputs(sizes) for sizes in (example, *others)]
    torch.save(inputs, data)
    subprocess.run([sys.executable, "-c", IN_A_FRESH_PROCESS, package, data], check=True, timeout=300)
    for actual, given in zip(torch.load(data), inputs, strict=True):
        torch.testing.assert_close(actual, layer(*given))
