"""torch's FLOP counter counts the products of the recurrence, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from helpers import make_call, paged, requiring_grad
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from flashkda_ops import chunk_kda, chunk_kda_paged, recurrent_kda, recurrent_kda_paged
from flashkda_ops.integrations import flash_kda

B, T, H, HV, K, V = 2, 5, 2, 4, 6, 3
BY_HAND = B * T * HV * 3 * (2 * V * K)  # S k, u k^T and S q, a multiplication and an addition each


def count(function: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def call(**options: object) -> dict[str, object]:
    return make_call(T, B=B, H=H, HV=HV, K=K, V=V, **options)


class Recurrence:
    """The recurrence as matrix products, which the counter knows, on states of some rows."""

    def __init__(self, rows: int = V) -> None:
        def leaf(*shape: int) -> Tensor:
            return torch.randn(B * HV, *shape, requires_grad=True)

        self.steps = [(leaf(K, 1), leaf(K, 1), leaf(rows, 1)) for _ in range(T)]
        self.state = leaf(rows, K)

    def __call__(self, outputs: bool = True) -> Tensor:
        S, o = self.state, []
        for q, k, v in self.steps:
            S = S + (v - S @ k) @ k.mT
            if outputs:
                o.append(S @ q)
        return torch.stack(o) if outputs else S


def test_the_forward_pass_is_counted_as_by_hand() -> None:
    counted = count(Recurrence())
    assert counted == BY_HAND
    pool, rows = torch.zeros(3, HV, K, V), torch.tensor([2, 0])
    for function in (chunk_kda, recurrent_kda):
        assert count(lambda function=function: function(**call())) == BY_HAND
    for function in (chunk_kda_paged, recurrent_kda_paged):
        assert count(lambda function=function: function(**paged(call(), pool, rows))) == BY_HAND


def test_the_backward_pass_is_counted_as_by_hand() -> None:
    recurrence = Recurrence()
    o = recurrence()
    kept_nothing = count(lambda: recurrence(outputs=False))
    backward = count(lambda: o.sum().backward()) + kept_nothing
    assert backward == BY_HAND // 3 * 8
    ours = requiring_grad(call())
    assert count(lambda: chunk_kda(**ours)[0].sum().backward()) == BY_HAND + backward


def test_without_a_loss_of_the_outputs_the_backward_pass_is_counted_without_them() -> None:
    recurrence = Recurrence()
    forward = count(lambda: recurrence(outputs=False))
    state = recurrence(outputs=False)
    backward = count(lambda: state.sum().backward()) + forward
    ours = requiring_grad(call())
    _, state = chunk_kda(**ours, output_final_state=True)
    assert count(lambda: state.sum().backward()) == backward


def test_the_transition_is_counted_as_a_state_with_the_rows_of_both_maps() -> None:
    recurrence = Recurrence(rows=V + K)
    by_hand = count(lambda: recurrence(outputs=False))
    assert by_hand == B * T * HV * 2 * (2 * (V + K) * K)  # S k and u k^T
    ours = requiring_grad({name: x for name, x in call().items() if name != "q"})
    assert count(lambda: torch.ops.flashkda.chunk_kda_transition(**ours)) == by_hand
    state = recurrence(outputs=False)
    backward = count(lambda: state.sum().backward()) + by_hand
    M, bias = torch.ops.flashkda.chunk_kda_transition(**ours)
    assert count(lambda: (M.sum() + bias.sum()).backward()) == backward


def test_the_drop_in_is_counted_as_the_forward_pass() -> None:
    names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "lower_bound")
    ours = {name: x for name, x in call().items() if name in names}
    assert count(lambda: flash_kda.fwd(**ours, scale=0.5, out=torch.empty_like(ours["v"]))) == BY_HAND


def test_the_op_is_named_in_the_count() -> None:
    with FlopCounterMode(display=False) as counter:
        chunk_kda(**requiring_grad(call()))[0].sum().backward()
    counts = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    assert counts == {"flashkda.chunk_kda": BY_HAND, "flashkda.chunk_kda_backward": BY_HAND // 3 * 8}
