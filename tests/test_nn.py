"""The layers of flashkda_ops.nn against fla's own, which run on the CPU as fla_on_cpu has them."""

from __future__ import annotations

import copy
import inspect
import logging
import re
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import error
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from flashkda_ops import validation
from flashkda_ops.nn import (
    GatedMLP,
    KimiDeltaAttention,
    LinearCrossEntropyLoss,
    RMSNorm,
    RMSNormGated,
    ShortConvolution,
    StaticCache,
    convert,
)

pytest.importorskip("fla.models")
import fla.layers.kda
import fla.modules
from fla.models.cache_utils import Cache, FLACache
from fla.models.kda import KDAConfig, KDAForCausalLM
from fla.modules.l2warp import l2_warp
from fla_on_cpu import fla_on_cpu, greedy_tokens

from flashkda_ops.integrations.fla import StaticCache as StaticCacheOfFla

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "bounded gate": {"safe_gate": True, "lower_bound": -5.0},
    "value heads": {"num_v_heads": 4, "expand_v": 1.5},
    "no convolution": {"use_short_conv": False},
    "three taps and a bias": {"conv_size": 3, "conv_bias": True},
    "negative eigenvalues": {"allow_neg_eigval": True},
}
HIDDEN = 24

options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def pair(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Module, KimiDeltaAttention]:
    """fla's layer and ours with the same parameters."""
    torch.manual_seed(0)
    arguments = {"hidden_size": HIDDEN, "head_dim": 8, "num_heads": 2, "layer_idx": 0, **options}
    theirs = fla.layers.kda.KimiDeltaAttention(**arguments)
    with torch.no_grad():
        theirs.A_log.add_(torch.randn_like(theirs.A_log))
        theirs.o_norm.weight.add_(0.3 * torch.randn_like(theirs.o_norm.weight))
    ours = KimiDeltaAttention(**arguments)
    ours.load_state_dict(theirs.state_dict())
    return theirs.to(dtype), ours.to(dtype)


def tokens(batch: int, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, length, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)


def assert_same_training(theirs: nn.Module, ours: nn.Module, x: Tensor, **call: Any) -> Tensor:
    """Outputs and all gradients are fla's; returns the output."""
    outputs, gradients = [], []
    for layer in (theirs, ours):
        leaf = x.clone().requires_grad_()
        with fla_on_cpu():
            o, _, _ = layer(leaf, **call)
            (o * torch.linspace(-1, 1, o.numel()).view_as(o)).sum().backward()
        outputs.append(o.detach())
        gradients.append({"x": leaf.grad} | {name: p.grad for name, p in layer.named_parameters()})
    assert error(outputs[1], outputs[0]) < 1e-5
    for name, expected in gradients[0].items():
        assert error(gradients[1][name], expected) < 5e-5, name
    return outputs[1]


def test_the_layer_has_flas_arguments_and_parameters() -> None:
    theirs, ours = (
        inspect.signature(c.__init__).parameters for c in (fla.layers.kda.KimiDeltaAttention, KimiDeltaAttention)
    )
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()]
    layers = pair()
    assert [(n, p.shape, p.dtype) for n, p in layers[0].named_parameters()] == [
        (n, p.shape, p.dtype) for n, p in layers[1].named_parameters()
    ]
    assert layers[1].A_log._no_weight_decay and layers[1].dt_bias._no_weight_decay


def test_a_new_layer_is_initialised_as_flas() -> None:
    torch.manual_seed(0)
    layer = KimiDeltaAttention(4, head_dim=4, num_heads=1000)
    assert 0 <= layer.A_log.min() < 0.1 and 2.75 < layer.A_log.max() <= 2.7727  # of 1 to 16
    dt = torch.nn.functional.softplus(layer.dt_bias)
    assert 0.00099 < dt.min() < 0.0012 and 0.09 < dt.max() < 0.1001
    assert not KimiDeltaAttention(HIDDEN, safe_gate=True, lower_bound=-5.0).A_log.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head_dim": 3, "expand_v": 1.5}, "expand_v"),
        ({"num_heads": 2, "num_v_heads": 3}, "num_v_heads must be a multiple of num_heads = 2, got 3"),
        ({"num_heads": 2, "num_v_heads": 0}, "num_v_heads must be a multiple of num_heads = 2, got 0"),
        ({"num_heads": 0}, "num_heads must be positive, got 0"),
        ({"mode": "parallel"}, "mode"),
        ({"safe_gate": True}, "lower_bound"),
        ({"lower_bound": -7.0}, "lower_bound"),
    ],
    ids=str,
)
def test_a_bad_argument_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KimiDeltaAttention(HIDDEN, **arguments)


@options
def test_training_gives_flas_outputs_and_gradients(options: dict[str, Any]) -> None:
    assert_same_training(*pair(**options), tokens(2, 11))


@options
def test_packed_sequences_give_flas_outputs_and_gradients(options: dict[str, Any]) -> None:
    # Lengths below, at and above the taps, and an empty sequence.
    cu_seqlens = torch.tensor([0, 2, 5, 5, 9, 17], dtype=torch.int32)
    assert_same_training(*pair(**options), tokens(1, 17), cu_seqlens=cu_seqlens)


def test_padding_anywhere_is_left_out_as_in_fla() -> None:
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 1, 0, 1], [1] * 7, [0] * 7])
    o = assert_same_training(*pair(), tokens(5, 7), attention_mask=mask)
    assert not o[mask == 0].any()


def test_packed_sequences_take_precedence_over_a_mask() -> None:
    _, layer = pair()
    x, cu_seqlens = tokens(1, 6), torch.tensor([0, 4, 6])
    masked = layer(x, attention_mask=torch.zeros(1, 6), cu_seqlens=cu_seqlens)[0]
    assert torch.equal(masked, layer(x, cu_seqlens=cu_seqlens)[0])


def assert_same_states(ours: Any, theirs: Any) -> None:
    assert error(ours["recurrent_state"], theirs["recurrent_state"]) < 1e-5
    if theirs["conv_state"] is not None:
        for actual, expected in zip(ours["conv_state"], theirs["conv_state"], strict=True):
            assert error(actual, expected) < 1e-5


@options
def test_prefill_in_pieces_and_decode_give_flas_outputs_and_states(options: dict[str, Any]) -> None:
    theirs, ours = (layer.eval() for layer in pair(**options))
    x, caches = tokens(3, 12), (Cache(), Cache())
    with torch.no_grad(), fla_on_cpu():
        for start, end in ((0, 2), (2, 8), (8, 9), (9, 10), (10, 12)):
            expected, _, _ = theirs(x[:, start:end], past_key_values=caches[0], use_cache=True)
            actual, _, returned = ours(x[:, start:end], past_key_values=caches[1], use_cache=True)
            assert returned is caches[1]
            assert error(actual, expected) < 1e-5
            assert_same_states(caches[1][0], caches[0][0])
    assert caches[1].get_seq_length() == 12


def test_masked_prefill_and_decode_give_flas_outputs_and_states() -> None:
    theirs, ours = (layer.eval() for layer in pair())
    x, caches = tokens(3, 9), (Cache(), Cache())
    # Prefills whose sequences differ in length, then tokens that some sequences do not have.
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0, 1], [1, 1, 1, 1, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 1, 1]])
    with torch.no_grad(), fla_on_cpu():
        for start, end in ((0, 4), (4, 6), (6, 7), (7, 8), (8, 9)):
            call = {"attention_mask": mask[:, :end], "use_cache": True}
            expected, _, _ = theirs(x[:, start:end], past_key_values=caches[0], **call)
            actual, _, _ = ours(x[:, start:end], past_key_values=caches[1], **call)
            assert error(actual, expected) < 1e-5
            assert_same_states(caches[1][0], caches[0][0])


def test_packed_prefill_continues_from_the_states_of_a_cache() -> None:
    theirs, ours = (layer.eval() for layer in pair())
    caches = (Cache(), Cache())
    with torch.no_grad(), fla_on_cpu():
        for ends in ([0, 3, 3, 8], [0, 1, 3, 9]):
            call = {"cu_seqlens": torch.tensor(ends, dtype=torch.int32), "use_cache": True}
            x = tokens(1, ends[-1])
            expected, _, _ = theirs(x, past_key_values=caches[0], **call)
            actual, _, _ = ours(x, past_key_values=caches[1], **call)
            assert error(actual, expected) < 1e-5
            assert_same_states(caches[1][0], caches[0][0])


def test_decode_updates_the_states_where_they_are() -> None:
    _, layer = pair()
    cache = Cache()
    with torch.no_grad():
        layer(tokens(2, 5), past_key_values=cache, use_cache=True)
        before = (cache[0]["recurrent_state"], *cache[0]["conv_state"])
        layer(tokens(2, 1), past_key_values=cache, use_cache=True)
    after = (cache[0]["recurrent_state"], *cache[0]["conv_state"])
    assert all(a is b for a, b in zip(before, after, strict=True))


def test_a_call_without_use_cache_reads_the_states_and_leaves_them() -> None:
    _, layer = pair()
    cache = Cache()
    with torch.no_grad():
        layer(tokens(2, 5), past_key_values=cache, use_cache=True)
        before = copy.deepcopy(cache[0])
        o = layer(tokens(2, 1), past_key_values=cache)[0]
        assert_same_states(cache[0], before)
        assert error(layer(tokens(2, 1), past_key_values=cache, use_cache=True)[0], o) < 1e-6


def test_states_of_a_prefill_in_inference_mode_decode_outside_of_it() -> None:
    _, layer = pair()
    outputs = []
    for prefill_mode in (torch.inference_mode, torch.no_grad):
        cache = Cache()
        with prefill_mode():
            layer(tokens(2, 5), past_key_values=cache, use_cache=True)
        with torch.no_grad():
            outputs.append(layer(tokens(2, 1), past_key_values=cache, use_cache=True)[0])
    assert torch.equal(*outputs)


def test_16_bit_results_are_flas_within_rounding() -> None:
    theirs, ours = pair(torch.bfloat16)
    x = tokens(2, 40, torch.bfloat16)
    with torch.no_grad(), fla_on_cpu():
        assert error(ours(x)[0], theirs(x)[0]) < 4e-3


def test_padding_at_the_end_of_a_packed_row_does_not_reach_the_sequences() -> None:
    _, layer = pair()
    x, cu_seqlens = tokens(1, 12), torch.tensor([0, 4, 9])
    cache = Cache()
    layer.requires_grad_(False)
    o = layer(x, cu_seqlens=cu_seqlens, past_key_values=cache, use_cache=True)[0]
    cut = Cache()
    assert error(o[:, :9], layer(x[:, :9], cu_seqlens=cu_seqlens, past_key_values=cut, use_cache=True)[0]) < 1e-6
    assert_same_states(cache[0], cut[0])
    assert not o[:, 9:].any()


def test_every_tensor_is_made_on_the_device_of_the_inputs() -> None:
    """On meta tensors, where one of the CPU beside them would raise."""
    layer = pair()[1].to("meta", torch.bfloat16)
    x, mask = tokens(2, 5).to("meta", torch.bfloat16), torch.ones(2, 5, device="meta")
    layer(x, attention_mask=mask)[0].sum().backward()
    assert all(p.grad.device.type == "meta" for p in layer.parameters())
    cache = StaticCache(layer, 2)
    with torch.no_grad():
        for piece in (x, x[:, :1]):
            o = layer(piece, attention_mask=mask, past_key_values=cache, use_cache=True)[0]
            assert (o.shape, o.dtype) == (piece.shape, torch.bfloat16)
        cu_seqlens = torch.zeros(3, dtype=torch.int32, device="meta")
        assert layer(x[:1], cu_seqlens=cu_seqlens, past_key_values=cache, use_cache=True)[0].is_meta


def test_a_cache_needs_a_layer_index() -> None:
    layer = KimiDeltaAttention(HIDDEN, head_dim=8, num_heads=2)
    with pytest.raises(ValueError, match="layer_idx must be given"):
        layer(tokens(1, 2), past_key_values=Cache(), use_cache=True)


@pytest.mark.parametrize(
    ("x", "call", "message"),
    [
        (tokens(2, 5)[0], {}, r"hidden_states must have shape \[B, T, hidden_size\] = \[B, T, 24\], got \[5, 24\]"),
        (tokens(2, 5)[..., 1:], {}, r"hidden_states must have shape .* got \[2, 5, 23\]"),
        (tokens(2, 5), {"attention_mask": torch.ones(2, 5, 5)}, r"attention_mask must .* got \[2, 5, 5\]"),
        (tokens(2, 5), {"attention_mask": torch.ones(2, 4)}, r"S at least T = 5, as hidden_states has, got \[2, 4\]"),
        (tokens(2, 5), {"attention_mask": torch.ones(1, 5)}, r"B = 2 and S .* got \[1, 5\]"),
        (
            tokens(2, 5),
            {"attention_mask": torch.ones(2, 5, device="meta")},
            "attention_mask must be on cpu .* got meta",
        ),
        (tokens(2, 5), {"attention_mask": [[1] * 5] * 2}, "attention_mask must be a tensor .* got a list"),
        (tokens(1, 5), {"cu_seqlens": [0, 2, 5]}, "cu_seqlens must be a tensor .* got a list"),
        (tokens(1, 5), {"cu_seqlens": torch.tensor([5])}, r"cu_seqlens must have shape \[N \+ 1\], .* got \[1\]"),
        (tokens(1, 5), {"cu_seqlens": torch.tensor([[0, 5]])}, r"cu_seqlens must have shape .* got \[1, 2\]"),
        (tokens(1, 5), {"cu_seqlens": torch.tensor([0.0, 5.0])}, r"cu_seqlens must be int32.* int64, got float32"),
        (
            tokens(2, 5),
            {"cu_seqlens": torch.tensor([0, 5])},
            "hidden_states must have a batch size of 1 with cu_seqlens",
        ),
    ],
    ids=range(12),
)
def test_inputs_that_do_not_fit_the_layer_are_named(x: Tensor, call: dict[str, Any], message: str) -> None:
    for options in ({}, {"use_short_conv": False}):
        layer = pair(**options)[1]
        with pytest.raises(ValueError, match=message):
            layer(x, **call)


@pytest.mark.parametrize(
    ("x", "call", "message"),
    [
        (torch.ones(5, 6), {}, r"x must have shape \[B, T, D\] = \[B, T, 6\], got \[5, 6\]"),
        (torch.ones(2, 5, 7), {}, r"x must have shape .* got \[2, 5, 7\]"),
        (torch.ones(2, 5, 6), {"cache": torch.ones(1, 6, 4)}, r"cache must have .* = \[2, 6, 4\], got \[1, 6, 4\]"),
        (torch.ones(2, 5, 6), {"cache": torch.ones(2, 6, 3)}, r"cache must have .* = \[2, 6, 4\], got \[2, 6, 3\]"),
        (
            torch.ones(1, 5, 6),
            {"cache": torch.ones(1, 6, 4), "cu_seqlens": torch.tensor([0, 2, 5])},
            r"cache must have shape \[N, D, W\] = \[2, 6, 4\], got \[1, 6, 4\]",
        ),
        (torch.ones(2, 5, 6), {"mask": torch.ones(2, 4)}, r"mask must have shape \[B, T\] = \[2, 5\], got \[2, 4\]"),
        (torch.ones(1, 5, 6), {"cu_seqlens": [0, 5]}, "cu_seqlens must be a tensor .* got a list"),
    ],
    ids=range(7),
)
def test_inputs_that_do_not_fit_the_convolution_are_named(x: Tensor, call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShortConvolution(6, 4)(x, **call)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(("B", "T"), [(2, 0), (0, 5), (0, 1), (0, 0)])
@options
def test_calls_of_no_tokens_and_of_no_sequences_are_calls(options: dict[str, Any], B: int, T: int, grad: bool) -> None:
    layer, x = pair(**options)[1], tokens(2, 5)[:B, :T]
    with torch.set_grad_enabled(grad):
        for call in ({}, {"attention_mask": torch.ones(B, T)}, {"attention_mask": torch.ones(B, T + 3)}):
            assert layer(x, **call)[0].shape == x.shape
            cache = Cache()
            layer(tokens(2, 5)[:B], past_key_values=cache, use_cache=True)
            state = cache[0]["recurrent_state"].detach().clone()
            assert layer(x, past_key_values=cache, use_cache=True, **call)[0].shape == x.shape
            assert T > 0 or torch.equal(cache[0]["recurrent_state"], state)
        cache = Cache()
        cu_seqlens = torch.zeros(3, dtype=torch.int32)
        o = layer(tokens(1, 0), cu_seqlens=cu_seqlens, past_key_values=cache, use_cache=True)[0]
        assert o.shape == (1, 0, HIDDEN) and not cache[0]["recurrent_state"].any()


def test_a_cache_of_flas_that_was_reset_starts_anew() -> None:
    layer, cache = pair()[1], Cache()
    with torch.no_grad():
        layer(tokens(2, 5), past_key_values=cache, use_cache=True)
        cache.reset()
        o = layer(tokens(2, 3), past_key_values=cache, use_cache=True)[0]
    assert torch.equal(o, layer(tokens(2, 3))[0])


@options
def test_whatever_padding_holds_stays_there(options: dict[str, Any]) -> None:
    """Outputs are zero there, and neither other outputs nor any gradient or state learns of it."""
    holes = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    results: list[dict[str, Tensor]] = []
    for padding in (0.0, torch.nan, torch.inf):
        for call in ("masked", "packed"):
            layer = pair(**options)[1]
            x = tokens(3, 6) if call == "masked" else tokens(1, 9)
            real = holes == 1 if call == "masked" else torch.arange(9).unsqueeze(0) < 7
            keyword = {"attention_mask": holes} if call == "masked" else {"cu_seqlens": torch.tensor([0, 3, 7])}
            x = torch.where(real.unsqueeze(-1), x, padding).requires_grad_()
            o = layer(x, **keyword)[0]
            o.square().sum().backward()
            cache = Cache()
            with torch.no_grad():
                layer(x, past_key_values=cache, use_cache=True, **keyword)
                n = cache[0]["recurrent_state"].shape[0]
                step = torch.where(torch.arange(n)[:, None, None] == 0, padding, tokens(n, 1))
                mask = (torch.arange(n) != 0).unsqueeze(1)
                decoded = layer(step, attention_mask=mask, past_key_values=cache, use_cache=True)[0]
            assert not o[~real].any() and not x.grad[~real].any() and not decoded[0].any()
            gradients = {name: p.grad for name, p in layer.named_parameters()}
            states = {"recurrent": cache[0]["recurrent_state"], "conv": torch.cat(cache[0]["conv_state"] or [o], 1)}
            results.append({"o": o.detach(), "x": x.grad, "decoded": decoded, **states, **gradients})
    for i, result in enumerate(results):
        for name, expected in results[i % 2].items():
            assert torch.equal(result[name], expected), name


def test_nan_where_a_mask_of_the_convolution_is_zero_stays_there() -> None:
    conv, mask = ShortConvolution(6, 4), torch.tensor([[1, 0, 1, 1, 1]])
    x = torch.full((1, 5, 6), 2.0)
    outputs = [conv(x.masked_fill(mask.unsqueeze(-1) == 0, fill), mask=mask)[0] for fill in (1, torch.nan)]
    assert torch.equal(*outputs)


def test_malformed_bounds_read_nothing_out_of_bounds() -> None:
    """On the CPU, where an index that is out of bounds raises."""
    layer, generator = pair()[1], torch.Generator().manual_seed(0)
    for N, T in ((1, 1), (2, 5), (3, 7), (4, 3)):
        entries = torch.tensor([-(2**31), -5, -1, 0, 0, 1, 3, T, T + 1, 50, 2**31 - 1])
        for dtype in (torch.int32, torch.int64):
            for _ in range(8):
                cu_seqlens = entries[torch.randint(len(entries), (N + 1,), generator=generator)].to(dtype)
                cache = Cache()
                layer(tokens(1, N), cu_seqlens=torch.arange(N + 1), past_key_values=cache, use_cache=True)
                x = tokens(1, T).requires_grad_()
                o = layer(x, cu_seqlens=cu_seqlens, past_key_values=cache, use_cache=True)[0]
                o.sum().backward()


def default_dtype(dtype: torch.dtype) -> AbstractContextManager[object]:
    class Default(AbstractContextManager[object]):
        def __enter__(self) -> None:
            self.before = torch.get_default_dtype()
            torch.set_default_dtype(dtype)

        def __exit__(self, *_: object) -> None:
            torch.set_default_dtype(self.before)

    return Default()


MODES: dict[str, Any] = {
    "inference mode": torch.inference_mode,
    "meta": lambda: torch.device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_static_cache_may_be_made_under_any_mode_and_used_under_another(mode: Any) -> None:
    layer, x, mask = pair()[1], tokens(2, 6), torch.ones(2, 6)
    results = []
    for made, used in ((nullcontext, nullcontext), (mode, nullcontext), (nullcontext, mode), (mode, mode)):
        with made():
            cache = StaticCache(layer, 2)
        with used(), torch.no_grad():
            outputs = [layer(x[:, :4], attention_mask=mask[:, :4], past_key_values=cache, use_cache=True)[0]]
            outputs += [layer(x[:, t : t + 1], past_key_values=cache, use_cache=True)[0] for t in (4, 5)]
        results.append([*outputs, *(t.clone() for t in cache._tensors())])
    for result in results[1:]:
        for actual, expected in zip(result, results[0], strict=True):
            assert actual.dtype == expected.dtype and torch.equal(actual, expected)


@pytest.mark.parametrize("mode", list(MODES.values())[1:], ids=list(MODES)[1:])
def test_training_under_a_mode_gives_the_same_results(mode: Any) -> None:
    layer, loss, results = pair()[1], LinearCrossEntropyLoss(label_smoothing=0.1), []
    head, target, mask = torch.randn(9, HIDDEN), torch.randint(0, 9, (2, 7)), (torch.rand(2, 7) < 0.7).long()
    for used in (nullcontext, mode):
        x = tokens(2, 7).requires_grad_()
        with used():
            value = loss(layer(x, attention_mask=mask)[0], target, head)
            value.backward()
        results.append([value.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())])
        layer.zero_grad()
    for expected, actual in zip(*results, strict=True):
        assert actual.dtype == expected.dtype and torch.equal(actual, expected)


# ---------------------------------------------------------------------------------------------------------------------
# StaticCache
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [OPTIONS["default"], OPTIONS["no convolution"], OPTIONS["value heads"]], ids=str)
def test_a_static_cache_gives_the_results_of_flas_and_its_tensors_stay(options: dict[str, Any]) -> None:
    _, layer = pair(**options)
    x = tokens(2, 8)
    static = StaticCache(layer, 2)
    addresses = [t.data_ptr() for t in static._tensors()]
    for _ in range(2):
        cache = Cache()
        with torch.no_grad():
            for start, end in ((0, 5), (5, 6), (6, 7), (7, 8)):
                expected, _, _ = layer(x[:, start:end], past_key_values=cache, use_cache=True)
                actual, _, _ = layer(x[:, start:end], past_key_values=static, use_cache=True)
                assert error(actual, expected) < 1e-6
                assert_same_states(static[0], cache[0])
        assert static.get_seq_length() == 8
        assert addresses == [t.data_ptr() for t in static._tensors()]
        static.reset()
        assert static.get_seq_length() == 0


def test_a_static_cache_is_for_models_of_kda_layers() -> None:
    with pytest.raises(ValueError, match=r"layer_idx 0, 1, \.\.\., got \[\]"):
        StaticCache(nn.Linear(2, 2), 1)
    with pytest.raises(ValueError, match=r"got \[1\]"):
        StaticCache(pair(layer_idx=1)[1], 1)
    with pytest.raises(ValueError, match="attn_state"):
        StaticCache(pair()[1], 1).update(attn_state=(torch.ones(1),))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size must be positive, got 0"):
        StaticCache(pair()[1], 0)
    with pytest.raises(ValueError, match="dtype must be bfloat16, float16, float32 or float64, got int8"):
        StaticCache(pair()[1], 1, torch.int8)


@pytest.mark.parametrize("batch", [1, 3, 4])
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("options", [{}, {"use_short_conv": False}], ids=str)
def test_a_batch_of_another_size_than_the_caches_is_refused(options: dict[str, Any], length: int, batch: int) -> None:
    layer = pair(**options)[1]
    for cache in (StaticCache(layer, 2), Cache()):
        message = rf"past_key_values must .* got a batch of {batch} and a cache of 2"
        with torch.no_grad():
            layer(tokens(2, 4), past_key_values=cache, use_cache=True)
            before = copy.deepcopy(cache[0])
            for call in ({}, {"attention_mask": torch.ones(batch, length)}):
                with pytest.raises(ValueError, match=message):
                    layer(tokens(batch, length), past_key_values=cache, use_cache=True, **call)
            with pytest.raises(ValueError, match=message):
                cu_seqlens = torch.arange(batch + 1)
                layer(tokens(1, batch), past_key_values=cache, use_cache=True, cu_seqlens=cu_seqlens)
        assert_same_states(cache[0], before)


def test_an_update_that_has_no_place_in_a_static_cache_is_refused() -> None:
    layer = pair()[1]
    cache = StaticCache(layer, 2)
    state, conv = torch.ones(2, 2, 8, 8), torch.ones(2, 16, 4)
    with pytest.raises(ValueError, match=r"recurrent_state must have .* \[2, 2, 8, 8\], got \[1, 2, 8, 8\]"):
        cache.update(recurrent_state=state[:1])
    with pytest.raises(ValueError, match=r"conv_state must have .* \[2, 16, 4\], got \[2, 1, 4\]"):
        cache.update(conv_state=(conv, conv[:, :1], conv))
    with pytest.raises(ValueError, match=r"conv_state must have 3 tensors, .* got 2"):
        cache.update(conv_state=(conv, conv))
    for index in (-1, 1):
        with pytest.raises(ValueError, match=rf"layer_idx must be in \[0, 1\), the layers of the cache, got {index}"):
            cache.update(recurrent_state=state, layer_idx=index)
    assert cache.update(recurrent_state=state, conv_state=(conv, None, conv), offset=None) is cache[0]
    assert cache.get_seq_length() == 1 and not cache[0]["conv_state"][1].any() and cache[0]["conv_state"][2].all()


class Int8Linear(nn.Module):
    """An int8 weight with its scales beside it, outputs in the dtype of the input, as quantised models have it."""

    def __init__(self, linear: nn.Linear, named: str = "weight") -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.named = named
        weight = (linear.weight.detach() / scale).round().to(torch.int8)
        self.register_parameter(named, nn.Parameter(weight, requires_grad=False))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, getattr(self, self.named).to(x.dtype) * self.scale.to(x.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("named", ["weight", "qweight"])
@pytest.mark.parametrize("options", [{}, {"use_short_conv": False}], ids=str)
def test_a_static_cache_of_a_quantised_layer_has_the_dtype_of_its_tokens(
    options: dict[str, Any], named: str, dtype: torch.dtype
) -> None:
    layer = pair(dtype, **options)[1]
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(layer, name, Int8Linear(getattr(layer, name), named))
    x = tokens(2, 8, dtype)
    cache = StaticCache(layer, 2)
    wide = torch.promote_types(dtype, torch.float32)
    assert {t.dtype for t in cache._tensors()} == {torch.int64, wide, *([dtype] if layer.use_short_conv else [])}
    with torch.no_grad():
        pieces = [x[:, :5], *(x[:, t : t + 1] for t in range(5, 8))]
        o = torch.cat([layer(piece, past_key_values=cache, use_cache=True)[0] for piece in pieces], 1)
        assert error(o, layer(x)[0]) < (2e-2 if dtype == torch.bfloat16 else 1e-5)


def test_a_static_cache_asks_for_a_dtype_where_no_parameter_has_one() -> None:
    layer = pair()[1]
    for name, parameter in list(layer.named_parameters()):
        if name not in ("A_log", "dt_bias"):  # which are fp32 in any model
            owner, _, leaf = name.rpartition(".")
            quantised = nn.Parameter(parameter.to(torch.int8), requires_grad=False)
            layer.get_submodule(owner).register_parameter(leaf, quantised)
    with pytest.raises(ValueError, match="dtype must be given: all parameters of layer 0 are quantised"):
        StaticCache(layer, 1)
    cache = StaticCache(layer, 1, torch.bfloat16)
    assert cache[0]["conv_state"][0].dtype == torch.bfloat16 and cache[0]["recurrent_state"].dtype == torch.float32


def test_a_static_cache_is_on_the_device_that_is_asked_for() -> None:
    layer = pair()[1]
    assert {t.device.type for t in StaticCache(layer, 1, device="meta")._tensors()} == {"meta"}
    assert {t.device.type for t in StaticCache(layer.to("meta"), 1, device="cpu")._tensors()} == {"cpu"}


def test_no_gradient_flows_through_a_static_cache_and_the_others_are_right() -> None:
    layer, cache = pair()[1], StaticCache(pair()[1], 2)
    x = tokens(2, 6).requires_grad_()
    outputs = [layer(x[:, i : i + 3], past_key_values=cache, use_cache=True)[0] for i in (0, 3)]
    assert not any(t.requires_grad for t in cache._tensors())
    torch.cat(outputs, 1).square().sum().backward()
    y, dynamic = tokens(2, 6).requires_grad_(), Cache()
    first = layer(y[:, :3], past_key_values=dynamic, use_cache=True)[0]
    state = dynamic[0]
    state["recurrent_state"] = state["recurrent_state"].detach()
    state["conv_state"] = tuple(c.detach() for c in state["conv_state"])
    second = layer(y[:, 3:], past_key_values=dynamic, use_cache=True)[0]
    torch.cat((first, second), 1).square().sum().backward()
    assert error(x.grad, y.grad) < 1e-6


CACHES = pytest.mark.parametrize("cls", [StaticCache, StaticCacheOfFla], ids=["ours", "that of the integration"])


def used_caches(cls: Any, layers: int = 2, batch: int = 3) -> tuple[Any, Any]:
    """A static cache and fla's after the same calls."""
    model = nn.ModuleList(pair(layer_idx=i)[1] for i in range(layers))
    caches = (cls(model, batch), Cache())
    with torch.no_grad():
        for cache in caches:
            for layer in model:
                layer(tokens(batch, 5), past_key_values=cache, use_cache=True)
    return caches


def public(names: Any) -> set[str]:
    return {name for name in names if not name.startswith("_")}


# What transformers' own class has for its own layers of keys and values, and for caches that move between devices.
OF_TRANSFORMERS = {
    "early_initialization", "get_conv_state", "get_recurrent_state", "has_previous_state", "layer_class_to_replicate",
    "offload", "prefetch", "update_conv_state", "update_indexer", "update_recurrent_state",
}  # fmt: skip


@CACHES
def test_a_static_cache_has_the_protocol_of_flas(cls: Any) -> None:
    cache, theirs = used_caches(cls)
    names = public(dir(theirs)) - OF_TRANSFORMERS
    assert names >= public(vars(FLACache)) and names >= {"batch_size", "is_croppable", "layers", "get_query_offset"}
    for name in sorted(names):
        expected, actual = getattr(theirs, name, None), getattr(cache, name)
        assert callable(actual) == callable(expected), name
        if not callable(expected) or inspect.isclass(expected):
            continue
        ours = inspect.signature(actual).parameters.values()
        for parameter, other in zip(inspect.signature(expected).parameters.values(), ours, strict=False):
            assert (parameter.name, parameter.kind) == (other.name, other.kind), name
    for attributes in (vars(type(theirs.layers[0])), vars(theirs.layers[0])):
        flags = {name: x for name, x in attributes.items() if name.startswith("is_") and not callable(x)}
        assert all(getattr(cache.layers[0], name) == value for name, value in flags.items())


@CACHES
def test_questions_to_a_static_cache_have_flas_answers(cls: Any) -> None:
    cache, theirs = used_caches(cls)
    for ask in (
        len,
        bool,
        lambda c: [sorted(state) for state in c],
        lambda c: [sorted(state) for state in c.to_legacy_cache()],
        lambda c: [c.get_seq_length(i) for i in (0, 1, 2)] + [c.get_seq_length(), c.get_seq_length(None)],
        lambda c: [c.get_max_length(), c.get_max_cache_shape(), c.get_max_cache_shape(1)],
        lambda c: [c.get_mask_sizes(4, i) for i in (0, 1, 2)],
        lambda c: c.get_query_offset(),
        lambda c: [c.is_compileable, c.is_croppable, c.is_initialized, c.offloading],
        lambda c: [c.is_sliding, c.is_linear, c.is_dummy],
        lambda c: [c.is_recording_past(0), c.activate_past_recording()],
        lambda c: c.crop(5),
        lambda c: c.crop(9),
    ):
        assert ask(cache) == ask(theirs)
    assert cache.batch_size == 3
    assert repr(cache).startswith("StaticCache(layers=2, recurrent_state=[3, 2, 8, 8], device=cpu")
    for state, expected in zip(cache, theirs, strict=True):
        assert_same_states(state, expected)
    for asked in (cache, theirs):
        with pytest.raises(KeyError, match=r"2 layers|below 2"):
            asked[2]


@CACHES
def test_a_static_cache_is_reordered_where_it_is(cls: Any) -> None:
    cache, theirs = used_caches(cls)
    addresses = [t.data_ptr() for t in cache._tensors()]
    for reorder in ("reorder_cache", "batch_select_indices"):
        for c in (cache, theirs):
            getattr(c, reorder)(torch.tensor([2, 0, 0]))
        for state, expected in zip(cache, theirs, strict=True):
            assert_same_states(state, expected)
        with pytest.raises(ValueError, match=r"beam_idx must have shape \[batch_size\] = \[3\], .* got \[2\]"):
            getattr(cache, reorder)(torch.tensor([0, 1]))
    assert [t.data_ptr() for t in cache._tensors()] == addresses


@CACHES
def test_a_static_cache_says_why_it_does_not_grow_or_go_back(cls: Any) -> None:
    cache, theirs = used_caches(cls)
    cache.batch_repeat_interleave(1)
    with pytest.raises(ValueError, match=r"repeats must be 1, .* got 2: make one of batch_size = 6"):
        cache.batch_repeat_interleave(2)
    for length in (4, 0, -1):
        for c in (cache, theirs):
            with pytest.raises(NotImplementedError):
                c.crop(length)
    with pytest.raises(NotImplementedError, match="max_length must be at least the 5 tokens seen, got 4"):
        cache.crop(4)
    cache.reset()
    cache.crop(0)
    assert cls.from_legacy_cache(cache) is cache
    with pytest.raises(ValueError, match="past_key_values must be a StaticCache, got NoneType"):
        cls.from_legacy_cache()


def test_beams_and_batches_generate_the_same_with_a_static_cache() -> None:
    model = convert(small_model().eval())
    ids, mask = torch.randint(1, 50, (2, 4)), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    call = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "num_beams": 3}
    expected = model.generate(ids, **call)
    cache = StaticCacheOfFla(model, 2 * 3)
    for _ in range(2):
        assert torch.equal(model.generate(ids, past_key_values=cache, **call), expected)
        cache.reset()
    with pytest.raises(ValueError, match="got a batch of 6 and a cache of 2"):
        model.generate(ids, past_key_values=StaticCacheOfFla(model, 2), **call)


# ---------------------------------------------------------------------------------------------------------------------
# The modules around it
# ---------------------------------------------------------------------------------------------------------------------


def test_the_convolution_with_mask_and_residual_gives_flas_results() -> None:
    torch.manual_seed(0)
    theirs, ours = (c(6, 4, bias=True) for c in (fla.modules.ShortConvolution, ShortConvolution))
    ours.load_state_dict(theirs.state_dict())
    x, residual, state = torch.randn(2, 5, 6), torch.randn(2, 5, 6), torch.randn(2, 6, 4)
    call = {"residual": residual, "mask": torch.rand(2, 5) < 0.5, "cache": state, "output_final_state": True}
    with torch.no_grad(), fla_on_cpu():
        actual = ours(x, **call)
        expected = theirs(x.clone(), **call)  # which it multiplies with the mask in place
    assert error(actual[0], expected[0]) < 1e-6
    assert torch.equal(actual[1], expected[1])
    with pytest.raises(ValueError, match="mask"):
        ours(x[:1], mask=torch.ones(1, 5), cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="activation"):
        ShortConvolution(6, 4, activation="relu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("residual_dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_the_norm_with_its_residual_gives_flas_results(dtype: torch.dtype, residual_dtype: torch.dtype | None) -> None:
    theirs, ours = fla.modules.RMSNorm(16), RMSNorm(16)
    x = tokens(2, 3)[..., :16].to(dtype)
    residual = None if residual_dtype is None else tokens(2, 3)[..., 8:].to(residual_dtype)
    for in_fp32 in (False, True):
        with fla_on_cpu():
            expected = theirs(x, residual, True, in_fp32)
        actual = ours(x, residual, True, in_fp32)
        for a, b in zip(actual, expected, strict=True):
            assert a.dtype == b.dtype
            assert error(a, b) < (1e-6 if a.dtype == torch.float32 else 3e-3)
        assert torch.equal(ours(x, residual), actual[0])


def test_the_gated_norm_has_flas_activations() -> None:
    x, g = tokens(2, 3), tokens(2, 4)[:, :3]
    y = RMSNorm(HIDDEN)(x)
    assert error(RMSNormGated(HIDDEN, activation="sigmoid")(x, g), y * g.sigmoid()) < 1e-6
    assert error(RMSNormGated(HIDDEN)(x, g), y * torch.nn.functional.silu(g)) < 1e-6
    total = RMSNormGated(HIDDEN, elementwise_affine=False)(x, g, residual=g, prenorm=True)[1]
    assert torch.equal(total, x + g)
    with pytest.raises(ValueError, match="activation"):
        RMSNormGated(4, activation="relu")


def test_shapes_that_a_norm_would_broadcast_are_named() -> None:
    x = torch.ones(2, 3, HIDDEN)
    for bad, shape in ((x[..., :1], "[2, 3, 1]"), (x[0], "[3, 24]"), (torch.tensor(1.0), "[]")):
        for call in (lambda: RMSNorm(HIDDEN)(x, bad), lambda: RMSNormGated(HIDDEN)(x, x, bad)):  # noqa: B023
            with pytest.raises(
                ValueError, match=re.escape(f"residual must have the shape of x, [2, 3, 24], got {shape}")
            ):
                call()
        with pytest.raises(ValueError, match=re.escape(f"g must have the shape of x, [2, 3, 24], got {shape}")):
            RMSNormGated(HIDDEN)(x, bad)
    for call in (lambda: RMSNorm(HIDDEN)(x[..., :1]), lambda: RMSNormGated(HIDDEN)(x[..., :1], x)):
        with pytest.raises(ValueError, match=re.escape("x must have shape [..., 24], got [2, 3, 1]")):
            call()


def test_the_mlp_has_flas_sizes_and_results() -> None:
    theirs, ours = fla.modules.GatedMLP(HIDDEN, hidden_ratio=3), GatedMLP(HIDDEN, hidden_ratio=3)
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad(), fla_on_cpu():
        assert error(ours(tokens(2, 3)), theirs(tokens(2, 3))) < 1e-6


LOSSES: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum", "num_chunks": 3},
    "smoothing": {"label_smoothing": 0.1},
    "scale and cap": {"logit_scale": 1.5, "logit_softcapping": 3.0},
    "l2 warp": {"use_l2warp": True, "l2_penalty_factor": 0.1},
}


@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_linear_loss_and_its_gradients_are_those_of_whole_logits(options: dict[str, Any], has_bias: bool) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 7, 4), torch.randn(30, 4), torch.randn(30) if has_bias else None
    target = torch.randint(0, 30, (2, 7))
    target[0, :2] = target[1, -1] = -100
    results = []
    for whole in (True, False):
        leaves = [None if t is None else t.clone().requires_grad_() for t in (x, weight, bias)]
        if whole:
            logits = torch.nn.functional.linear(*leaves)
            z = logits * options.get("logit_scale", 1.0)
            cap = options.get("logit_softcapping")
            z = z if cap is None else cap * torch.tanh(z / cap)
            loss = torch.nn.functional.cross_entropy(
                z.flatten(0, 1),
                target.flatten(),
                reduction=options.get("reduction", "mean"),
                label_smoothing=options.get("label_smoothing", 0.0),
            )
            if "use_l2warp" in options:
                loss = l2_warp(loss, logits, options["l2_penalty_factor"])
        else:
            loss = LinearCrossEntropyLoss(**options)(leaves[0], target, *leaves[1:])
        (3 * loss).backward()
        results.append([loss.detach(), *(t.grad for t in leaves if t is not None)])
    for expected, actual in zip(*results, strict=True):
        assert error(actual, expected) < 1e-5


@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("has_weight", [True, False])
@pytest.mark.parametrize("label", [-1, 30, -(2**40), 2**40, -100])
@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 30])
def test_a_label_that_is_no_class_makes_its_row_nan_and_no_other(
    options: dict[str, Any], has_weight: bool, label: int, ignore_index: int
) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 7, 4 if has_weight else 30), torch.randn(30, 4), torch.randn(30)
    head = (weight, bias) if has_weight else ()
    loss, target = LinearCrossEntropyLoss(ignore_index, **options), torch.randint(1, 30, (2, 7))
    results = []
    for value in (1, label):
        target[1, 2] = value
        leaves = [t.clone().requires_grad_() for t in (x, *head)]
        loss(leaves[0], target, *leaves[1:]).backward()
        with torch.no_grad():
            results.append([loss(x, target, *head), *(t.grad for t in leaves)])
    (good, good_x, *_), (bad, bad_x, *bad_head) = results
    others = torch.ones(2, 7, dtype=torch.bool)
    others[1, 2] = False
    assert good.isfinite() and good_x.isfinite().all()
    if label == ignore_index:
        assert bad.isfinite() and all(t.isfinite().all() for t in (bad_x, *bad_head))
    else:
        assert bad.isnan() and bad_x[~others].isnan().all() and all(t.isnan().all() for t in bad_head)
        assert torch.equal(bad_x[others], good_x[others])


def test_checked_mode_names_a_label_that_is_no_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "CHECK_VALUES", True)
    loss = LinearCrossEntropyLoss(ignore_index=-1)
    for target in ([1, -100, 2], [1, -1, 9]):
        message = rf"target must be in \[0, 9\), or ignore_index = -1, got {min(target, key=lambda n: n in (1, 2, -1))}"
        for call in (
            (torch.randn(3, 4), torch.tensor(target), torch.randn(9, 4)),
            (torch.randn(3, 9), torch.tensor(target)),
        ):
            with pytest.raises(ValueError, match=message):
                loss(*call)
    assert loss(torch.randn(3, 9, device="meta"), torch.zeros(3, dtype=torch.int64, device="meta")).is_meta
    assert loss(torch.randn(3, 9), torch.tensor([0, -1, 8])).isfinite()


@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
def test_only_the_gradients_that_are_asked_for_are_computed(options: dict[str, Any]) -> None:
    rows, hidden, classes = 64, 32, 500
    loss, target = LinearCrossEntropyLoss(**options), torch.randint(0, classes, (rows,))
    product = 2 * rows * hidden * classes
    tensors = [torch.randn(rows, hidden), torch.randn(classes, hidden), torch.randn(classes)]
    wants = [(a, b, c) for a in (False, True) for b in (False, True) for c in (False, True)]
    whole = [t.clone().requires_grad_() for t in tensors]
    loss(whole[0], target, *whole[1:]).backward()
    for wanted in wants:
        leaves = [t.clone().requires_grad_(want) for t, want in zip(tensors, wanted, strict=True)]
        for grad in (True, False):
            with torch.set_grad_enabled(grad), FlopCounterMode(display=False) as count:
                value = loss(leaves[0], target, *leaves[1:])
                if grad and any(wanted):
                    value.backward()
            assert value.requires_grad == (grad and any(wanted))
            assert count.get_total_flops() == product * (1 + (sum(wanted[:2]) if grad else 0))
        for leaf, want, expected in zip(leaves, wanted, whole, strict=True):
            assert (leaf.grad is not None) == want
            assert not want or torch.equal(leaf.grad, expected.grad)


def test_derivatives_that_the_loss_does_not_have_are_errors_and_the_others_right() -> None:
    torch.manual_seed(0)
    x, target, weight = torch.randn(6, 4), torch.randint(0, 9, (6,)), torch.randn(9, 4)
    loss, leaf = LinearCrossEntropyLoss(label_smoothing=0.1), x.clone().requires_grad_()

    def ours(x: Tensor) -> Tensor:
        return loss(x, target, weight)

    def whole(x: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight), target, label_smoothing=0.1)

    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(ours(leaf), leaf, create_graph=True)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        ours(forward_ad.make_dual(leaf, torch.ones_like(x)))
    with forward_ad.dual_level():
        tangents = [forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.flip(0)))).tangent for f in (ours, whole)]
    assert error(*tangents) < 1e-5
    for transform in (torch.func.grad, torch.func.hessian):
        assert error(transform(ours)(x), transform(whole)(x)) < 1e-5
    assert error(torch.func.vmap(ours)(x.view(1, 6, 4)), whole(x).view(1)) < 1e-6
    logits = torch.randn(6, 9, requires_grad=True)
    (first,) = torch.autograd.grad(loss(logits, target), logits, create_graph=True)
    first.square().sum().backward()
    assert logits.grad.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(4)}, r"x must have shape \[..., hidden\], hidden at least 1, got \[4\]"),
        ({"x": torch.randn(3, 0)}, r"hidden at least 1, got \[3, 0\]"),
        (
            {"target": torch.zeros(4).long()},
            r"target must have a label for each row of x, got shape \[4\] for x \[3, 4\]",
        ),
        ({"target": torch.zeros(3)}, "target must hold labels of an integer dtype, got float32"),
        ({"target": torch.zeros(3).bool()}, "target must hold labels of an integer dtype, got bool"),
        ({"weight": torch.randn(9, 5)}, r"weight must have shape \[V, hidden\] = \[V, 4\], .* got \[9, 5\]"),
        ({"weight": torch.randn(0, 4)}, r"V at least 1, got \[0, 4\]"),
        ({"bias": torch.randn(8)}, r"bias must have shape \[V\] = \[9\], got \[8\]"),
        ({"weight": None}, "bias must be None without a weight"),
    ],
    ids=range(9),
)
def test_inputs_that_do_not_fit_the_loss_are_named(change: dict[str, Any], message: str) -> None:
    call = {
        "x": torch.randn(3, 4),
        "target": torch.zeros(3).long(),
        "weight": torch.randn(9, 4),
        "bias": torch.randn(9),
    }
    for options in ({}, {"use_l2warp": True}):
        with pytest.raises(ValueError, match=message):
            LinearCrossEntropyLoss(**options)(**{**call, **change})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "none"}, "reduction must be mean or sum, got none"),
        ({"label_smoothing": 1.5}, r"label_smoothing must be in \[0, 1\], got 1.5"),
        ({"num_chunks": 0}, "num_chunks must be positive, got 0"),
        ({"logit_softcapping": 0.0}, "logit_softcapping must be None"),
    ],
)
def test_options_that_make_no_loss_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearCrossEntropyLoss(**options)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
def test_labels_may_have_any_integer_dtype(dtype: torch.dtype) -> None:
    x, target, weight = torch.randn(3, 4), torch.tensor([0, 8, 3]), torch.randn(9, 4)
    for call in ((x, weight), (F.linear(x, weight), None)):
        assert torch.equal(*(LinearCrossEntropyLoss()(call[0], t, call[1]) for t in (target, target.to(dtype))))


@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
def test_a_loss_of_no_rows_has_gradients_of_zero(options: dict[str, Any]) -> None:
    x, weight = torch.randn(0, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    loss = LinearCrossEntropyLoss(**options)(x, torch.zeros(0).long(), weight)
    loss.backward()
    assert loss == 0 and not weight.grad.any()


def test_flas_loss_of_logits_may_be_copied_when_it_is_converted() -> None:
    """As fla's models do for transformers' Trainer. It has fewer options, and one more reduction."""
    logits, target = torch.randn(3, 9), torch.tensor([1, -100, 8])
    for reduction in ("mean", "sum", "none"):
        model = nn.ModuleList([fla.modules.FusedCrossEntropyLoss(reduction=reduction, label_smoothing=0.1)])
        copied = copy.copy(convert(model)[0])
        expected = F.cross_entropy(logits, target, reduction=reduction, label_smoothing=0.1)
        assert type(copied) is LinearCrossEntropyLoss and torch.equal(copied(logits, target), expected)


def test_the_loss_without_targets_is_zero_and_without_a_weight_that_of_logits() -> None:
    torch.manual_seed(0)
    loss, nothing = LinearCrossEntropyLoss(), torch.full((3,), -100)
    assert loss(torch.randn(3, 4), nothing, torch.randn(9, 4)) == 0
    logits, target = torch.randn(3, 9), torch.tensor([1, -100, 8])
    assert loss(logits, target) == torch.nn.functional.cross_entropy(logits, target)


# ---------------------------------------------------------------------------------------------------------------------
# convert
# ---------------------------------------------------------------------------------------------------------------------


def small_model(**options: Any) -> KDAForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "head_dim": 8, "num_heads": 2, "num_hidden_layers": 2, "vocab_size": 50}
    return KDAForCausalLM(KDAConfig(**sizes, initializer_range=0.2, **options))


@pytest.mark.parametrize(
    "options", [{}, {"use_l2warp": True}, {"fuse_cross_entropy": False, "fuse_norm": False}], ids=str
)
def test_a_converted_model_trains_as_flas(options: dict[str, Any]) -> None:
    theirs = small_model(**options)
    ours = copy.deepcopy(theirs)
    assert convert(ours) is ours
    ids = torch.randint(0, 50, (2, 9))
    with fla_on_cpu():
        expected = theirs(ids, labels=ids)
        expected.loss.backward()
    actual = ours(ids, labels=ids)  # on the CPU, where nothing of fla's runs
    actual.loss.backward()
    assert error(actual.loss, expected.loss) < 1e-6
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert error(a.grad, b.grad) < 1e-4, name


def test_a_converted_model_compiles_with_the_number_of_items_in_a_batch() -> None:
    """As transformers' Trainer passes it, for gradient accumulation."""
    torch._dynamo.reset()
    model, ids = convert(small_model()), torch.randint(0, 50, (2, 9))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    loss = compiled(ids, labels=ids, num_items_in_batch=5).loss
    assert error(loss.detach(), (16 / 5 * model(ids, labels=ids).loss).detach()) < 1e-6


def test_a_converted_model_generates_flas_tokens() -> None:
    theirs = small_model().eval()
    ours = convert(copy.deepcopy(theirs))
    ids, mask = torch.randint(0, 50, (2, 4)), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    call = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with fla_on_cpu():
        expected = greedy_tokens(theirs, ids, 8, mask)
    assert torch.equal(ours.generate(ids, **call), expected)


def test_conversion_keeps_parameters_names_and_hooks() -> None:
    model = small_model()
    parameters, calls = dict(model.named_parameters()), []
    model.model.layers[0].attn.register_forward_hook(lambda *_: calls.append(1))
    convert(model)
    assert [type(m) for m in model.modules() if type(m).__name__ == "KimiDeltaAttention"] == [KimiDeltaAttention] * 2
    assert all(p is parameters[name] for name, p in model.named_parameters())
    model(torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]]))
    assert calls == [1]


def test_what_cannot_be_converted_stays_flas_and_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    model = small_model(lower_bound=-7.0, hidden_act="powlu")
    with caplog.at_level(logging.WARNING, "flashkda_ops"):
        convert(model)
    block = model.model.layers[1]
    assert type(block.attn) is fla.layers.kda.KimiDeltaAttention
    assert type(block.mlp) is fla.modules.GatedMLP
    assert type(block.attn_norm) is RMSNorm
    assert "model.layers.1.attn stays fla's KimiDeltaAttention: lower_bound is -7.0" in caplog.text
    assert "hidden_act is powlu" in caplog.text


def test_a_subclass_of_flas_layer_is_not_converted() -> None:
    class Special(fla.layers.kda.KimiDeltaAttention):  # type: ignore[misc]
        pass

    assert type(convert(Special(HIDDEN, head_dim=8, num_heads=2))) is Special
