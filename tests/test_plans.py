"""Calls that differ in nothing but what their tensors hold share a plan; all others have their own."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Hashable

import pytest
import torch
from helpers import TOKENS, Call, kernel_call, make_call, requiring_grad
from torch import Tensor

from flashkda_ops import chunk_kda, cuda
from flashkda_ops.ops import plans


@pytest.fixture(params=["the extension", "Python"])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reads tensors."""
    if request.param == "Python":
        monkeypatch.setattr(cuda, "_reader", lambda: cuda._read)
    elif cuda._reader() is cuda._read:
        pytest.skip("no extension, or a torch without DLPack's C exchange")


@pytest.fixture
def made(reader: None, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """One entry for each plan that is made."""
    plans.clear()
    calls, make = [], plans._make
    monkeypatch.setattr(plans, "_make", lambda call: (calls.append(call), make(call))[1])
    return calls


def case(seed: int = 0, **options: object) -> Call:
    return make_call(9, B=2, initial_state=True, seed=seed, **options)


def test_calls_with_other_contents_share_one(made: list[object]) -> None:
    for seed in range(3):
        chunk_kda(**case(seed))
    call = requiring_grad(case())
    chunk_kda(**call)[0].sum().backward()  # and so does the backward pass
    assert len(made) == 1


def misaligned(x: Tensor) -> Tensor:
    return torch.cat((x.new_empty(1), x.flatten()))[1:].view(x.shape)


def heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


CHANGES: dict[str, Callable[[Call], Call]] = {
    "tokens": lambda call: {name: call[name][:, :5] for name in ("q", "k", "v", "g", "beta")},
    "strides": lambda call: {"k": heads_first(call["k"])},
    "alignment": lambda call: {"g": misaligned(call["g"])},
    "dtype": lambda call: {"A_log": call["A_log"].half()},
    "an absent tensor": lambda call: {"dt_bias": None},
    "packed": lambda call: {
        **{name: call[name][:1] for name in ("q", "k", "v", "g", "beta")}, "cu_seqlens": torch.tensor([0, 3, 9])
    },
    "an option": lambda call: {"use_qk_l2norm_in_kernel": False},
    "the scale": lambda call: {"scale": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_call_that_differs_otherwise_has_its_own(change: str, made: list[object]) -> None:
    call = case()
    changed = {**call, **CHANGES[change](call)}
    expected = chunk_kda(**changed)[0]
    plans.clear()
    for _ in range(2):
        chunk_kda(**call)
        assert torch.equal(chunk_kda(**changed)[0], expected)
    assert len(made) == 3


def layouts(*tensors: Tensor | None) -> Hashable:
    assert cuda.read(tensors) is not None
    return cuda.layouts(tensors)


def test_layouts_differ_in_all_but_contents_and_places(reader: None) -> None:
    x = torch.zeros(4, 6, 8)
    tensors: list[Tensor | None] = [
        None, x[0, 0, 0], x[0, 0], x[0, :3, :2], x[:2, 0, :3], x[:0], x[:, :0], x, x.mT, x[1:], x[:, 1:],
        x.flatten()[1:], x[0, 0].expand(4, 6, 8), x.int(), x.half(), x.bfloat16(), x.bool(), x.view(torch.complex64),
    ]  # fmt: skip
    found = [layouts(y, None) for y in tensors]
    assert len(set(found)) == len(tensors) and layouts(None, x) not in found
    assert [layouts(None if y is None else y.detach(), None) for y in tensors] == found
    assert layouts(x, x) == layouts(torch.ones_like(x), x.clone())
    assert layouts(x.clone().requires_grad_(), torch.nn.Parameter(x)) == layouts(x, x)


def test_addresses_and_whether_gradients_are_wanted_are_read(reader: None) -> None:
    x, parameter = torch.zeros(4, 6)[1:, 3:], torch.nn.Parameter(torch.zeros(3))
    addresses = struct.pack("3Q", x.data_ptr(), 0, parameter.data_ptr())
    expected = None if cuda._reader() is cuda._read else addresses
    for last, needs in ((parameter, True), (parameter.detach(), False)):
        reading = cuda.read((x, None, last))
        assert reading is not None and reading[1] is needs and reading[2] == expected


class Subclass(Tensor):
    pass


def left_behind(transform: Callable[..., Callable[..., Tensor]]) -> Tensor:
    kept: list[Tensor] = []
    transform(lambda x: (kept.append(x), x.sum())[1])(torch.zeros(3))
    return kept[0]


NOT_PLAIN: dict[str, Callable[[], object]] = {
    "of a subclass": lambda: torch.zeros(3).as_subclass(Subclass),
    "to be negated": lambda: torch.zeros(3, dtype=torch.complex64).conj().imag,
    "left behind by vmap": lambda: left_behind(torch.func.vmap),
    "left behind by grad": lambda: left_behind(torch.func.grad),
    "no tensor": lambda: 3,
    "zeros that are stored nowhere": lambda: torch._efficientzerotensor(3),
}


@pytest.mark.parametrize("what", NOT_PLAIN)
def test_what_is_more_or_less_than_a_plain_tensor_is_not_read(what: str, reader: None) -> None:
    assert cuda.read((torch.zeros(3), NOT_PLAIN[what]())) is None  # type: ignore[arg-type]


def without_storage(x: Tensor) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    x.untyped_storage().resize_(0)
    return x


@pytest.mark.parametrize("name", [*TOKENS, "A_log", "dt_bias"])
def test_a_tensor_whose_storage_was_freed_is_an_error(name: str, reader: None) -> None:
    call = case()
    chunk_kda(**call)  # there is a plan for the calls like it
    freed = {**call, name: without_storage(call[name])}
    for op in (chunk_kda, torch.ops.flashkda.chunk_kda):
        with pytest.raises(ValueError, match=f"{name} must have storage"):
            op(**freed)
    empty = {name: x[:0] if name in (*TOKENS, "initial_state") else x for name, x in call.items()}
    assert chunk_kda(**empty)[0].shape[0] == 0  # which has no storage either


def test_zeros_that_are_stored_nowhere_are_zeros(reader: None) -> None:
    call = case()
    for name in TOKENS:
        nowhere = torch._efficientzerotensor(call[name].shape, dtype=call[name].dtype)
        expected = chunk_kda(**{**call, name: torch.zeros_like(call[name])})[0]
        for op in (chunk_kda, torch.ops.flashkda.chunk_kda):
            assert torch.equal(op(**{**call, name: nowhere})[0], expected)


def test_calls_on_what_is_not_read_have_plans(made: list[object]) -> None:
    call = case()
    expected = chunk_kda(**call)[0]
    parts = torch.complex(torch.zeros_like(call["v"]), -call["v"]).conj().imag
    assert parts.is_neg() and torch.equal(chunk_kda(**{**call, "v": parts})[0], expected)
    many = torch.zeros([1] * 60)  # dimensions, three times more than the extension takes
    assert cuda.layouts((many, many, many)) == cuda.layouts((many.clone(), many, many))


def test_another_exchange_than_dlpack_s_is_refused() -> None:
    extension, _ = cuda._load()
    if extension is None:
        pytest.skip("no extension")
    make = ctypes.pythonapi.PyCapsule_New
    make.restype, make.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    for name in (b"dltensor", None):
        with pytest.raises(ValueError, match="exchange"):
            extension.TensorReader(make(1, name, None), (Tensor,))
    with pytest.raises(TypeError):
        extension.TensorReader(1, (Tensor,))


def test_a_call_that_is_not_valid_is_never_planned(made: list[object]) -> None:
    call = case()
    for _ in range(2):
        with pytest.raises(ValueError, match="beta must have shape"):
            chunk_kda(**{**call, "beta": call["beta"][..., :1]})
    assert len(made) == 2 and not plans._plans


def test_plans_do_not_pile_up(made: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "_MOST", 3)
    for T in range(1, 9):
        chunk_kda(**make_call(T))
        assert 1 <= len(plans._plans) <= 3
    assert len(made) == 8


@pytest.mark.gpu
def test_the_kernels_read_every_layout_by_turns() -> None:
    call = kernel_call(70, B=2)
    layouts = [
        lambda x: x,
        heads_first,
        misaligned,
        lambda x: torch.stack((x, x), -1).unbind(-1)[0],
        lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
    ]

    def results(layout: Callable[[Tensor], Tensor]) -> list[Tensor]:
        rest = misaligned if layout is misaligned else layouts[0]
        changed = {n: layout(x) if n in TOKENS else rest(x) for n, x in call.items() if isinstance(x, Tensor)}
        leaves = {name: x.detach().requires_grad_() for name, x in changed.items()}
        o, state = chunk_kda(**{**call, **leaves}, output_final_state=True)
        cotangent = torch.linspace(-1, 1, o.numel(), device="cuda", dtype=o.dtype).view(o.shape)
        grads = torch.autograd.grad((o, state), list(leaves.values()), (layout(cotangent), torch.ones_like(state)))
        return [o, state, *grads]

    expected = results(layouts[0])
    for layout in (*layouts, *layouts):
        for x, wanted in zip(results(layout), expected, strict=True):
            assert torch.equal(x, wanted)
