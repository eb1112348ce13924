"""Bad input: one ``ValueError`` that names the argument, the same from every way in, before anything runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TOKENS, Call, make_call, paged
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

import flashkda_ops
from flashkda_ops import portable, validation

Change = Callable[[Call], Call]
N = 3


def chunk_call() -> Call:
    return make_call(5, B=N, initial_state=True)


def paged_call() -> Call:
    return paged(make_call(1, B=N), torch.zeros(7, 4, 16, 8), torch.tensor([5, 0, 2]))


def backward_call() -> Call:
    call = make_call(5, B=N, initial_state=True)
    return {
        "do": torch.zeros(N, 5, 4, 8), "dht": torch.zeros(N, 4, 16, 8), "cu_seqlens": None, "scale": None, **call,
        "state_v_first": False, "batch_invariant": False, "output_mask": [True] * 8,
    }  # fmt: skip


CALLS: dict[str, Callable[[], Call]] = {
    "chunk_kda": chunk_call,
    "chunk_kda_backward": backward_call,
    "chunk_kda_paged": paged_call,
    "recurrent_kda_paged": paged_call,
    "recurrent_kda": chunk_call,  # a Python function alone
}


def packed(**changes: Any) -> Change:
    """Sequences packed along T, one token each."""

    def change(call: Call) -> Call:
        tokens = {
            name: call[name].flatten(0, 1).unsqueeze(0) for name in ("q", "k", "v", "g", "beta", "do") if name in call
        }
        return {**tokens, "cu_seqlens": torch.arange(0, call["q"].shape[:2].numel() + 1, call["q"].shape[1]), **changes}

    return change


def reshaped(name: str, *shape: int) -> Change:
    return lambda call: {name: torch.zeros(shape, dtype=call[name].dtype)}


def cast(name: str, dtype: torch.dtype) -> Change:
    return lambda call: {name: call[name].to(dtype)}


def options(**changes: Any) -> Change:
    return lambda call: changes


def three_tokens(call: Call) -> Call:
    return {name: call[name].repeat_interleave(3, 1) for name in TOKENS}


def raw_gate(**kept: Any) -> Change:
    """The log decay itself, with one argument of the gate left in."""
    return lambda call: {
        "use_gate_in_kernel": False, "lower_bound": None, "A_log": None, "dt_bias": None,
        **{name: call[name] for name in kept},
    }  # fmt: skip


TOKEN_ERRORS: list[tuple[str, Change]] = [
    ("q", reshaped("q", 5, 2, 16)),
    ("v", reshaped("v", 3)),
    ("k", reshaped("k", N, 5, 2, 17)),
    ("k", reshaped("k", N, 5, 1, 16)),
    ("k", reshaped("k", N, 5, 2)),
    ("v", reshaped("v", N, 9, 4, 8)),
    ("v", lambda c: {"v": c["v"][:, :, :3], "g": c["g"][:, :, :3], "beta": c["beta"][:, :, :3]}),
    ("v", lambda c: {"v": c["v"][..., :0]}),
    ("v", lambda c: {"v": c["v"][:, :, :0]}),
    ("q", lambda c: {"q": c["q"][..., :0], "k": c["k"][..., :0]}),
    ("q", lambda c: {"q": c["q"][:, :, :0], "k": c["k"][:, :, :0]}),
    ("g", reshaped("g", N, 5, 2, 16)),
    ("g", lambda c: {"g": c["g"][..., :1]}),
    ("beta", lambda c: {"beta": c["beta"].unsqueeze(-1)}),
    ("beta", lambda c: {"beta": c["beta"][:1]}),
    ("q", cast("q", torch.int64)),
    ("q", cast("q", torch.complex64)),
    ("q", cast("q", torch.float8_e4m3fn)),
    ("k", cast("k", torch.bfloat16)),
    ("v", cast("v", torch.float64)),
    ("g", cast("g", torch.float64)),
    ("g", cast("g", torch.float16)),
    ("beta", cast("beta", torch.bfloat16)),
    ("beta", cast("beta", torch.bool)),
    ("A_log", reshaped("A_log", 2)),
    ("A_log", lambda c: {"A_log": c["A_log"].unsqueeze(-1)}),
    ("A_log", cast("A_log", torch.float64)),
    ("A_log", cast("A_log", torch.int32)),
    ("A_log", options(A_log=None, lower_bound=None)),
    ("dt_bias", lambda c: {"dt_bias": c["dt_bias"].flatten()[:-1]}),
    ("dt_bias", lambda c: {"dt_bias": c["dt_bias"].mT}),
    ("dt_bias", lambda c: {"dt_bias": c["dt_bias"].unsqueeze(0)}),
    ("dt_bias", cast("dt_bias", torch.float64)),
    ("lower_bound", options(lower_bound=0.0)),
    ("lower_bound", options(lower_bound=-5.5)),
    ("lower_bound", options(lower_bound=float("nan"))),
    ("allow_neg_eigval", options(allow_neg_eigval=True, use_beta_sigmoid_in_kernel=False)),
    ("cu_seqlens", packed(cu_seqlens=torch.zeros(1, dtype=torch.int64))),
    ("cu_seqlens", packed(cu_seqlens=torch.zeros(2, 2, dtype=torch.int64))),
    ("cu_seqlens", packed(cu_seqlens=torch.zeros(4))),
    ("cu_seqlens", packed(cu_seqlens=torch.zeros(4, dtype=torch.int16))),
    ("q", options(cu_seqlens=torch.tensor([0, 1]))),
]  # fmt: skip
GATE_ERRORS: list[tuple[str, Change]] = [
    ("A_log", raw_gate(A_log=True)),
    ("dt_bias", raw_gate(dt_bias=True)),
    ("lower_bound", raw_gate(lower_bound=True)),
]
STATE_ERRORS: list[tuple[str, Change]] = [
    ("initial_state", reshaped("initial_state", N, 4, 8, 16)),
    ("initial_state", options(state_v_first=True)),
    ("initial_state", reshaped("initial_state", N + 1, 4, 16, 8)),
    ("initial_state", reshaped("initial_state", N - 1, 4, 16, 8)),
    ("initial_state", reshaped("initial_state", N, 64, 8)),
    ("initial_state", cast("initial_state", torch.bfloat16)),
    ("initial_state", cast("initial_state", torch.float64)),
    ("initial_state", packed(initial_state=torch.zeros(1, 4, 16, 8))),
]
BACKWARD_ERRORS: list[tuple[str, Change]] = [
    ("do", reshaped("do", N, 5, 4, 16)),
    ("do", cast("do", torch.bfloat16)),
    ("dht", reshaped("dht", N, 4, 8, 16)),
    ("dht", cast("dht", torch.bfloat16)),
    ("output_mask", options(output_mask=[True] * 7)),
    ("output_mask", options(output_mask=[True] * 8, initial_state=None)),
]
POOL_ERRORS: list[tuple[str, Change]] = [
    ("state_pool", reshaped("state_pool", 7, 4, 8, 16)),
    ("state_pool", reshaped("state_pool", 7, 64, 8)),
    ("state_pool", options(state_v_first=True)),
    ("state_pool", cast("state_pool", torch.float16)),
    ("state_pool", cast("state_pool", torch.float64)),
    ("state_pool", options(state_pool=torch.zeros(7, 4, 8, 16).mT)),
    ("state_pool", options(state_pool=torch.zeros(7, 4, 16, 9)[..., :8])),
    ("state_pool", options(state_pool=torch.zeros(4, 7, 16, 8).transpose(0, 1))),
    ("state_pool", options(state_pool=torch.zeros(1, 4, 16, 8).expand(7, -1, -1, -1))),
    ("state_indices", reshaped("state_indices", N + 1)),
    ("state_indices", reshaped("state_indices", 1, 1, N)),
    ("state_indices", cast("state_indices", torch.int16)),
    ("state_indices", cast("state_indices", torch.float32)),
]
CHECKPOINTS = torch.tensor([[3, 4], [6, -1], [-1, -1]])
PREFILL_ERRORS: list[tuple[str, Change]] = [
    ("state_indices", reshaped("state_indices", N, 2)),
    ("has_initial_state", options(has_initial_state=torch.ones(N))),
    ("has_initial_state", options(has_initial_state=torch.ones(N + 1, dtype=torch.bool))),
    ("checkpoint_offsets", options(checkpoint_indices=CHECKPOINTS)),
    ("checkpoint_indices", options(checkpoint_offsets=CHECKPOINTS)),
    ("checkpoint_offsets", options(checkpoint_offsets=CHECKPOINTS[:, :1], checkpoint_indices=CHECKPOINTS)),
    ("checkpoint_offsets", options(checkpoint_offsets=CHECKPOINTS.float(), checkpoint_indices=CHECKPOINTS)),
    ("checkpoint_indices", options(checkpoint_offsets=CHECKPOINTS, checkpoint_indices=CHECKPOINTS[0])),
    ("checkpoint_indices", options(checkpoint_offsets=CHECKPOINTS, checkpoint_indices=CHECKPOINTS.short())),
    ("checkpoint_indices", options(checkpoint_offsets=CHECKPOINTS[:, :0], checkpoint_indices=CHECKPOINTS[:, :0])),
]
SLOTS_PER_TOKEN = torch.tensor([[5, 1], [0, 3], [2, 4]])
DECODE_ERRORS: list[tuple[str, Change]] = [
    ("state_indices", reshaped("state_indices", N, 0)),
    ("state_indices", lambda c: {**three_tokens(c), "state_indices": SLOTS_PER_TOKEN}),
    ("num_accepted_tokens", options(num_accepted_tokens=torch.ones(N, dtype=torch.int64))),
    (
        "num_accepted_tokens",
        options(state_indices=SLOTS_PER_TOKEN, num_accepted_tokens=torch.ones(1, dtype=torch.int64)),
    ),
    ("num_accepted_tokens", options(state_indices=SLOTS_PER_TOKEN, num_accepted_tokens=torch.ones(N))),
]

OWN_ERRORS = {
    "chunk_kda": [*STATE_ERRORS, ("checkpoint_interval", options(checkpoint_interval=24))],
    "chunk_kda_backward": [*GATE_ERRORS, *STATE_ERRORS, *BACKWARD_ERRORS],
    "chunk_kda_paged": [*GATE_ERRORS, *POOL_ERRORS, *PREFILL_ERRORS],
    "recurrent_kda_paged": [*GATE_ERRORS, *POOL_ERRORS, *DECODE_ERRORS],
    "recurrent_kda": STATE_ERRORS,
}
EVERY_ERROR = [
    pytest.param(name, argument, change, id=f"{name}-{argument}-{i}")
    for name, own in OWN_ERRORS.items()
    for i, (argument, change) in enumerate((*TOKEN_ERRORS, *own))
]


def ways_in(name: str, call: Call) -> dict[str, Callable[[Call], Any]]:
    """The Python function and the op of one name, as far as they exist and have these arguments."""
    ways = {}
    function = getattr(flashkda_ops, name, None)
    if function is not None and "checkpoint_interval" not in call:
        ways["function"] = lambda call: function(**call)
    op = getattr(torch.ops.flashkda, name, None)
    if op is not None:
        ways["op"] = lambda call: op(**call)
    return ways


def on_fake_tensors(way: Callable[[Call], Any], call: Call) -> Any:
    mode = FakeTensorMode()
    fake = tree_map_only(Tensor, mode.from_tensor, call)
    with mode:
        return way(fake)


def on_meta_tensors(way: Callable[[Call], Any], call: Call) -> Any:
    return way(tree_map_only(Tensor, lambda x: x.new_empty_strided(x.shape, x.stride(), device="meta"), call))


def message(function: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as caught:
        function()
    assert type(caught.value) is ValueError
    return str(caught.value)


@pytest.mark.parametrize("name", CALLS)
def test_the_calls_that_the_errors_start_from_are_good(name: str) -> None:
    for change in (options(), packed()):
        call = CALLS[name]()
        call |= change(call)
        for way in ways_in(name, call).values():
            way(call)
            on_meta_tensors(way, call)
            on_fake_tensors(way, call)


@pytest.mark.parametrize(("name", "argument", "change"), EVERY_ERROR)
def test_every_way_in_names_the_argument_in_the_same_words(name: str, argument: str, change: Change) -> None:
    call = CALLS[name]()
    call |= change(call)
    before = tree_map_only(Tensor, Tensor.clone, call)
    texts = set()
    for way in ways_in(name, call).values():
        texts.add(message(lambda way=way: way(call)))
        texts.add(message(lambda way=way: on_meta_tensors(way, call)))
        texts.add(message(lambda way=way: on_fake_tensors(way, call)))
    assert len(texts) == 1, texts
    (text,) = texts
    assert text.startswith((f"{argument} must", f"{argument}=", f"{argument} requires")), text
    assert not set(text) & set("'\"\n")
    for key, x in before.items():
        if isinstance(x, Tensor):
            assert torch.equal(call[key].contiguous().view(torch.uint8), x.contiguous().view(torch.uint8)), key


@pytest.mark.parametrize("name", CALLS)
def test_no_argument_may_be_on_another_device(name: str) -> None:
    good = CALLS[name]()
    if name == "chunk_kda_paged":
        good["has_initial_state"] = torch.ones(N, dtype=torch.bool)
        good |= {"checkpoint_offsets": CHECKPOINTS, "checkpoint_indices": CHECKPOINTS}
    if name == "recurrent_kda_paged":
        good |= {
            "state_indices": torch.tensor([[5], [0], [2]]),
            "num_accepted_tokens": torch.ones(N, dtype=torch.int32),
        }
    calls = [good]
    if name == "chunk_kda":
        calls.append({**good, **packed()(good)})
    for call in calls:
        for argument in (key for key, x in call.items() if isinstance(x, Tensor) and key != "q"):
            mixed = {**call, argument: call[argument].to("meta")}
            for way in ways_in(name, mixed).values():
                assert message(lambda way=way, mixed=mixed: way(mixed)).startswith(f"{argument} must be on cpu"), (
                    argument
                )


BAD_TYPES: dict[str, list[Any]] = {
    "Tensor": [[0, 1], (0.5,), np.zeros(3), 3, "text", {}],
    "float": ["text", b"1", "1.0", [1.0], 1j, torch.ones(2)],
    "bool": ["text", [True], {}],
}
PYTHON_FUNCTIONS = ("chunk_kda", "chunk_kda_paged", "recurrent_kda", "recurrent_kda_paged")


@pytest.mark.parametrize("name", PYTHON_FUNCTIONS)
def test_an_argument_of_another_type_is_named_with_what_it_may_be(name: str) -> None:
    call, function = CALLS[name](), getattr(flashkda_ops, name)
    call.pop("initial_state", None)  # whose shape would be told from an option, whatever that is
    op = "recurrent_kda_paged" if name == "recurrent_kda" else name
    schema = {x.name: str(x.type) for x in getattr(torch.ops.flashkda, op).default._schema.arguments}
    schema["initial_state"] = "Optional[Tensor]"
    checked = 0
    for argument in inspect.signature(function).parameters:
        kind = schema.get(argument)
        if kind is None:
            continue
        optional = kind.startswith("Optional[")
        kind = kind.removeprefix("Optional[").removesuffix("]")
        expected = {"Tensor": "a Tensor", "bool": "a bool", "float": "a number"}[kind] + (
            " or None" if optional else ""
        )
        for value in BAD_TYPES[kind] + ([None] if kind == "Tensor" and not optional else []):
            bad, what = {**call, argument: value}, "None" if value is None else type(value).__name__
            text = f"{argument} must be {expected}, got {what}"
            assert message(lambda bad=bad: function(**bad)) == text
            assert message(lambda bad=bad: on_fake_tensors(lambda call: function(**call), bad)) == text
            assert message(lambda bad=bad: torch.vmap(lambda x: function(**bad))(torch.ones(2))) == text
            checked += 1
    assert checked > 60


@pytest.mark.parametrize("name", PYTHON_FUNCTIONS)
def test_another_error_than_one_of_types_stays_what_it_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise torch.cuda.OutOfMemoryError("none left")

    for path in ("chunk_kda", "recurrent_kda_paged"):
        monkeypatch.setattr(portable, path, fail)
    with pytest.raises(torch.cuda.OutOfMemoryError, match="none left"):
        getattr(flashkda_ops, name)(**CALLS[name]())


def test_python_arguments_are_checked_too() -> None:
    call = chunk_call()
    for argument, change in {
        "cp_context": {"cp_context": object()},
        "chunk_size": {"chunk_size": 16},
        "lower_bound": {"safe_gate": True, "lower_bound": None},
        "return_intermediate_states": {"return_intermediate_states": True},
        "transpose_state_layout": {"state_v_first": True, "transpose_state_layout": True},
    }.items():
        assert message(lambda change=change: flashkda_ops.chunk_kda(**call | change)).startswith(argument)


# ---------------------------------------------------------------------------------------------------------------------
# Values of index tensors, in checked mode
# ---------------------------------------------------------------------------------------------------------------------

CU_SEQLENS = [([1, 2, 3, 4], "start at 0"), ([0, 2, 1, 3], "never decrease"), ([0, 1, 2, 99], "at or before T = ")]


@pytest.fixture(params=["validate=True", "FLASHKDA_CHECK=1"])
def checked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Either way to ask for the check, as arguments of a call."""
    if request.param == "validate=True":
        return {"validate": True}
    monkeypatch.setattr(validation, "CHECK_VALUES", True)
    return {}


@pytest.mark.parametrize(("bounds", "text"), CU_SEQLENS)
@pytest.mark.parametrize("name", ["chunk_kda", "chunk_kda_paged", "recurrent_kda_paged", "recurrent_kda"])
def test_checked_calls_reject_a_malformed_cu_seqlens(name: str, bounds: list[int], text: str, checked: Call) -> None:
    call = CALLS[name]()
    call |= packed()(call)
    bad = call | {"cu_seqlens": torch.tensor(bounds)}
    for way in ways_in(name, call).values():
        way(call | checked)
        assert text in message(lambda way=way: way(bad | checked))


def test_unchecked_calls_read_no_values() -> None:
    call = chunk_call()
    call |= packed(cu_seqlens=torch.tensor(CU_SEQLENS[0][0]))(call)
    flashkda_ops.chunk_kda(**call)


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("chunk_kda_paged", {"state_indices": torch.tensor([1, 2, 1])}, "state_indices must name each row"),
        (
            "chunk_kda_paged",
            {"checkpoint_indices": torch.tensor([[3], [4], [0]]), "checkpoint_offsets": torch.ones(N, 1).int()},
            "state_indices and checkpoint_indices must name each row",
        ),
        ("recurrent_kda_paged", {"state_indices": torch.tensor([1, 2, 1])}, "state_indices must name each row"),
        (
            "recurrent_kda_paged",
            {"state_indices": torch.tensor([[0], [1], [2]]), "num_accepted_tokens": torch.tensor([1, 2, 1])},
            "num_accepted_tokens must be in [1, 1]",
        ),
        (
            "recurrent_kda_paged",
            packed(cu_seqlens=torch.tensor([0, 2, 2, 3]), state_indices=torch.tensor([[0], [1], [2]]))(paged_call()),
            "state_indices must have a slot a token",
        ),
    ],
)  # fmt: skip
def test_checked_calls_reject_bad_slots(name: str, change: Call, text: str, checked: Call) -> None:
    call = CALLS[name]() | change
    for way in ways_in(name, call).values():
        assert text in message(lambda way=way: way(call | checked))


def test_padding_slots_may_repeat_in_checked_calls(checked: Call) -> None:
    flashkda_ops.recurrent_kda_paged(**paged_call() | {"state_indices": torch.tensor([-1, -1, 99])} | checked)
