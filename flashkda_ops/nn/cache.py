"""The states of a model's layers in buffers of a fixed size and address, for compiled decoding and CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flashkda_ops.nn.kimi_delta_attention import KimiDeltaAttention, is_fla_layer

__all__ = ["StaticCache"]

Layer = dict[str, Any]


class StaticCache:
    """A cache with the protocol of fla's, whose tensors stay where they are: updates copy into them.

    A compiled decode step that is given one mutates its tensors in place, in one graph for all steps, and
    ``mode="reduce-overhead"`` captures it. It starts with zero states, which is where a sequence starts.

    Args:
        model: whose layers to serve: :class:`KimiDeltaAttention`, this package's or fla's, of ``layer_idx`` 0, 1, ...
        batch_size: sequences.
        dtype: of the convolution states; that of the model's projections by default.

    Raises:
        ValueError: if the model's layers are not as described.
    """

    def __init__(self, model: nn.Module, batch_size: int, dtype: torch.dtype | None = None) -> None:
        layers: list[Any] = [m for m in model.modules() if isinstance(m, KimiDeltaAttention) or is_fla_layer(m)]
        indices = [layer.layer_idx for layer in layers]
        if not layers or set(indices) != set(range(len(layers))):
            raise ValueError(f"model must have KDA layers of layer_idx 0, 1, ..., got {indices}")
        layers.sort(key=lambda layer: layer.layer_idx)
        self._states = [self._allocate(layer, batch_size, dtype) for layer in layers]
        device = self._states[0]["recurrent_state"].device
        self._seen = torch.zeros((), dtype=torch.int64, device=device)
        for x in self._tensors():
            torch._dynamo.mark_static_address(x)

    @staticmethod
    def _allocate(layer: Any, batch_size: int, dtype: torch.dtype | None) -> Layer:
        weight = layer.q_proj.weight
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        dtype = weight.dtype if dtype is None else dtype
        sizes = (layer.key_dim, layer.key_dim, layer.value_dim)
        convs = None
        if layer.use_short_conv:
            convs = tuple(
                torch.zeros(batch_size, size, layer.conv_size, dtype=dtype, device=weight.device) for size in sizes
            )
        shape = (batch_size, layer.num_v_heads, layer.head_v_dim, layer.head_k_dim)
        return {"recurrent_state": torch.zeros(shape, dtype=wide, device=weight.device), "conv_state": convs}

    def _tensors(self) -> Iterator[Tensor]:
        yield self._seen
        for state in self._states:
            yield state["recurrent_state"]
            yield from state["conv_state"] or ()

    def __len__(self) -> int:
        return len(self._states)

    def __getitem__(self, layer_idx: int) -> Layer:
        return self._states[layer_idx]

    def update(
        self,
        recurrent_state: Tensor | None = None,
        attn_state: None = None,
        conv_state: tuple[Tensor, ...] | None = None,
        ffn_state: None = None,
        layer_idx: int = 0,
        offset: int | None = 1,
        cache_kwargs: dict[str, Any] | None = None,
    ) -> Layer:
        """Copy a layer's states in, and count ``offset`` tokens at the first layer."""
        if attn_state is not None or ffn_state is not None:
            raise ValueError("attn_state and ffn_state must be None: this cache holds the states of KDA layers")
        state = self._states[layer_idx]
        if recurrent_state is not None and recurrent_state is not state["recurrent_state"]:
            state["recurrent_state"].copy_(recurrent_state)
        for buffer, new in zip(state["conv_state"] or (), conv_state or (), strict=False):
            if new is not None and new is not buffer:
                buffer.copy_(new)
        if layer_idx == 0:
            self._seen.add_(1 if offset is None else offset)
        return state

    def get_seq_length(self, layer_idx: int | None = 0) -> int:
        """Tokens seen; reads them from the device."""
        return int(self._seen)

    def reset(self) -> None:
        """Zero states, in place."""
        for x in self._tensors():
            x.zero_()
