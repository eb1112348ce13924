"""The states of a model's layers in buffers of a fixed size and address, for compiled decoding and CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flashkda_ops import validation
from flashkda_ops.nn.kimi_delta_attention import KimiDeltaAttention, is_fla_layer

__all__ = ["StaticCache"]

State = dict[str, Any]


class _Layer:
    """The states of one layer, in ``state`` as in fla's. What the attributes say, transformers asks of a layer."""

    is_compileable = is_sliding = is_croppable = False
    is_initialized = supports_early_init = True

    def __init__(self, state: State) -> None:
        self.state = state

    @property
    def batch_size(self) -> int:
        return self.state["recurrent_state"].shape[0]

    def tensors(self) -> Iterator[Tensor]:
        yield self.state["recurrent_state"]
        yield from self.state["conv_state"] or ()

    def update(self, recurrent_state: Tensor | None, conv_state: tuple[Tensor | None, ...] | None) -> None:
        _copy("recurrent_state", self.state["recurrent_state"], recurrent_state)
        buffers = self.state["conv_state"] or ()
        if conv_state is not None and len(conv_state) != len(buffers):
            raise ValueError(
                f"conv_state must have {len(buffers)} tensors, as the layer has convolutions, got {len(conv_state)}"
            )
        for buffer, new in zip(buffers, conv_state or (), strict=False):
            _copy("conv_state", buffer, new)


def _copy(name: str, buffer: Tensor, new: Tensor | None) -> None:
    """Into the buffer, without the graph that the new state may come from: the buffer outlives it."""
    if new is None or new is buffer:
        return
    if new.shape != buffer.shape:  # a copy would repeat one sequence's state for all
        raise ValueError(f"{name} must have the shape of the cache's, {list(buffer.shape)}, got {list(new.shape)}")
    with torch.no_grad():
        buffer.copy_(new)


class StaticCache:
    """A cache with the protocol of fla's, whose tensors stay where they are: updates copy into them.

    A compiled decode step that is given one mutates its tensors in place, in one graph for all steps, and
    ``mode="reduce-overhead"`` captures it. It starts with zero states, which is where a sequence starts. No gradient
    flows through it from one call to the next.

    It may be made under any mode, ``torch.inference_mode`` and a default device or dtype included: its tensors are
    ordinary ones, on the layers' devices. Where a model is split by heads (tensor parallel) it holds the rank's heads.

    Args:
        model: whose layers to serve: :class:`KimiDeltaAttention`, this package's or fla's, of ``layer_idx`` 0, 1, ...
        batch_size: sequences. Every call has that many.
        dtype: of the convolution states, a floating one of 16 bits or more. By default that of the layer's projection
            of queries or, where this one is quantised, of its convolution, its norm or another of its parameters.
        device: of all tensors; by default that of each layer's parameters, which is wrong where these are offloaded.

    Raises:
        ValueError: naming the argument that is not as described.
    """

    # To transformers' generate a cache that is compileable is one of keys and values, whose masks have four dimensions.
    is_compileable = False
    is_croppable = False
    is_initialized = True
    offloading = False

    def __init__(
        self,
        model: nn.Module,
        batch_size: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        layers: list[Any] = [m for m in model.modules() if isinstance(m, KimiDeltaAttention) or is_fla_layer(m)]
        indices = [layer.layer_idx for layer in layers]
        if not layers or set(indices) != set(range(len(layers))):
            raise ValueError(f"model must have KDA layers of layer_idx 0, 1, ..., got {indices}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}")
        if dtype is not None and dtype not in validation.TOKEN_DTYPES:
            raise ValueError(f"dtype must be bfloat16, float16, float32 or float64, got {str(dtype)[6:]}")
        layers.sort(key=lambda layer: layer.layer_idx)
        with torch.inference_mode(False):  # what is made in inference mode may not be updated outside of it
            self.layers = [_Layer(_zero_state(layer, batch_size, dtype, device)) for layer in layers]
            self._seen = torch.zeros((), dtype=torch.int64, device=self.layers[0].state["recurrent_state"].device)
        for x in self._tensors():
            torch._dynamo.mark_static_address(x)

    def _tensors(self) -> Iterator[Tensor]:
        yield self._seen
        for layer in self.layers:
            yield from layer.tensors()

    def __repr__(self) -> str:
        shape, device = list(self.layers[0].state["recurrent_state"].shape), self._seen.device
        return f"{type(self).__name__}(layers={len(self)}, recurrent_state={shape}, device={device})"

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[State]:
        for layer in self.layers:
            yield layer.state

    def __getitem__(self, layer_idx: int) -> State:
        if layer_idx >= len(self.layers):
            raise KeyError(f"layer_idx must be below {len(self.layers)}, the layers of the cache, got {layer_idx}")
        return self.layers[layer_idx].state

    def update(
        self,
        recurrent_state: Tensor | None = None,
        attn_state: None = None,
        conv_state: tuple[Tensor | None, ...] | None = None,
        ffn_state: None = None,
        layer_idx: int = 0,
        offset: int | None = 1,
        cache_kwargs: dict[str, Any] | None = None,
    ) -> State:
        """Copy a layer's states in, and count ``offset`` tokens at the first layer.

        Raises:
            ValueError: naming the argument that the cache has no place for.
        """
        if attn_state is not None or ffn_state is not None:
            raise ValueError("attn_state and ffn_state must be None: this cache holds the states of KDA layers")
        if not 0 <= layer_idx < len(self.layers):
            raise ValueError(f"layer_idx must be in [0, {len(self.layers)}), the layers of the cache, got {layer_idx}")
        layer = self.layers[layer_idx]
        layer.update(recurrent_state, conv_state)
        if layer_idx == 0:
            self._seen.add_(1 if offset is None else offset)
        return layer.state

    def reset(self) -> None:
        """Zero states, in place."""
        for x in self._tensors():
            x.zero_()

    def get_seq_length(self, layer_idx: int | None = 0, cache_position: object = None) -> int:
        """Tokens seen; reads them from the device."""
        return 0 if (layer_idx or 0) >= len(self.layers) else int(self._seen)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """As :meth:`get_seq_length`."""
        return self.get_seq_length(layer_idx)

    def get_max_length(self, layer_idx: int | None = 0) -> int:
        """-1: sequences may have any length."""
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: sequences may have any length."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """The tokens that a mask has columns for, from the first one of the sequence on; reads from the device."""
        return self.get_seq_length(layer_idx) + query_length, 0

    @property
    def batch_size(self) -> int:
        """Sequences."""
        return self.layers[0].batch_size

    @property
    def is_sliding(self) -> list[bool]:
        """False for each layer."""
        return [False] * len(self.layers)

    is_linear = is_dummy = is_sliding  # of transformers' own classes of layers, as fla's are not

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence ``n`` gets the states of ``beam_idx[n]``, in place, in a beam search.

        Raises:
            ValueError: if ``beam_idx`` does not have one entry a sequence: the cache stays as large as it is.
        """
        if beam_idx.shape != (self.batch_size,):
            raise ValueError(
                f"beam_idx must have shape [batch_size] = [{self.batch_size}], since the cache is of fixed size, "
                f"got {list(beam_idx.shape)}"
            )
        for layer in self.layers:
            for x in layer.tensors():
                x.copy_(x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """As :meth:`reorder_cache`."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Nothing for ``repeats`` of 1.

        Raises:
            ValueError: for any other number, since the cache is of fixed size.
        """
        if repeats != 1:
            raise ValueError(
                f"repeats must be 1, since the cache is of fixed size, got {repeats}: "
                f"make one of batch_size = {self.batch_size * repeats}"
            )

    def crop(self, max_length: int) -> None:
        """Nothing where ``max_length`` tokens (negative: all but so many) are all that were seen. Reads their number.

        Raises:
            NotImplementedError: as fla's cache, where tokens would have to be forgotten.
        """
        seen = self.get_seq_length()
        length = max_length if max_length >= 0 else max(0, seen + max_length)
        if length < seen:
            raise NotImplementedError(
                f"max_length must be at least the {seen} tokens seen, got {max_length}: a recurrent state holds what "
                "came before it, and not the states on the way. Copy the cache before tokens that may be taken back"
            )

    def activate_past_recording(self) -> None:
        """Nothing: what :meth:`crop` would need is not recorded."""

    def is_recording_past(self, layer_idx: int) -> bool:
        """False."""
        return False

    def to_legacy_cache(self) -> tuple[State, ...]:
        """Each layer's states, which go on being the cache's."""
        return tuple(self)

    @classmethod
    def from_legacy_cache(cls, past_key_values: Any = None, seen_tokens: int = 0, **kwargs: Any) -> StaticCache:
        """A cache of this class as it is.

        Raises:
            ValueError: for anything else.
        """
        if isinstance(past_key_values, cls):
            return past_key_values
        raise ValueError(
            f"past_key_values must be a {cls.__name__}, got {type(past_key_values).__name__}: "
            "its sizes are those of a model, StaticCache(model, batch_size)"
        )


def _zero_state(layer: Any, batch_size: int, dtype: torch.dtype | None, device: torch.device | str | None) -> State:
    of_parameters = _dtype(layer)
    if dtype is None and of_parameters is None:
        raise ValueError(
            f"dtype must be given: all parameters of layer {layer.layer_idx} are quantised, and none has that of its "
            "tokens"
        )
    device = layer.A_log.device if device is None else device
    dtype = of_parameters if dtype is None else dtype
    ranks = getattr(layer, "tensor_parallel_size", 1)
    convs = None
    if layer.use_short_conv:
        sizes = (layer.key_dim // ranks, layer.key_dim // ranks, layer.value_dim // ranks)
        convs = tuple(torch.zeros(batch_size, size, layer.conv_size, dtype=dtype, device=device) for size in sizes)
    shape = (batch_size, layer.num_v_heads // ranks, layer.head_v_dim, layer.head_k_dim)
    wide = torch.float64 if (of_parameters or dtype) == torch.float64 else torch.float32
    return {
        "recurrent_state": torch.zeros(shape, dtype=wide, device=device),
        "attn_state": None,
        "conv_state": convs,
        "ffn_state": None,
    }


def _dtype(layer: nn.Module) -> torch.dtype | None:
    """What the layer computes in, by the first parameter that may have it: a quantised weight has another dtype, and
    those of the gate are often kept in fp32."""
    parameters = dict(layer.named_parameters())
    first = (parameters.get(f"{name}.weight") for name in ("q_proj", "q_conv1d", "o_norm"))
    others = (x for name, x in parameters.items() if name not in ("A_log", "dt_bias"))
    return next((x.dtype for x in (*first, *others) if x is not None and x.dtype in validation.TOKEN_DTYPES), None)
