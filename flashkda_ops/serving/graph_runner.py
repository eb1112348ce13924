"""A model's decode and prefill functions at a few fixed sizes: on a GPU from CUDA graphs."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from flashkda_ops import validation
from flashkda_ops.serving.state_pool import StatePool

__all__ = ["CapturedGraph", "CaptureReport", "GraphRunner"]

_PADDING: dict[str, tuple[float, torch.dtype]] = {  # no tensors: these would have the device and mode of the import
    "tokens": (0, torch.int64),
    "cu_seqlens": (0, torch.int32),
    "state_indices": (-1, torch.int32),
    "has_initial_state": (False, torch.bool),
}
_WARM_UPS = 2  # the first call may compile and autotune, the second sets up what the first found


class CapturedGraph(NamedTuple):
    """One graph: its phase (``decode`` or ``prefill``), the size of its bucket, what capturing it took."""

    phase: str
    size: int
    seconds: float
    bytes: int


class CaptureReport(NamedTuple):
    """What :meth:`GraphRunner.capture` did: ``seconds`` with warm-up, ``bytes`` of device memory, the driver's too."""

    graphs: list[CapturedGraph]
    seconds: float
    bytes: int

    def __str__(self) -> str:
        if not self.graphs:
            return f"no graphs: warmed up in {self.seconds:.1f} s"
        phases = dict.fromkeys(graph.phase for graph in self.graphs)
        sizes = {phase: [str(graph.size) for graph in self.graphs if graph.phase == phase] for phase in phases}
        captured = "; ".join(f"{phase} at {', '.join(of)}" for phase, of in sizes.items())
        return f"{len(self.graphs)} graphs ({captured}) in {self.seconds:.1f} s, {self.bytes / 2**20:.0f} MiB"


class _Size(NamedTuple):
    """Of a call or a bucket. Decode has no ``tokens``: there they are a part of each sequence's row."""

    sequences: int
    tokens: int = 0

    def fits(self, other: _Size) -> bool:
        return self.sequences <= other.sequences and self.tokens <= other.tokens

    @property
    def number(self) -> int:
        """By which the caller knows the bucket of this size."""
        return self.tokens or self.sequences


class _Kind(Enum):
    """What an input has one entry of."""

    SEQUENCE = "sequence"
    TOKEN = "token"  # [1, tokens, ...]
    BOUND = "bound"  # [sequences + 1]


class _Input:
    """What is known of an input before a call: what it has an entry of, and what a padding entry is."""

    def __init__(self, kind: _Kind, padding: Tensor, device: torch.device) -> None:
        self.kind, self.padding, self.device_padding = kind, padding.cpu(), padding.to(device)
        self.dim = 1 if kind is _Kind.TOKEN else 0
        self.before = (1,) * self.dim

    def length(self, size: _Size) -> int:
        return {_Kind.SEQUENCE: size.sequences, _Kind.TOKEN: size.tokens, _Kind.BOUND: size.sequences + 1}[self.kind]

    def static(self, size: _Size) -> Tensor:
        """A buffer for calls of that size. Not a view of another one, which compiled code would tell apart."""
        shape = (*self.before, self.length(size), *self.padding.shape)
        return self.device_padding.expand(shape).clone(memory_format=torch.contiguous_format)

    def entries(self, name: str, given: Tensor) -> int:
        """How many entries are given; everything else about them must be right."""
        if not isinstance(given, Tensor):
            raise ValueError(f"{name} must be a tensor, got a {type(given).__name__}")
        shape, row = given.shape, self.padding.shape
        if shape[: self.dim] != self.before or shape[self.dim + 1 :] != row or len(shape) <= self.dim:
            expected = ", ".join(map(str, (*self.before, f"{self.kind.value}s", *row)))
            raise ValueError(f"{name} must have shape [{expected}], got {list(shape)}")
        validation.require_dtype(name, given, (self.padding.dtype,))
        return shape[self.dim]

    def fill(self, static: Tensor, given: Tensor) -> None:
        """Write what is given and, behind it, the padding."""
        target, staged = static, static.is_cuda and not given.is_cuda
        if staged:  # padded in pinned memory: one copy, and the host does not wait for the device
            target = torch.empty(static.shape, dtype=static.dtype, device="cpu", pin_memory=True)
        count, length = given.shape[self.dim], target.shape[self.dim]
        target.narrow(self.dim, 0, count).copy_(given)
        if count < length:
            padding = self.padding if staged else self.device_padding
            if self.kind is _Kind.BOUND:  # empty sequences repeat the last bound
                padding = given[-1]
            target.narrow(self.dim, count, length - count).copy_(padding)
        if staged:
            static.copy_(target, non_blocking=True)


class _Capturing(NamedTuple):
    """What all captures of a runner share. A stream of its own, since torch's default one is of one device alone."""

    stream: torch.cuda.Stream
    memory: Any


@dataclass
class _Bucket:
    """A size, the inputs that calls of it are copied to, and the graph that reads them."""

    size: _Size
    inputs: dict[str, Tensor]
    graph: torch.cuda.CUDAGraph | None = None
    outputs: Any = None


class _Phase:
    """One of the model's functions and its buckets."""

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        sizes: Sequence[_Size],
        padding: Mapping[str, Tensor],
        kinds: Mapping[str, _Kind],
        device: torch.device,
    ) -> None:
        self.name, self.function, self.device = name, function, device
        self.inputs = {key: _Input(kinds.get(key, _Kind.SEQUENCE), row, device) for key, row in padding.items()}
        self.buckets = [_Bucket(size, {key: x.static(size) for key, x in self.inputs.items()}) for size in sizes]

    def fill_with_padding(self, bucket: _Bucket) -> None:
        """No sequences and no tokens: a run reads and writes no state."""
        for name, static in bucket.inputs.items():
            static.copy_(self.inputs[name].device_padding)

    def size(self, given: Mapping[str, Tensor]) -> _Size:
        """Of a call whose inputs are as they must be."""
        if given.keys() != self.inputs.keys():
            raise ValueError(f"{self.name} takes the inputs {', '.join(self.inputs)}, got {', '.join(given) or 'none'}")
        entries = {name: entry.entries(name, given[name]) for name, entry in self.inputs.items()}
        tokens = [entries[name] for name, entry in self.inputs.items() if entry.kind is _Kind.TOKEN]
        size = _Size(entries["state_indices"], *tokens)
        for name, entry in self.inputs.items():
            if entries[name] != entry.length(size):
                raise ValueError(
                    f"{name} must have {entry.length(size)} entries for {size.sequences} state_indices, "
                    f"got {entries[name]}"
                )
        return size

    def run(self, given: Mapping[str, Tensor], size: _Size) -> Any:
        """Call or replay on the current stream of the device."""
        bucket = next((b for b in self.buckets if size.fits(b.size)), None)
        if bucket is None:
            outputs = self.function(**{name: x.to(self.device) for name, x in given.items()})
            return self._rows(outputs, size.sequences, size.sequences)
        for name, static in bucket.inputs.items():
            self.inputs[name].fill(static, given[name])
        if bucket.graph is None:
            outputs = self.function(**bucket.inputs)
        else:
            bucket.graph.replay()
            outputs = bucket.outputs
        return self._rows(outputs, bucket.size.sequences, size.sequences)

    def call_on_padding(self, bucket: _Bucket) -> None:
        """Call the function on a bucket that is filled with padding: what it returns must be rows there, too."""
        self._rows(self.function(**bucket.inputs), bucket.size.sequences, 0)

    def _rows(self, outputs: Any, expected: int, kept: int) -> Any:
        """The rows of the call's own sequences, copied: the next replay writes over what this one returned."""

        def rows(output: Any) -> Tensor:
            if not isinstance(output, Tensor):
                kind = type(output).__name__
                raise ValueError(f"{self.name} must return tensors, or tuples, lists and dicts of them, got a {kind}")
            if output.shape[:1] != (expected,):
                shape = list(output.shape)
                raise ValueError(f"{self.name} must return a row a sequence, {expected} of them, got shape {shape}")
            return output[:kept].clone()

        return pytree.tree_map(rows, outputs)


class GraphRunner:
    """Runs a model's ``decode`` and ``prefill`` at the sizes of a few buckets; on a GPU they are CUDA graphs.

    A call is padded to the smallest bucket that holds it, and replayed. A call above the largest bucket runs as it is,
    eagerly: correct, and as slow as without graphs. Until :meth:`capture`, and always on a CPU, the functions
    themselves run on the padded inputs.

    The functions take their inputs by keyword and return tensors with one row a sequence, or tuples, lists and dicts of
    them (whatever ``torch.utils.pytree`` knows): calls return the same. They are those of any module that keeps the
    ops' rules for CUDA graphs (``docs/ops.md``): a sequence whose ``state_indices`` are -1 reads and writes no state,
    ``cu_seqlens`` may hold empty sequences and end before the last token. They may be compiled, but not into CUDA
    graphs of their own.

    ==================== ======================================================== ========== =======
    input of decode      shape                                                    dtype      padding
    ==================== ======================================================== ========== =======
    ``tokens``           ``[sequences]``                                          int64      0
    ``state_indices``    ``[sequences]``                                          int32      -1
    ==================== ======================================================== ========== =======

    ====================== ====================================================== ========== ==============
    input of prefill       shape                                                  dtype      padding
    ====================== ====================================================== ========== ==============
    ``tokens``             ``[1, tokens]``                                        int64      0
    ``cu_seqlens``         ``[sequences + 1]``                                    int32      the last bound
    ``state_indices``      ``[sequences]``                                        int32      -1
    ``has_initial_state``  ``[sequences]``                                        bool       False
    ====================== ====================================================== ========== ==============

    All graphs of a runner share one memory pool, so its calls belong on one stream at a time.
    What a call returns is the caller's to keep. Two runners are independent of each other.

    A runner may be made under any mode (``torch.inference_mode``, a default device or dtype) and used outside of it. A
    graph replays what :meth:`capture` ran: under ``torch.autocast`` the casts too, whatever is enabled in later calls.

    Args:
        decode, prefill: the functions.
        pool: whose slots ``state_indices`` are; its device is that of the inputs.
        batch_buckets: numbers of sequences of a decode call, ascending. None: decode runs eagerly.
        token_buckets: numbers of tokens of a prefill call, ascending.
        prefill_sequences: the most sequences of a prefill call in a bucket.
        decode_padding, prefill_padding: for each further input, and for one that differs from the tables, what a
            padding sequence has there (for ``tokens`` of prefill: a padding token). It gives the shape and the dtype of
            an entry: ``{"temperature": torch.tensor(0.0)}`` adds ``temperature [sequences]``. Speculative decoding is
            ``{"tokens": torch.zeros(4, dtype=torch.int64), "state_indices": torch.full((4,), -1, dtype=torch.int32),
            "num_accepted_tokens": torch.tensor(1, dtype=torch.int32)}``.
        validate: before each call, hold ``state_indices`` against the slots that are allocated, ``cu_seqlens`` against
            the tokens and ``num_accepted_tokens`` against the slots of a sequence (0 marks padding), on the host: a
            device synchronisation where they are on the device. ``FLASHKDA_CHECK=1`` does that in every runner.

    Raises:
        ValueError: naming the argument that is not as described; from calls, naming the input.
    """

    def __init__(
        self,
        decode: Callable[..., Any],
        prefill: Callable[..., Any],
        pool: StatePool,
        *,
        batch_buckets: Sequence[int] = (1, 2, 4, 8, 16, 32),
        token_buckets: Sequence[int] = (256, 1024, 4096),
        prefill_sequences: int = 16,
        decode_padding: Mapping[str, Tensor] | None = None,
        prefill_padding: Mapping[str, Tensor] | None = None,
        validate: bool = False,
    ) -> None:
        for name, buckets in (("batch_buckets", batch_buckets), ("token_buckets", token_buckets)):
            if list(buckets) != sorted({size for size in buckets if size > 0}):
                raise ValueError(f"{name} must be positive and ascending, got {list(buckets)}")
        if prefill_sequences < 1:
            raise ValueError(f"prefill_sequences must be positive, got {prefill_sequences}")
        self.pool = pool
        self._validates = validate or validation.CHECK_VALUES
        with torch.inference_mode(False):  # what is made in inference mode may not be updated outside of it
            self._decode = _Phase(
                "decode",
                decode,
                [_Size(size) for size in batch_buckets],
                _padding(("tokens", "state_indices"), "decode_padding", decode_padding),
                {},
                pool.device,
            )
            self._prefill = _Phase(
                "prefill",
                prefill,
                [_Size(prefill_sequences, size) for size in token_buckets],
                _padding(_PADDING, "prefill_padding", prefill_padding),
                {"tokens": _Kind.TOKEN, "cu_seqlens": _Kind.BOUND},
                pool.device,
            )
        self._capturing: _Capturing | None = None
        if pool.device.type == "cuda":
            self._capturing = _Capturing(torch.cuda.Stream(pool.device), torch.cuda.graph_pool_handle())

    @torch.no_grad()
    def decode(self, **inputs: Tensor) -> Any:
        """Run ``decode`` on inputs on any device; returns its rows for these sequences."""
        size = self._decode.size(inputs)
        if self._validates:
            slots = inputs["state_indices"]
            self.pool.check(slots)
            validation.check_slots(slots, self.pool.slots, None, inputs.get("num_accepted_tokens"))
        with self._calling():
            return self._decode.run(inputs, size)

    @torch.no_grad()
    def prefill(self, **inputs: Tensor) -> Any:
        """Run ``prefill`` on inputs on any device; returns its rows for these sequences."""
        size = self._prefill.size(inputs)
        if self._validates:
            self.pool.check(inputs["state_indices"])
            validation.check_cu_seqlens(inputs["cu_seqlens"], size.tokens)
        with self._calling():
            return self._prefill.run(inputs, size)

    def warm_up(self, *, progress: bool = False) -> None:
        """Call the functions at every bucket, on padding alone: what they compile is compiled then."""
        with self._calling():
            for phase, bucket in _with_progress("warm up", self._work(), progress):
                self._warm_up(phase, bucket)

    def capture(self, *, progress: bool = False) -> CaptureReport:
        """Warm up and capture every bucket; on a CPU warm up. Runs on padding alone: no state is read or written.

        ``progress`` shows a bar where tqdm is installed, else prints a line a bucket, to stderr.
        """
        graphs, start = [], time.perf_counter()
        with self._calling():
            for phase, bucket in _with_progress("capture", self._work(), progress):
                began = time.perf_counter()
                self._warm_up(phase, bucket)
                if self._capturing is not None:
                    used = self._capture(phase, bucket, self._capturing)
                    graphs.append(CapturedGraph(phase.name, bucket.size.number, time.perf_counter() - began, used))
        return CaptureReport(graphs, time.perf_counter() - start, sum(graph.bytes for graph in graphs))

    def _work(self) -> list[tuple[_Phase, _Bucket]]:
        """Largest first: the memory of a graph is then enough for the smaller ones."""
        return [(phase, bucket) for phase in (self._prefill, self._decode) for bucket in reversed(phase.buckets)]

    def _calling(self) -> AbstractContextManager[object]:
        """Around calls of the functions: their device is current, and the states may be written."""
        self.pool.require_writable()
        return nullcontext() if self._capturing is None else torch.cuda.device(self.pool.device)

    @torch.no_grad()
    def _warm_up(self, phase: _Phase, bucket: _Bucket) -> None:
        phase.fill_with_padding(bucket)
        if self._capturing is None:
            phase.call_on_padding(bucket)
            return
        stream = self._capturing.stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                phase.call_on_padding(bucket)
        torch.cuda.current_stream().wait_stream(stream)

    @torch.no_grad()
    def _capture(self, phase: _Phase, bucket: _Bucket, to: _Capturing) -> int:
        """Capture one bucket; returns the device memory that it took."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what warm-up leaves is not the graph's
        free, _ = torch.cuda.mem_get_info()
        graph = torch.cuda.CUDAGraph()
        # Under autocast a parameter is cast once, until it ends. Neither may the graph read what was cast before, nor
        # another call what is cast here, which the graph's replays alone fill.
        torch.clear_autocast_cache()
        try:
            # Other threads may go on using the device: another runner's, or one that loads weights. The stream is made
            # current twice, since a capture that fails leaves it so.
            captured = torch.cuda.graph(graph, pool=to.memory, stream=to.stream, capture_error_mode="thread_local")
            with torch.cuda.stream(to.stream), captured:
                outputs = phase.function(**bucket.inputs)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"{phase.name} cannot be captured at {bucket.size.number}: it may not read values on the host or wait "
                f"for the device: {error}"
            ) from error
        finally:
            torch.clear_autocast_cache()
        torch.cuda.synchronize()
        bucket.graph, bucket.outputs = graph, outputs
        return free - torch.cuda.mem_get_info()[0]


def _padding(names: Iterable[str], argument: str, given: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """What padding has for the inputs of these names, and for those given."""
    padding = {name: torch.tensor(_PADDING[name][0], dtype=_PADDING[name][1], device="cpu") for name in names}
    for name, row in (given or {}).items():
        if not isinstance(row, Tensor) or row.is_meta:
            what = "a tensor on the meta device" if isinstance(row, Tensor) else f"a {type(row).__name__}"
            raise ValueError(f"{argument} must hold tensors with values, got {what} for {name}")
        padding[name] = row
    return padding


def _with_progress(label: str, work: list[tuple[_Phase, _Bucket]], enabled: bool) -> Iterator[tuple[_Phase, _Bucket]]:
    if not enabled:
        yield from work
        return
    try:
        tqdm = importlib.import_module("tqdm").tqdm
    except ImportError:  # no dependency of this package
        for done, (phase, bucket) in enumerate(work, 1):
            print(f"{label} {done}/{len(work)}: {phase.name} {bucket.size.number}", file=sys.stderr)
            yield phase, bucket
        return
    with tqdm(work, desc=label, unit="bucket") as bar:
        for phase, bucket in bar:
            bar.set_postfix_str(f"{phase.name} {bucket.size.number}")
            yield phase, bucket
