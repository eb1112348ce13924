"""The KDA models of transformers give the same with flashkda_ops as on their own PyTorch path."""

from __future__ import annotations

import copy
import functools
import logging
import pickle
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_models import KDA_FUNCTIONS, MODELS, make_model, modeling, prompts, use_own_path
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flashkda_ops import cuda
from flashkda_ops.integrations import transformers as integration
from flashkda_ops.nn import convert

TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def own_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    use_own_path(monkeypatch)
    yield
    integration.disable()


class Recorded(TorchDispatchMode):
    """The calls of our ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "flashkda":
            self.calls.append((func._opname, args))
        return func(*args, **kwargs or {})

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


def padded(batch: int = 2, tokens: int = 70) -> dict[str, Tensor]:
    """Prompts, the last of which has padding on the left."""
    mask = torch.ones(batch, tokens, dtype=torch.long)
    mask[-1, :7] = 0
    return {"input_ids": prompts(batch, tokens), "attention_mask": mask}


def close(actual: Tensor, expected: Tensor) -> None:
    assert torch.isfinite(expected).all() and expected.any()
    assert (actual - expected).norm() < TOLERANCE * expected.norm()


def step(model: Any, **inputs: Any) -> dict[str, Tensor]:
    """Logits, loss and gradients of a training step."""
    model.zero_grad(set_to_none=True)
    out = model(**inputs, labels=inputs["input_ids"], use_cache=False)
    out.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), "loss": out.loss.detach(), **grads}


@pytest.mark.parametrize("name", MODELS)
def test_logits_loss_and_gradients_are_those_of_the_own_path_with_padding(name: str) -> None:
    model = make_model(name)
    expected = step(model, **padded())
    integration.enable()
    with Recorded() as recorded:
        actual = step(model, **padded())
    assert recorded.names == ["chunk_kda", "chunk_kda"] + ["chunk_kda_backward"] * 2
    assert actual.keys() == expected.keys()
    assert any("A_log" in key for key in actual)
    for key in actual:
        if expected[key].any():
            close(actual[key], expected[key])
        else:
            assert not actual[key].any()


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_those_of_the_own_path(name: str) -> None:
    model = make_model(name)
    options = {"max_new_tokens": 5, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    expected = model.generate(**padded(), **options)
    integration.enable()
    with Recorded() as recorded:
        actual = model.generate(**padded(), **options)
    assert recorded.names == ["chunk_kda"] * 2 + ["recurrent_kda_paged"] * 8  # a prefill, four steps, two layers
    assert torch.equal(actual.sequences, expected.sequences)
    close(torch.stack(actual.scores), torch.stack(expected.scores))


def test_a_cache_continues_a_prompt_in_pieces_of_any_length() -> None:
    model, tokens = make_model("kimi_linear"), prompts(2, 80)
    with torch.no_grad():
        expected = model(tokens).logits
        integration.enable()
        cache, parts = None, []
        for piece in tokens.split([37, 1, 30, 1, 1, 10], dim=1):
            out = model(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    close(torch.cat(parts, 1), expected)


def conv_of_packed(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """causal_conv1d keeps sequences apart by seq_idx; it needs a GPU, and transformers' own convolution cannot."""
    alone = module.causal_conv1d_fn

    def packed(x: Tensor, *, seq_idx: Tensor, cu_seq_lens_q: Tensor, **options: Any) -> Tensor:
        options = {name: options[name] for name in ("weight", "bias", "activation")}
        return torch.cat([alone(part, **options) for part in x.split(cu_seq_lens_q.diff().tolist(), dim=-1)], -1)

    monkeypatch.setattr(module, "causal_conv1d_fn", packed)


@pytest.mark.parametrize("name", ["kimi_linear", "bailing_hybrid"])
def test_packed_sequences_are_those_run_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import DataCollatorWithFlattening

    model, lengths = make_model(name), (37, 5, 70)
    sequences = [prompts(1, n, seed=n) for n in lengths]
    total = sum(model(x, use_cache=False).logits.square().sum() for x in sequences)
    expected = torch.cat([model(x, use_cache=False).logits for x in sequences], 1).detach()
    expected_grads = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)

    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = collate([{"input_ids": x[0].tolist()} for x in sequences])
    batch.pop("labels")
    conv_of_packed(modeling(name), monkeypatch)
    integration.enable()
    logits = model(**batch, use_cache=False).logits
    close(logits, expected)
    for actual, wanted in zip(
        torch.autograd.grad(logits.square().sum(), list(model.parameters()), allow_unused=True),
        expected_grads,
        strict=True,
    ):
        assert (actual is None) == (wanted is None)
        if wanted is not None:
            close(actual, wanted)


@pytest.mark.parametrize("contiguous", [True, False])
def test_slices_of_one_convolution_reach_the_op_without_a_copy(
    contiguous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, model = modeling("kimi_linear"), make_model("kimi_linear")
    own, convolved = module.causal_conv1d_fn, []

    def conv(*args: Any, **kwargs: Any) -> Tensor:
        out = own(*args, **kwargs)
        if contiguous:  # as causal_conv1d gives it: the channels of a token in a row
            out = out.transpose(1, 2).contiguous().transpose(1, 2)
        convolved.append(out)
        return out

    monkeypatch.setattr(module, "causal_conv1d_fn", conv)
    integration.enable()
    with torch.no_grad(), Recorded() as recorded:
        model(prompts(), use_cache=False)
    assert len(recorded.calls) == len(convolved) == 2
    for (_, args), out in zip(recorded.calls, convolved, strict=True):
        for i, x in enumerate(args[:3]):
            assert x.untyped_storage().data_ptr() == out.untyped_storage().data_ptr()
            assert x.storage_offset() == i * 16 * (1 if contiguous else 70)
            assert (x.stride(-1) == 1) == contiguous
            # The kernel is given the same memory, or one copy.
            assert cuda._tma_strides(x) == (x.stride()[:3] if contiguous else None)


def test_states_of_a_cache_keep_the_layout_of_the_decode_kernel() -> None:
    model = make_model("kimi_linear")
    integration.enable()
    with torch.no_grad():
        cache = model(prompts(), use_cache=True).past_key_values
        model(prompts(2, 1), past_key_values=cache, use_cache=True)
    for layer in (0, 2):
        state = cache.layers[layer].recurrent_states[0]
        assert state.dtype == torch.float32
        assert state.transpose(-1, -2).is_contiguous()


def call(**changes: Any) -> dict[str, Any]:
    q, k, v, g = torch.randn(4, 2, 5, 2, 8, generator=torch.Generator().manual_seed(0))
    tokens = {"query": q, "key": k, "value": v, "g": F.logsigmoid(g), "beta": torch.rand(2, 5, 2)}
    return tokens | {"initial_state": None, "output_final_state": True} | changes


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"query": torch.ones(2, 5, 2, 8, dtype=torch.bfloat16)}, "q, k, v are torch.bfloat16, torch.float32"),
        (  # a model in fp64, whose gate is fp32
            {name: torch.ones(2, 5, 2, 8, dtype=torch.float64) for name in ("query", "key", "value")},
            "g is torch.float32 beside q, k, v of torch.float64",
        ),
        ({"beta": torch.ones(2, 5, 2, dtype=torch.bfloat16)}, "beta is torch.bfloat16 beside q, k, v of torch.float32"),
        ({"initial_state": torch.ones(2, 2, 8, 8, dtype=torch.bfloat16)}, "where it must be torch.float32"),
        ({"use_gate_in_kernel": True}, "use_gate_in_kernel is given"),
        ({"scale": 1.0}, "scale is given"),
        ({"seq_idx": torch.zeros(2, 5, dtype=torch.int32)}, "seq_idx is given without cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens is given with a batch of 2, which must be 1"),
        ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int16)}, "must be torch.int32 or torch.int64"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
@pytest.mark.parametrize("function", KDA_FUNCTIONS)
def test_what_is_declined_goes_to_the_path_that_was_there(
    function: str, changes: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    module, arguments = modeling("kimi_linear"), call(**changes)
    expected = getattr(module, function)(**arguments)
    integration.enable()
    integration._log_once.cache_clear()
    with caplog.at_level(logging.WARNING, integration.__name__), Recorded() as recorded:
        for _ in range(2):
            actual = getattr(module, function)(**arguments)
    assert recorded.names == []
    assert [record.getMessage() for record in caplog.records if reason in record.getMessage()] == [
        caplog.records[0].getMessage()
    ]
    for x, wanted in zip(actual, expected, strict=True):
        assert torch.equal(x, wanted)


@pytest.mark.parametrize("function", KDA_FUNCTIONS)
def test_one_token_trains_too(function: str) -> None:
    module = modeling("kimi_linear")
    arguments = {name: x[:, :1] if isinstance(x, Tensor) else x for name, x in call().items()}
    arguments["initial_state"] = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    tensors = [x.requires_grad_() for x in arguments.values() if isinstance(x, Tensor)]

    def gradients() -> tuple[Tensor, ...]:
        o, state = getattr(module, function)(**arguments)
        return torch.autograd.grad(o.square().sum() + state.sin().sum(), tensors)

    expected = gradients()
    integration.enable()
    for x, wanted in zip(gradients(), expected, strict=True):
        close(x, wanted)


def functions() -> list[Any]:
    return [getattr(modeling(name), function) for name in MODELS for function in KDA_FUNCTIONS]


def test_enabling_twice_and_disabling_leaves_the_functions_that_were_there(caplog: pytest.LogCaptureFixture) -> None:
    before = functions()
    integration.disable()
    assert functions() == before
    for _ in range(2):
        integration.enable()
        during = functions()
        integration.enable()
        assert functions() == during and all(x is not y for x, y in zip(before, during, strict=True))
        integration.disable()
        integration.disable()
        assert functions() == before
    assert [record for record in caplog.records if record.name == integration.__name__] == []


@pytest.mark.parametrize("function", KDA_FUNCTIONS)
def test_a_wrapper_that_came_later_stays_and_ours_hands_its_calls_on(
    function: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module, calls = modeling("kimi_linear"), []
    theirs = getattr(module, function)
    integration.enable()
    ours = getattr(module, function)

    @functools.wraps(ours)
    def profiled(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return ours(*args, **kwargs)

    def names() -> list[str]:
        with Recorded() as recorded, torch.no_grad():
            getattr(module, function)(**call())
        return recorded.names

    monkeypatch.setattr(module, function, profiled)
    assert len(names()) == 1 == len(calls)
    integration.disable()
    assert getattr(module, function) is profiled and names() == [] and len(calls) == 2
    message = caplog.records[-1].getMessage()
    assert message.startswith(f"{module.__name__}.{function} is left as it is: profiled ({__file__}, line ")
    assert message.endswith("wraps ours, which now hands its calls on")
    integration.enable()
    assert getattr(module, function) is profiled and len(names()) == 1 and len(calls) == 3
    monkeypatch.setattr(module, function, ours)  # the profiler ends
    integration.disable()
    assert getattr(module, function) is theirs


def test_a_module_that_was_imported_anew_is_served_and_both_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    old = modeling("kimi_linear")
    before = [getattr(old, function) for function in KDA_FUNCTIONS]
    integration.enable()
    new = ModuleType(old.__name__)
    vars(new).update({name: x for name, x in vars(old).items() if name not in KDA_FUNCTIONS})
    for function, own in zip(KDA_FUNCTIONS, before, strict=True):
        setattr(new, function, own)
    monkeypatch.setitem(sys.modules, old.__name__, new)
    integration.enable()
    for module in (old, new):
        assert all(getattr(module, name) is not own for name, own in zip(KDA_FUNCTIONS, before, strict=True))
    integration.disable()
    for module in (old, new):
        assert [getattr(module, name) for name in KDA_FUNCTIONS] == before


def later_module(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> ModuleType:
    """The modeling file of a later release, with these functions, and the only one there is."""
    module = ModuleType("transformers.models.later.modeling_later")
    module.__spec__ = ModuleSpec(module.__name__, None)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(integration, "MODELS", ("later",))
    monkeypatch.setattr(integration, "_exists", lambda name: name == module.__name__)
    return module


def test_a_new_parameter_is_reported_and_left_to_the_function_that_has_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def chunk(query, key, value, g, beta, cap=0.0, chunk_size=64, initial_state=None, output_final_state=True,
              use_qk_l2norm_in_kernel=False, **kwargs):  # type: ignore[no-untyped-def]  # fmt: skip
        return "theirs"

    module = later_module(monkeypatch, chunk_kimi_delta_attention=chunk)
    integration.enable()
    (message,) = [record.getMessage() for record in caplog.records]
    assert f"{module.__name__}.chunk_kimi_delta_attention is not the function that flashkda_ops knows" in message
    assert "cap is new, 0.0 by default; output_final_state is True by default, and was False by default" in message
    assert message.endswith("Calls that give what is new are left to it")
    served, arguments = module.chunk_kimi_delta_attention, call()
    arguments.pop("output_final_state")
    o, state = served(**arguments)
    assert state is not None  # by their default
    assert served(**arguments, cap=1.0) == "theirs"
    assert "cap is given, which flashkda_ops does not know" in caplog.text
    tokens = [arguments.pop(name) for name in ("query", "key", "value", "g", "beta")]
    assert torch.equal(served(*tokens, 0.0, **arguments)[0], o) and served(*tokens, 1.0) == "theirs"
    integration.disable()
    assert module.chunk_kimi_delta_attention is chunk


def test_a_function_with_a_new_required_parameter_is_left_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def chunk(query, key, value, g, beta, cap, **kwargs):  # type: ignore[no-untyped-def]
        return "theirs"

    own = modeling("kimi_linear").recurrent_kimi_delta_attention
    module = later_module(monkeypatch, chunk_kimi_delta_attention=chunk, recurrent_kimi_delta_attention=own)
    integration.enable()
    assert module.chunk_kimi_delta_attention is chunk and module.recurrent_kimi_delta_attention is not own
    (message,) = [record.getMessage() for record in caplog.records]
    assert "cap is new and required" in message and message.endswith("It is left as it is")
    integration.disable()
    assert module.chunk_kimi_delta_attention is chunk and module.recurrent_kimi_delta_attention is own


def test_a_release_without_kda_models_is_an_error_that_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration, "MODELS", ("no_such_model",))
    import transformers

    with pytest.raises(
        ImportError, match=rf"transformers {transformers.__version__} has no model whose KDA .* it serves no_such_model"
    ):
        integration.enable()
    monkeypatch.setattr(integration, "_exists", lambda name: False)
    with pytest.raises(
        ImportError, match="transformers is not installed, whose models no_such_model flashkda_ops serves"
    ):
        integration.enable()


@pytest.mark.parametrize("name", MODELS)
def test_convert_says_what_serves_a_model_of_transformers(name: str) -> None:
    model = make_model(name)
    got = f"got {type(model).__name__} with layers of transformers"
    with pytest.raises(ValueError, match=rf"{got}: flashkda_ops\.integrations\.transformers\.enable\(\) serves"):
        convert(model)


def test_transformers_is_imported_by_enable_alone() -> None:
    code = "import sys, flashkda_ops.integrations.transformers; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_served_model_is_copied_and_pickled(duplicate: Any) -> None:
    integration.enable()
    model = make_model("kimi_linear")
    twin = duplicate(model)
    with torch.no_grad():
        assert torch.equal(twin(prompts()).logits, model(prompts()).logits)
