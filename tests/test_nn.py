"""The layers of flashkda_ops.nn against fla's own, which run on the CPU as fla_on_cpu has them."""

from __future__ import annotations

import copy
import inspect
import logging
from typing import Any

import pytest
import torch
from helpers import error
from torch import Tensor, nn

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
from fla.models.cache_utils import Cache
from fla.models.kda import KDAConfig, KDAForCausalLM
from fla.modules.l2warp import l2_warp
from fla_on_cpu import fla_on_cpu

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
        ({"num_heads": 2, "num_v_heads": 3}, "num_v_heads"),
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


def test_a_cache_needs_a_layer_index_and_a_mask_two_dimensions() -> None:
    layer = KimiDeltaAttention(HIDDEN, head_dim=8, num_heads=2)
    with pytest.raises(ValueError, match="layer_idx"):
        layer(tokens(1, 2), past_key_values=Cache(), use_cache=True)
    with pytest.raises(ValueError, match="attention_mask"):
        layer(tokens(1, 2), attention_mask=torch.ones(1, 2, 2))


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


def test_the_loss_without_targets_is_zero_and_without_a_weight_that_of_logits() -> None:
    torch.manual_seed(0)
    loss, nothing = LinearCrossEntropyLoss(), torch.full((3,), -100)
    assert loss(torch.randn(3, 4), nothing, torch.randn(9, 4)) == 0
    logits, target = torch.randn(3, 9), torch.tensor([1, -100, 8])
    assert loss(logits, target) == torch.nn.functional.cross_entropy(logits, target)
    with pytest.raises(ValueError, match="reduction"):
        LinearCrossEntropyLoss(reduction="none")


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
        expected = theirs.generate(ids, **call)
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
