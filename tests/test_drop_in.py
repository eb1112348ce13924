"""Changing the import is all that a user of flash-linear-attention 0.6.0 changes."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from helpers import make_call

from flashkda_ops import chunk_kda, recurrent_kda

FLA_KDA = "fla.ops.kda"
# What chunk_kda of fla takes as further keywords.
FURTHER = {"A_log", "dt_bias", "chunk_size", "transpose_state_layout"}


@pytest.mark.parametrize(
    ("ours", "theirs", "further"),
    [(chunk_kda, "chunk_kda", FURTHER), (recurrent_kda, "fused_recurrent_kda", {"transpose_state_layout"})],
)
def test_every_keyword_is_accepted_in_the_same_place_with_the_same_default(
    ours: Any, theirs: str, further: set[str]
) -> None:
    expected = inspect.signature(getattr(pytest.importorskip(FLA_KDA), theirs)).parameters.values()
    parameters = inspect.signature(ours).parameters
    named = [p for p in expected if p.kind is not p.VAR_KEYWORD]
    positional = [p for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [(p.name, p.default) for p in positional] == [(p.name, p.default) for p in named]
    assert further <= parameters.keys()


@pytest.mark.parametrize(
    "ignored",
    [
        {"use_graph": True},
        {"max_num_seqs": 8},
        {"disable_recompute": True},
        {"cu_seqlens_cpu": torch.tensor([0, 3, 40])},
        {"safe_gate": True},
        {"chunk_size": 32},
    ],
    ids=str,
)
def test_what_needs_nothing_changes_nothing(ignored: dict[str, Any]) -> None:
    call = make_call(40, cu_seqlens=[0, 3, 40])
    for actual, expected in zip(
        chunk_kda(**call, output_final_state=True, **ignored), chunk_kda(**call, output_final_state=True), strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("function", [chunk_kda, recurrent_kda])
@pytest.mark.parametrize("value", [True, False])
def test_the_old_name_of_the_state_layout_works_with_a_warning(function: Any, value: bool) -> None:
    call = make_call(5)
    with pytest.warns(DeprecationWarning, match="use state_v_first"):
        _, state = function(**call, output_final_state=True, transpose_state_layout=value)
    assert torch.equal(state, function(**call, output_final_state=True, state_v_first=value)[1])
