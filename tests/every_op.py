"""One call of every op, whatever the layout of its tokens, and its results by name; what an op does inside."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar
from unittest import mock

import torch
from helpers import DEFAULTS, DIFFERENTIABLE, Call, cotangents, paged
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flashkda_ops import portable
from flashkda_ops.ops import chunk_kda, chunk_kda_backward, chunk_kda_paged, recurrent_kda_paged

Results = dict[str, Tensor]

BATCHED = ("q", "k", "v", "g", "beta", "do", "o", "dq", "dk", "dv", "dg", "dbeta", "states between")
"""Arguments and results with the rows of the batch first. The others have the sequences first, but for these:"""

SUMMED = ("A_log", "dt_bias", "dA_log", "ddt_bias")

_GRADIENTS = ("dq", "dk", "dv", "dg", "dbeta", "dA_log", "ddt_bias", "dinitial_state")
_flashkda = torch.ops.flashkda


def _arguments(call: Call, *but: str) -> Call:
    return {name: x for name, x in call.items() if name not in but}


def with_cotangents(call: Call) -> Call:
    do, dht = cotangents(call)
    return {**call, "do": do, "dht": dht}


def forward(call: Call, **options: Any) -> Results:
    outputs = _flashkda.chunk_kda(**_arguments(call, "do", "dht"), output_final_state=True, **options)
    names = ("o", "final_state", "states between")[: 3 if options.get("checkpoint_interval") else 2]
    return dict(zip(names, outputs, strict=False))


def backward(call: Call, mask: tuple[bool, ...] = (True,) * 8, **options: Any) -> Results:
    call = DEFAULTS | call
    wanted = [asked and (i < 5 or call[DIFFERENTIABLE[i]] is not None) for i, asked in enumerate(mask)]
    grads = _flashkda.chunk_kda_backward(**(call | options), output_mask=wanted)
    return {name: grad for name, grad, is_wanted in zip(_GRADIENTS, grads, wanted, strict=True) if is_wanted}


def transition(call: Call) -> Results:
    M, B = _flashkda.chunk_kda_transition(**_arguments(call, "q", "initial_state", "do", "dht"))
    return {"M": M, "B": B}


def on_a_pool(call: Call, op: Any, beside: int = 0, **options: Any) -> Results:
    """With the initial states in the first rows of a pool, and for each sequence some rows that hold nothing."""
    state = call["initial_state"]
    N = state.shape[0]
    pool = torch.cat((state, state.new_full((N * beside, *state.shape[1:]), torch.nan)))
    rows = torch.arange(N * (1 + beside), device=state.device)
    own, others = rows[:N], rows[N:].view(N, beside)
    slots = torch.cat((own[:, None], others), 1) if options.pop("slots", False) else own
    if options.pop("checkpoints", False):
        options["checkpoint_offsets"] = torch.arange(1, 1 + 20 * beside, 20, device=state.device).expand(N, beside)
        options["checkpoint_indices"] = others
    o = op(**paged(_arguments(call, "do", "dht"), pool, slots, **options))
    return (
        {"o": o, "pool": pool[:N], "written": pool[N:].unflatten(0, (N, beside))} if beside else {"o": o, "pool": pool}
    )


OPS: dict[str, Callable[[Call], Results]] = {
    "chunk_kda": forward,
    "chunk_kda, batch invariant": functools.partial(forward, batch_invariant=True),
    "chunk_kda, states between": functools.partial(forward, checkpoint_interval=32),
    "backward": backward,
    "backward, batch invariant": functools.partial(backward, batch_invariant=True),
    "backward, from the output alone": functools.partial(backward, dht=None),
    "backward, from the state alone": functools.partial(backward, do=None),
    "backward, to the state alone": functools.partial(backward, mask=(False,) * 7 + (True,)),
    "transition": transition,
    "prefill": functools.partial(on_a_pool, op=_flashkda.chunk_kda_paged),
    "prefill, batch invariant": functools.partial(on_a_pool, op=_flashkda.chunk_kda_paged, batch_invariant=True),
    "prefill, checkpoints": functools.partial(on_a_pool, op=_flashkda.chunk_kda_paged, beside=2, checkpoints=True),
    "decode": functools.partial(on_a_pool, op=_flashkda.recurrent_kda_paged),
    "decode, a slot a token": functools.partial(on_a_pool, op=_flashkda.recurrent_kda_paged, beside=39, slots=True),
}
"""Of a call with an initial state and cotangents ``do`` and ``dht``."""


# ---------------------------------------------------------------------------------------------------------------------
# What an op does inside
# ---------------------------------------------------------------------------------------------------------------------

Mode = TypeVar("Mode", bound=TorchDispatchMode)
_BODIES = (
    (chunk_kda, "run"),
    (chunk_kda_backward, "_compute"),
    (chunk_kda_paged, "run"),
    (recurrent_kda_paged, "run"),
    (portable, "chunk_kda_transition"),
)


@contextmanager
def inside_ops(mode: Mode) -> Iterator[Mode]:
    """The bodies of the ops run under the mode; around them it would see the ops alone."""
    is_on = False

    def under_mode(body: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal is_on
            if is_on:  # one body calls another
                return body(*args, **kwargs)
            is_on = True
            try:
                with mode:
                    return body(*args, **kwargs)
            finally:
                is_on = False

        return run

    with ExitStack() as stack:
        for module, name in _BODIES:
            stack.enter_context(mock.patch.object(module, name, under_mode(getattr(module, name))))
        yield mode


class Poison(TorchDispatchMode):
    """Memory that is not asked for with a content has this one."""

    _EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value, self.poisoned = value, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket.__name__ in self._EMPTY:
            self.poisoned += out.numel()
            out.fill_(self.value if out.dtype.is_floating_point else torch.iinfo(out.dtype).max // 3)
        return out


_PRODUCTS = {"matmul": 0, "mm": 0, "bmm": 0, "baddbmm": 1, "baddbmm_": 1}  # and where their first factor is


class Work(TorchDispatchMode):
    """How many operators ran, how many elements they wrote, and the multiplications and additions of products."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.elements = self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if all(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            return out  # views
        self.operators += 1
        self.elements += sum(x.numel() for x in (out if isinstance(out, tuple | list) else (out,)))
        factor = _PRODUCTS.get(func._overloadpacket.__name__)
        if factor is not None:
            self.flops += 2 * out.numel() * args[factor].shape[-1]
        return out
