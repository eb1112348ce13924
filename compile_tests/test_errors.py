"""Bad input under ``torch.compile``: the text of eager, inside torch's own error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Call, make_call, paged

import flashkda_ops


def bad_calls() -> dict[str, tuple[str, Call]]:
    call = make_call(5, B=3, initial_state=True)
    decode = paged(make_call(1, B=3), torch.zeros(7, 4, 16, 8), torch.tensor([5, 0, 2]))
    return {
        "k of another shape": ("chunk_kda", call | {"k": torch.zeros(3, 5, 2, 17)}),
        "v of another dtype": ("chunk_kda", call | {"v": call["v"].half()}),
        "too few states": ("chunk_kda", call | {"initial_state": call["initial_state"][:2]}),
        "heads that are no multiple": (
            "chunk_kda", call | {name: call[name][:, :, :3] for name in ("v", "g", "beta")},
        ),
        "a bound out of range": ("chunk_kda", call | {"lower_bound": -6.0}),
        "float cu_seqlens": ("chunk_kda", call | {"cu_seqlens": torch.zeros(4)}),
        "another device": ("chunk_kda", call | {"beta": call["beta"].to("meta")}),
        "a transposed pool": ("recurrent_kda_paged", decode | {"state_pool": torch.zeros(7, 4, 8, 16).mT}),
        "too many slots": ("recurrent_kda_paged", decode | {"state_indices": torch.zeros(4, dtype=torch.int64)}),
        "a flag of another dtype": ("chunk_kda_paged", decode | {"has_initial_state": torch.ones(3)}),
        "a decode call's k": ("recurrent_kda", call | {"k": torch.zeros(3, 5, 2, 17)}),
    }  # fmt: skip


@pytest.mark.parametrize("case", bad_calls())
def test_the_text_of_eager_is_inside_the_error_of_compile(case: str) -> None:
    name, call = bad_calls()[case]

    def function(call: Call) -> Any:
        return getattr(flashkda_ops, name)(**call)

    with pytest.raises(ValueError) as eager:
        function(call)
    with pytest.raises(Exception) as caught:
        torch.compile(function, fullgraph=True, backend="eager", dynamic=False)(call)
    assert str(eager.value) in str(caught.value)


@pytest.mark.parametrize("change", [{"cu_seqlens": [0, 5]}, {"initial_state": [0.0]}, {"q": None}, {"v": 1.0}], ids=str)
def test_a_recurrent_call_names_what_is_no_tensor_under_compile(change: Call) -> None:
    call = make_call(5, initial_state=True) | change
    with pytest.raises(ValueError) as eager:
        flashkda_ops.recurrent_kda(**call)
    with pytest.raises(Exception) as caught:
        torch.compile(lambda call: flashkda_ops.recurrent_kda(**call), fullgraph=True, backend="eager")(call)
    assert str(eager.value) in str(caught.value)


@pytest.mark.parametrize("function", [flashkda_ops.chunk_kda, flashkda_ops.recurrent_kda], ids=["chunk", "recurrent"])
@pytest.mark.parametrize("argument", ["cu_seqlens", "beta", "scale", "use_gate_in_kernel"])
def test_an_argument_of_another_type_is_named_under_compile(function: Any, argument: str) -> None:
    call = make_call(5) | {argument: "text"}
    with pytest.raises(Exception, match=argument):
        torch.compile(lambda call: function(**call), fullgraph=True, backend="eager")(call)


def test_a_recurrent_call_names_its_initial_state_under_compile() -> None:
    call = make_call(5, B=3, initial_state=True)
    call["initial_state"] = call["initial_state"][:2]
    with pytest.raises(Exception, match="initial_state must have one row a sequence"):
        torch.compile(lambda call: flashkda_ops.recurrent_kda(**call), fullgraph=True, backend="eager")(call)
