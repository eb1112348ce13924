"""``torch.func``: a mapped call is the calls one by one; gradients inside and outside of ``vmap``. Derivatives that the
ops do not have are errors that say so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import DIFFERENTIABLE, Call, cotangents, error, make_call, paged, requiring_grad
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, linearize, vmap

from flashkda_ops import chunk_kda, chunk_kda_paged, recurrent_kda, recurrent_kda_paged
from flashkda_ops.integrations import flash_kda
from flashkda_ops.nn import KimiDeltaAttention
from flashkda_ops.ops import chunk_kda_transition

pytestmark = [
    pytest.mark.skipif(
        not hasattr(torch.library, "register_vmap"), reason="torch.library.register_vmap came with torch 2.5"
    ),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),  # torch's own, of dual tensors
]

SAMPLES = 3
TOKENS = {"q": 0, "k": 1, "v": 2, "g": -1, "beta": 0}
LAYOUTS: dict[str, dict[str, Any]] = {
    "dense": {"B": 2},
    "packed": {"cu_seqlens": [0, 2, 2, 7]},
    "states": {"B": 2, "initial_state": True},
    "V first": {"cu_seqlens": [0, 2, 2, 7], "initial_state": True, "state_v_first": True},
}
# Which arguments have a dimension of samples, and where.
MAPPED: dict[str, dict[str, int]] = {
    "tokens": TOKENS,
    "one argument": {"k": 3},
    "parameters": {"A_log": 0, "dt_bias": 1},
    "all": {**TOKENS, "A_log": 1, "dt_bias": 0},
}


def mapped_call(layout: str, mapped: str) -> tuple[Call, dict[str, int]]:
    call, dims = make_call(9, H=2, HV=4, K=6, V=5, **LAYOUTS[layout]), dict(MAPPED[mapped])
    if "initial_state" in call and mapped != "parameters":
        dims["initial_state"] = 2
    generator = torch.Generator().manual_seed(1)
    for name, dim in dims.items():
        shape = list(call[name].shape)
        shape.insert(dim if dim >= 0 else len(shape) + 1 + dim, SAMPLES)
        call[name] = torch.randn(shape, generator=generator)
    return call, dims


def one_by_one(call: Call, dims: dict[str, int]) -> list[Call]:
    return [{**call, **{name: call[name].select(dim, i) for name, dim in dims.items()}} for i in range(SAMPLES)]


def outputs(call: Call) -> tuple[Tensor, Tensor]:
    o, state = chunk_kda(**call, output_final_state=True)
    return o, state


def over(function: Any, call: Call, dims: dict[str, int]) -> Any:
    """``vmap`` of a function of a call over the arguments that have samples."""
    names = list(dims)
    mapped = vmap(lambda *xs: function({**call, **dict(zip(names, xs, strict=True))}), in_dims=tuple(dims.values()))
    return mapped(*(call[name] for name in names))


@pytest.mark.parametrize("mapped", MAPPED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mapped_call_is_the_calls_one_by_one(layout: str, mapped: str) -> None:
    call, dims = mapped_call(layout, mapped)
    expected = [torch.stack(x) for x in zip(*(outputs(one) for one in one_by_one(call, dims)), strict=True)]
    through_the_op = over(
        lambda call: torch.ops.flashkda.chunk_kda(**call, output_final_state=True)[:2], call, dims
    )  # fmt: skip
    for actual in (over(outputs, call, dims), through_the_op):
        for x, wanted in zip(actual, expected, strict=True):
            assert error(x, wanted) < 1e-6


@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_intermediate_states_are_mapped_too(layout: str) -> None:
    call, dims = mapped_call(layout, "tokens")

    def states(call: Call) -> Tensor:
        return torch.ops.flashkda.chunk_kda(**call, checkpoint_interval=16)[2]

    assert error(over(states, call, dims), torch.stack([states(one) for one in one_by_one(call, dims)])) < 1e-6


def maps(call: Call) -> tuple[Tensor, Tensor]:
    names = set(chunk_kda_transition.Arguments._fields)
    M, bias = torch.ops.flashkda.chunk_kda_transition(**{name: x for name, x in call.items() if name in names})
    return M, bias


@pytest.mark.parametrize("mapped", MAPPED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mapped_transition_is_the_transitions_one_by_one(layout: str, mapped: str) -> None:
    call, dims = mapped_call(layout, mapped)
    dims = {name: dim for name, dim in dims.items() if name not in ("q", "initial_state")}
    expected = [torch.stack(x) for x in zip(*(maps(one) for one in one_by_one(call, dims)), strict=True)]
    for x, wanted in zip(over(maps, call, dims), expected, strict=True):
        assert error(x, wanted) < 1e-6


def test_autograd_goes_through_a_mapped_transition() -> None:
    call, dims = mapped_call("packed", "all")
    dims = {name: dim for name, dim in dims.items() if name != "q"}
    leaves, twins = ({name: call[name].clone().requires_grad_() for name in dims} for _ in range(2))
    sum(x.square().sum() for x in over(maps, {**call, **leaves}, dims)).backward()
    sum(x.square().sum() for one in one_by_one({**call, **twins}, dims) for x in maps(one)).backward()
    for name in dims:
        assert error(leaves[name].grad, twins[name].grad) < 1e-5, name


def loss(call: Call) -> Tensor:
    o, state = outputs(call)
    return o.square().sum() + state.sin().sum()


def gradient(call: Call) -> dict[str, Tensor]:
    names = [name for name in DIFFERENTIABLE if name in call]
    return grad(lambda xs: loss({**call, **xs}))({name: call[name] for name in names})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_of_torch_func_is_that_of_autograd(layout: str) -> None:
    call, _ = mapped_call(layout, "tokens")
    (call, *_) = one_by_one(call, mapped_call(layout, "tokens")[1])
    leaves = {name: call[name].clone().requires_grad_() for name in DIFFERENTIABLE if name in call}
    loss({**call, **leaves}).backward()
    for name, x in gradient(call).items():
        assert torch.equal(x, leaves[name].grad), name


@pytest.mark.parametrize("mapped", MAPPED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_samples_are_those_of_each_alone(layout: str, mapped: str) -> None:
    call, dims = mapped_call(layout, mapped)
    expected = [gradient(one) for one in one_by_one(call, dims)]
    for name, x in over(gradient, call, dims).items():
        assert error(x, torch.stack([one[name] for one in expected])) < 1e-5, name


@pytest.mark.parametrize("mapped", MAPPED)
def test_autograd_goes_through_a_mapped_call(mapped: str) -> None:
    call, dims = mapped_call("states", mapped)
    names = [name for name in DIFFERENTIABLE if name in call]
    leaves = {name: call[name].clone().requires_grad_() for name in names}
    twins = {name: call[name].clone().requires_grad_() for name in names}
    over(loss, {**call, **leaves}, dims).sum().backward()
    sum(loss(one) for one in one_by_one({**call, **twins}, dims)).backward()
    for name in names:
        assert error(leaves[name].grad, twins[name].grad) < 1e-5, name


def test_a_jacobian_is_mapped_over_the_backward_pass() -> None:
    call = make_call(4, K=3, V=2, H=1, HV=1)
    jacobian = jacrev(lambda v: chunk_kda(**{**call, "v": v})[0].flatten())(call["v"])
    o, _ = outputs(call)
    assert error(jacobian.flatten(1) @ call["v"].flatten(), o.flatten()) < 1e-6  # o is linear in v


def test_a_second_derivative_is_an_error_in_our_words() -> None:
    call = make_call(4, K=3, V=2)
    with pytest.raises(RuntimeError, match="flashkda::chunk_kda has no second derivative"):
        grad(lambda q: grad(lambda q: loss({**call, "q": q}))(q).sum())(call["q"])


def test_sequences_of_their_own_for_each_sample_are_refused() -> None:
    call = make_call(9, cu_seqlens=[0, 9])
    with pytest.raises(ValueError, match=r"cu_seqlens must be the same for all samples of torch\.vmap"):
        vmap(lambda cu: chunk_kda(**{**call, "cu_seqlens": cu})[0])(torch.tensor([[0, 9], [0, 4]]))


@pytest.mark.parametrize("function", [chunk_kda_paged, recurrent_kda_paged])
def test_a_pool_is_not_mapped(function: Any) -> None:
    call = paged(make_call(1, B=2), torch.zeros(3, 4, 16, 8), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"state_pool must not be under torch\.vmap"):
        vmap(lambda q: function(**{**call, "q": q}))(torch.stack([call["q"]] * SAMPLES))


def test_what_the_drop_in_writes_into_is_not_mapped() -> None:
    call = make_call(1, B=2)
    tokens = {name: call[name] for name in ("k", "v", "g", "beta", "A_log", "dt_bias", "lower_bound")}
    with pytest.raises(ValueError, match=r"out must not be under torch\.vmap"):
        vmap(lambda q: flash_kda.fwd(q, **tokens, scale=1.0, out=torch.empty_like(call["v"])))(
            torch.stack([call["q"]] * SAMPLES)
        )


# ---------------------------------------------------------------------------------------------------------------------
# Derivatives that the ops do not have
# ---------------------------------------------------------------------------------------------------------------------

Function = Callable[[Call], Tensor]


def states_call() -> Call:
    return make_call(9, B=2, initial_state=True)


def paged_call() -> Call:
    return paged(make_call(1, B=2), torch.ones(5, 4, 16, 8), torch.tensor([3, 1]))


def drop_in_call() -> Call:
    names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "lower_bound")
    return {name: x for name, x in states_call().items() if name in names}


def drop_in(call: Call) -> Tensor:
    out = torch.empty_like(call["v"])
    flash_kda.fwd(**call, scale=0.25, out=out)
    return out


def transition_call() -> Call:
    return {name: x for name, x in make_call(9, B=2).items() if name != "q"}


OPS = torch.ops.flashkda
NOT_FORWARD: dict[str, tuple[str, Callable[[], Call], Function]] = {
    "chunk_kda": ("chunk_kda", states_call, lambda call: chunk_kda(**call)[0]),
    "chunk_kda's state": ("chunk_kda", states_call, lambda call: outputs(call)[1]),
    "recurrent_kda": ("recurrent_kda_paged", states_call, lambda call: recurrent_kda(**call)[0]),
    "chunk_kda_paged": ("chunk_kda_paged", paged_call, lambda call: chunk_kda_paged(**call)),
    "recurrent_kda_paged": ("recurrent_kda_paged", paged_call, lambda call: recurrent_kda_paged(**call)),
    "flash_kda": ("flash_kda_fwd", drop_in_call, drop_in),
    "ops.chunk_kda": ("chunk_kda", states_call, lambda call: OPS.chunk_kda(**call)[0]),
    "ops.chunk_kda_paged": ("chunk_kda_paged", paged_call, lambda call: OPS.chunk_kda_paged(**call)),
    "ops.recurrent_kda_paged": ("recurrent_kda_paged", paged_call, lambda call: OPS.recurrent_kda_paged(**call)),
    "ops.chunk_kda_transition": ("chunk_kda_transition", transition_call, lambda c: OPS.chunk_kda_transition(**c)[1]),
}


def with_dual(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor | None:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def with_dual_and_no_grad(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor | None:
    with torch.no_grad():  # of which forward mode takes no notice
        return with_dual(function, x)


FORWARD_MODES: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "forward_ad": with_dual,
    "forward_ad and no_grad": with_dual_and_no_grad,
    "jvp": lambda function, x: jvp(function, (x,), (torch.ones_like(x),)),
    "jvp of vmap": lambda function, x: jvp(vmap(function), (torch.stack([x] * 2),), (torch.ones(2, *x.shape),)),
    "jacfwd": lambda function, x: jacfwd(function)(x),
    "linearize": lambda function, x: linearize(function, x)[1](torch.ones_like(x)),
    "vectorized jacobian": lambda function, x: torch.autograd.functional.jacobian(
        function, x, vectorize=True, strategy="forward-mode"
    ),
}


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        (name, mode)
        for name, (op, _, _) in NOT_FORWARD.items()
        for mode in FORWARD_MODES
        if mode != "jvp of vmap" or op in ("chunk_kda", "chunk_kda_transition")  # the others are not mapped
    ],
)
def test_a_forward_mode_derivative_is_an_error_in_our_words(name: str, mode: str) -> None:
    op, make, function = NOT_FORWARD[name]
    call = make()
    with pytest.raises(NotImplementedError, match=f"flashkda::{op} has no forward-mode derivative"):
        FORWARD_MODES[mode](lambda v: function({**call, "v": v}), call["v"])


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", NOT_FORWARD)
def test_a_tangent_of_any_argument_is_seen(name: str, requires_grad: bool) -> None:
    op, make, function = NOT_FORWARD[name]
    for argument in (*DIFFERENTIABLE, "state_pool"):
        call = make()
        if argument in call:
            if requires_grad:
                call = requiring_grad(call, [name for name in DIFFERENTIABLE if name in call])
            with pytest.raises(NotImplementedError, match=f"flashkda::{op} has no forward-mode derivative"):
                with_dual(lambda x, call=call, argument=argument: function({**call, argument: x}), call[argument])


@pytest.mark.parametrize("op", [False, True])
def test_a_tangent_of_a_cotangent_is_seen(op: bool) -> None:
    call = requiring_grad(states_call())
    results = OPS.chunk_kda(**call, output_final_state=True)[:2] if op else outputs(call)
    do, dht = cotangents(call)
    with pytest.raises(NotImplementedError, match="flashkda::chunk_kda_backward has no forward-mode derivative"):
        with_dual(lambda do: torch.autograd.grad(results, call["q"], (do, dht))[0], do)


@pytest.mark.parametrize("mode", ["forward_ad", "forward_ad and no_grad", "jvp", "linearize"])
def test_a_layer_has_no_forward_mode_derivative_either(mode: str) -> None:
    layer = KimiDeltaAttention(hidden_size=8, num_heads=2, head_dim=4)
    with pytest.raises(NotImplementedError, match="flashkda::chunk_kda has no forward-mode derivative"):
        FORWARD_MODES[mode](lambda x: layer(x)[0], torch.randn(1, 5, 8))


@pytest.mark.parametrize("name", NOT_FORWARD)
def test_a_call_without_tangents_may_stand_beside_some(name: str) -> None:
    _, make, function = NOT_FORWARD[name]
    expected = function(make())
    with forward_ad.dual_level():
        assert torch.equal(function(make()), expected)
    o, tangent = jvp(lambda x: x * function(make()), (torch.tensor(2.0),), (torch.tensor(3.0),))
    assert torch.equal(o, 2 * expected) and torch.equal(tangent, 3 * expected)
    with torch.inference_mode(), forward_ad.dual_level():
        assert torch.equal(function(make()), expected)


@pytest.mark.parametrize("name", ["q", "initial_state"])
def test_a_derivative_by_double_backward_is_an_error_too(name: str) -> None:
    call = states_call()
    with pytest.raises(RuntimeError, match="flashkda::chunk_kda has no second derivative"):
        torch.autograd.functional.jvp(
            lambda x: chunk_kda(**{**call, name: x})[0], call[name], torch.ones_like(call[name])
        )


def final_state(call: Call) -> Tensor:
    _, state = recurrent_kda(**call, output_final_state=True)
    assert state is not None
    return state


NOT_DIFFERENTIABLE = {name: NOT_FORWARD[name] for name in NOT_FORWARD if "paged" in name or "recurrent" in name} | {
    "recurrent_kda's state": ("recurrent_kda_paged", states_call, final_state)
}


@pytest.mark.parametrize("name", NOT_DIFFERENTIABLE)
def test_a_gradient_of_an_op_for_inference_is_an_error_that_names_what_has_one(name: str) -> None:
    op, make, function = NOT_DIFFERENTIABLE[name]
    text = f"flashkda::{op} has no gradient: it is for inference, flashkda_ops.chunk_kda for training"
    for argument in (*DIFFERENTIABLE, "state_pool"):
        call = make()
        if argument in call:
            call[argument].requires_grad_()
            o = function(call)  # whoever takes no gradient needs no torch.no_grad
            with pytest.raises(RuntimeError, match=text):
                o.sum().backward()
            with pytest.raises(RuntimeError, match=text):
                grad(lambda x, call=call, argument=argument: function({**call, argument: x}).sum())(
                    call[argument].detach()
                )


@pytest.mark.parametrize("name", ["ops.chunk_kda", "ops.chunk_kda_transition"])
def test_a_gradient_of_torch_func_of_an_op_says_what_to_call(name: str) -> None:
    op, make, function = NOT_FORWARD[name]
    call = make()
    with pytest.raises(
        RuntimeError, match=rf"torch\.func cannot differentiate flashkda::{op} as an op: call flashkda_"
    ):
        grad(lambda v: function({**call, "v": v}).sum())(call["v"])


@pytest.mark.parametrize("name", ["scale", "lower_bound"])
def test_an_option_that_asks_for_a_gradient_is_an_error(name: str) -> None:
    x = torch.tensor(-1.0)
    calls = (
        lambda x: loss({**states_call(), name: x}),
        lambda x: recurrent_kda_paged(**{**paged_call(), name: x}).sum(),
    )
    for call in calls:
        for derivative in (lambda call=call: call(x.clone().requires_grad_()), lambda call=call: grad(call)(x)):
            with pytest.raises(ValueError, match="scale and lower_bound must be numbers: they have no gradient"):
                derivative()
        with pytest.raises(ValueError, match="scale and lower_bound must be numbers: they have no gradient"):
            with_dual(call, x)
