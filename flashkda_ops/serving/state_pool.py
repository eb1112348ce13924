"""Slots for the states of sequences: which are free is known on the host, what they hold stays on the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from operator import index
from types import MappingProxyType

import torch
from torch import Tensor

from flashkda_ops import validation

__all__ = ["PoolExhausted", "StatePool"]


class PoolExhausted(RuntimeError):
    """Fewer slots are free than were asked for; none was taken. The scheduler waits, preempts or rejects.

    Attributes:
        requested: the slots that were asked for.
        available: the slots that are free.
    """

    def __init__(self, requested: int, available: int, slots: int) -> None:
        super().__init__(f"{requested} slots requested, {available} of {slots} are free")
        self.requested, self.available = requested, available


class StatePool:
    """Slots that sequences hold while they live: row ``slot`` of every state tensor belongs to one sequence.

    The tensors are those that the model's ops update in place, usually its own buffers: a recurrent state and a short
    convolution state for each layer, say. A slot is taken as it is, without a memset: a sequence that has no history
    starts from zero by ``has_initial_state`` of :func:`flashkda_ops.chunk_kda_paged`.

    The pool runs nothing on the device but :meth:`copy`. A freed slot may be taken again at once: what the next
    sequence does is ordered behind what the last one did as long as both are on one stream. Not thread-safe.

    Args:
        states: by name, ``[slots, ...]`` each, any dtypes, on one device.
        validate: fill freed slots with NaN (zero where integer), so that a state which is read after its sequence's
            end shows. ``FLASHKDA_CHECK=1`` does that to every pool.

    Raises:
        ValueError: naming the state that is not as described.
    """

    def __init__(self, states: Mapping[str, Tensor], *, validate: bool = False) -> None:
        if not states:
            raise ValueError("states must name at least one tensor")
        first_name, first = next(iter(states.items()))
        for name, state in states.items():
            if not isinstance(state, Tensor):
                raise ValueError(f"states must be tensors, got a {type(state).__name__} for {name}")
        for name, state in states.items():
            if state.dim() == 0 or state.shape[0] != first.shape[:1].numel() or state.device != first.device:
                raise ValueError(
                    f"states must all be [slots, ...] on one device, got {name} {list(state.shape)} on {state.device} "
                    f"beside {first_name} {list(first.shape)} on {first.device}"
                )
        self.states = MappingProxyType(dict(states))
        self._of_inference = next((name for name, state in states.items() if state.is_inference()), None)
        self.slots: int = first.shape[0]
        self.device = first.device
        self._poisons = validate or validation.CHECK_VALUES
        self._free = list(reversed(range(self.slots)))  # a stack: the slot freed last is the one in the caches
        self._allocated: set[int] = set()

    @property
    def available(self) -> int:
        """How many slots are free."""
        return len(self._free)

    def allocate(self, count: int = 1) -> list[int]:
        """Take ``count`` free slots: all of them, or none.

        Raises:
            PoolExhausted: where fewer are free.
            ValueError: where the count is negative or no integer.
        """
        try:
            count = index(count)
        except TypeError:
            raise ValueError(f"count must be an integer, got {count}") from None
        if count < 0:
            raise ValueError(f"count must not be negative, got {count}")
        if count > len(self._free):
            raise PoolExhausted(count, len(self._free), self.slots)
        taken = [self._free.pop() for _ in range(count)]
        self._allocated.update(taken)
        return taken

    def free(self, slots: Iterable[int] | Tensor) -> None:
        """Give slots back: integers, or a tensor of them, of one dimension, which is read on the host.

        Raises:
            ValueError: naming a slot that is not allocated, or is given twice; no slot is freed then.
        """
        slots = _integers("slots", slots)
        for slot, times in Counter(slots).items():
            self._require_allocated(slot)
            if times > 1:
                raise ValueError(f"slots must be distinct, got {slot} {times} times")
        if self._poisons:
            self.require_writable()
        self._allocated.difference_update(slots)
        self._free.extend(slots)
        if self._poisons:
            for state in self.states.values():
                for slot in slots:
                    state[slot].fill_(torch.nan if state.is_floating_point() else 0)

    def copy(self, source: int, *targets: int) -> None:
        """Copy every state of one slot to others, on the current stream: to go on from a prefix that is shared.

        Raises:
            ValueError: naming a slot that is not allocated, or a state that may not be written here.
        """
        source, *rest = _integers("slots", (source, *targets))
        for slot in (source, *rest):
            self._require_allocated(slot)
        self.require_writable()
        for state in self.states.values():
            for target in rest:
                state[target].copy_(state[source])

    def check(self, state_indices: Tensor) -> None:
        """Hold ``state_indices``, of any shape, against the slots that are allocated. Reads them on the host.

        Raises:
            ValueError: naming a slot that is neither -1 (padding) nor allocated, or that is there twice.
        """
        if not isinstance(state_indices, Tensor):
            raise ValueError(f"state_indices must be a tensor, got a {type(state_indices).__name__}")
        for slot, times in Counter(state_indices.flatten().tolist()).items():
            if slot == -1:
                continue
            if slot not in self._allocated:
                what = "is free" if 0 <= slot < self.slots else f"is not one of the {self.slots} slots"
                raise ValueError(
                    f"state_indices must hold allocated slots, or -1 for padding, got {slot}, which {what}"
                )
            if times > 1:
                raise ValueError(f"state_indices must name each slot once, got {slot} {times} times")

    def require_writable(self) -> None:
        """A model that is made under ``torch.inference_mode`` has states that only code under it may update.

        Raises:
            ValueError: naming such a state, outside of that mode.
        """
        if self._of_inference is not None and not torch.is_inference_mode_enabled():
            raise ValueError(
                f"states must be made outside of torch.inference_mode, or used under it, got {self._of_inference}, "
                "made under it: it may not be updated outside"
            )

    def _require_allocated(self, slot: int) -> None:
        if slot not in self._allocated:
            what = "is free" if 0 <= slot < self.slots else f"is not one of the {self.slots}"
            raise ValueError(f"slots must be allocated, got {slot}, which {what}")


def _integers(name: str, values: Iterable[object]) -> list[int]:
    """The values, if they are integers of whatever type: a number in a tensor is equal to none, and hashes as none."""
    if isinstance(values, Tensor):
        if values.dim() != 1:
            raise ValueError(f"{name} must be integers, got a tensor of shape {list(values.shape)}")
        values = values.tolist()
    try:
        return [index(value) for value in values]  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"{name} must be integers, got {values}") from None
