"""The Python functions: thin, with the keywords of ``fla.ops.kda`` (flash-linear-attention 0.6.0).

Each calls one op of the ``flashkda`` namespace, which does the validation; see ``docs/ops.md`` for the contract.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from flashkda_ops.ops import chunk_kda as _chunk
from flashkda_ops.ops import eager, rules
from flashkda_ops.validation import require_tensor, require_types, state_dtype, validate_state, validate_tokens

__all__ = ["chunk_kda", "chunk_kda_paged", "recurrent_kda", "recurrent_kda_paged"]


def _state_v_first(state_v_first: bool, transpose_state_layout: bool | None) -> bool:
    if transpose_state_layout is None:
        return state_v_first
    if state_v_first:
        raise ValueError("transpose_state_layout is the deprecated name of state_v_first: pass state_v_first alone")
    warnings.warn("transpose_state_layout is deprecated, use state_v_first", DeprecationWarning, stacklevel=3)
    return transpose_state_layout


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    cp_context: object | None = None,
    use_graph: bool = False,
    max_num_seqs: int | None = None,
    *,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    chunk_size: int = 64,
    transpose_state_layout: bool | None = None,
    batch_invariant: bool = False,
    validate: bool = False,
) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor]:
    r"""Kimi Delta Attention over whole sequences: training and prefill.

    For each value head, with the state :math:`S` of shape ``[V, K]`` (Kimi Linear, arXiv:2510.26692):

    .. math::
        S_t = S_{t-1} \mathrm{diag}(e^{g_t}) + \beta_t (v_t - S_{t-1} \mathrm{diag}(e^{g_t}) k_t) k_t^\top,
        \qquad o_t = \mathrm{scale} \cdot S_t q_t

    Differentiable once, in ``q, k, v, g, beta, A_log, dt_bias`` and ``initial_state``. Under ``torch.compile`` it is
    one node; in a CUDA graph it may be replayed with other contents of ``cu_seqlens``.

    Args:
        q, k: ``[B, T, H, K]``, bf16, fp16, fp32 or fp64. Any strides.
        v: ``[B, T, HV, V]``, the dtype of ``q``. ``HV`` is a multiple of ``H``; value head ``j`` goes with the query
            and key of head ``j // (HV // H)``.
        g: ``[B, T, HV, K]``, the dtype of ``q`` or fp32. The log decay (natural logarithm, at most 0), or with
            ``use_gate_in_kernel`` the raw input of the gate.
        beta: ``[B, T, HV]``, the dtype of ``q`` or fp32.
        scale: of ``q``; ``K ** -0.5`` by default.
        initial_state: ``[N, HV, K, V]``, or ``[N, HV, V, K]`` with ``state_v_first``; fp32 (fp64 for fp64 inputs).
            ``N`` is ``B``, or the number of sequences in ``cu_seqlens``. Zero by default.
        output_final_state: return the state after the last token of each sequence.
        use_qk_l2norm_in_kernel: ``q`` and ``k`` become ``x * rsqrt(sum(x^2) + 1e-6)``.
        use_gate_in_kernel: the log decay is ``lower_bound * sigmoid(exp(A_log) * (g + dt_bias))`` where
            ``lower_bound`` is given, else ``-exp(A_log) * softplus(g + dt_bias)``. Otherwise ``A_log``, ``dt_bias`` and
            ``lower_bound`` are not used.
        use_beta_sigmoid_in_kernel: ``sigmoid(beta)``; with ``allow_neg_eigval`` ``2 * sigmoid(beta)``.
        safe_gate: as in fla: with ``use_gate_in_kernel`` it requires ``lower_bound``.
        lower_bound: in ``[-5, 0)``.
        return_intermediate_states: also return the states before every ``chunk_size``-th token of each sequence
            (inference mode only).
        state_v_first: states are ``[V, K]`` instead of ``[K, V]``.
        cu_seqlens: ``[N + 1]``, int32 or int64, on the device of ``q``: sequence ``n`` is rows ``cu_seqlens[n]`` to
            ``cu_seqlens[n + 1]`` of the one row of the batch. Repeated entries are empty sequences. Rows past its end
            are padding: their outputs and gradients are zero, whatever the inputs hold.
        A_log: ``[HV]``. Optional with ``lower_bound``.
        dt_bias: ``[HV, K]`` or ``[HV * K]``.
        chunk_size: 32 or 64; the distance of intermediate states, in tokens.
        batch_invariant: the same bits for a sequence alone, packed, padded and in any batch.
        validate: check the values of ``cu_seqlens`` on the host (a device synchronisation), as ``FLASHKDA_CHECK=1``.
        disable_recompute, cu_seqlens_cpu, use_graph, max_num_seqs: accepted for fla's callers; nothing needs them.
        cp_context: must be None.
        transpose_state_layout: deprecated name of ``state_v_first``.

    Returns:
        ``o [B, T, HV, V]`` in the dtype of ``q``; the final state in the layout of ``initial_state``, fp32 (fp64 for
        fp64 inputs), or None; and with ``return_intermediate_states`` the states ``[B, NT, HV, ...]`` in the same
        dtype, where ``NT`` is ``ceil(T / chunk_size)``, or with ``cu_seqlens`` the most chunks that ``N`` sequences of
        ``T`` tokens can have (states of all sequences in order, rows beyond them zero).

    Raises:
        ValueError: naming the argument that is not as described.
    """
    if cp_context is not None:
        raise ValueError("cp_context must be None: over ranks, use flashkda_ops.distributed.context_parallel_chunk_kda")
    if chunk_size not in (32, 64):
        raise ValueError(f"chunk_size must be 32 or 64, got {chunk_size}")
    if not use_gate_in_kernel:
        A_log = dt_bias = lower_bound = None
    elif safe_gate and lower_bound is None:
        raise ValueError("lower_bound must be given with safe_gate=True and use_gate_in_kernel=True")
    if return_intermediate_states and torch.is_grad_enabled():
        raise ValueError("return_intermediate_states=True requires torch.inference_mode or torch.no_grad")
    state_v_first = _state_v_first(state_v_first, transpose_state_layout)
    args = (
        q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, scale, output_final_state,
        use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, lower_bound,
        state_v_first, chunk_size if return_intermediate_states else 0, batch_invariant, validate,
    )  # fmt: skip
    if torch.compiler.is_compiling():
        o, final_state, states = torch.ops.flashkda.chunk_kda.default(*args)
    elif torch._C._are_functorch_transforms_active():
        o, final_state, states = eager.transformed_chunk_kda(*args)
    else:
        o, final_state, states = eager.chunk_kda(*args)
    final = final_state if output_final_state else None
    return (o, final, states) if return_intermediate_states else (o, final)


def recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    transpose_state_layout: bool | None = None,
    validate: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Kimi Delta Attention for a few tokens a sequence, with the keywords of fla's ``fused_recurrent_kda``.

    Takes and returns what :func:`chunk_kda` does; ``initial_state`` is left as it is. Not differentiable: a backward
    pass through it raises. A decode loop that keeps its states in place calls :func:`recurrent_kda_paged` instead.

    Raises:
        ValueError: naming the argument that is not as described.
    """
    if not use_gate_in_kernel:
        A_log = dt_bias = lower_bound = None
    state_v_first = _state_v_first(state_v_first, transpose_state_layout)
    is_compiling = torch.compiler.is_compiling()
    if is_compiling:  # what is traced sees these checks alone: of what this function itself looks at
        require_tensor("q", q)
        require_tensor("v", v)
        require_tensor("cu_seqlens", cu_seqlens, optional=True)
        require_tensor("initial_state", initial_state, optional=True)
    else:  # the op knows the states as its pool and does not require a row a sequence
        call = _chunk.Arguments(
            q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, use_gate_in_kernel=use_gate_in_kernel,
            use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel, allow_neg_eigval=allow_neg_eigval,
            lower_bound=lower_bound,
        )  # fmt: skip
        try:
            sizes = validate_tokens(call)
            validate_state("initial_state", initial_state, q, sizes, state_v_first)
        except eager.UNEXPLAINED as error:
            require_types(_chunk.op, call, error)
            raise
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if initial_state is None:
        K, (HV, V) = q.shape[-1], v.shape[-2:]
        shape = (sequences, HV, V, K) if state_v_first else (sequences, HV, K, V)
        states = q.new_zeros(shape, dtype=state_dtype(q))
    else:
        if initial_state.shape[0] != sequences:  # what is traced sees this check alone
            raise ValueError("initial_state must have one row a sequence")
        states = initial_state.clone(memory_format=torch.contiguous_format)
    rows = torch.arange(sequences, device=q.device, dtype=torch.int32)
    op = torch.ops.flashkda.recurrent_kda_paged.default if is_compiling else eager.recurrent_kda_paged
    o = op(
        q, k, v, g, beta, states, rows, A_log, dt_bias, cu_seqlens, None, scale, use_qk_l2norm_in_kernel,
        use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, lower_bound, state_v_first, validate,
    )  # fmt: skip
    if not output_final_state:
        return o, None
    if o.requires_grad:  # autograd does not know that the states were written
        if is_compiling:
            raise RuntimeError("recurrent_kda has no gradient: call what is compiled under torch.no_grad")
        states = rules.without_gradient("flashkda::recurrent_kda_paged", states, o)
    return o, states


def chunk_kda_paged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state_pool: Tensor,
    state_indices: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    batch_invariant: bool = False,
    validate: bool = False,
    checkpoint_offsets: Tensor | None = None,
    checkpoint_indices: Tensor | None = None,
) -> Tensor:
    """Prefill for serving: :func:`chunk_kda` on states that live in the rows of a pool, updated in place.

    Args:
        state_pool: ``[rows, HV, K, V]``, or ``[rows, HV, V, K]`` with ``state_v_first``; fp32 or bf16 (fp64 for fp64
            inputs). Rows are contiguous; the first dimension may be strided.
        state_indices: ``[N]``, int32 or int64: the row of each sequence. A slot outside ``[0, rows)`` marks padding: no
            row is read or written, and the outputs are zero. Slots in range are distinct.
        has_initial_state: ``[N]`` bool; a sequence that has none starts from zero, whatever its row holds. All have by
            default. An empty sequence leaves its row as it is.
        checkpoint_offsets, checkpoint_indices: ``[N, checkpoints]``, int32 or int64: the state after
            ``checkpoint_offsets[n, c]`` tokens of sequence ``n`` also goes to row ``checkpoint_indices[n, c]``, for a
            prefix cache. Offsets are in any order; one outside ``[1, length]``, a slot outside ``[0, rows)`` and any of
            a padding sequence write nothing. Slots in range are distinct, from ``state_indices`` too.
        The others: see :func:`chunk_kda`; without ``use_gate_in_kernel``, ``A_log``, ``dt_bias`` and ``lower_bound``
        must be None. ``validate`` also checks ``state_indices``.

    Returns:
        ``o [B, T, HV, V]`` in the dtype of ``q``.

    Raises:
        ValueError: naming the argument that is not as described.
    """
    op = torch.ops.flashkda.chunk_kda_paged.default if torch.compiler.is_compiling() else eager.chunk_kda_paged
    return op(
        q, k, v, g, beta, state_pool, state_indices, A_log, dt_bias, cu_seqlens, has_initial_state, scale,
        use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, lower_bound,
        state_v_first, batch_invariant, validate, checkpoint_offsets, checkpoint_indices,
    )  # fmt: skip


def recurrent_kda_paged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state_pool: Tensor,
    state_indices: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    validate: bool = False,
) -> Tensor:
    """Decode: one or a few tokens a sequence, on states that live in the rows of a pool, updated in place.

    Args:
        state_pool: as in :func:`chunk_kda_paged`.
        state_indices: ``[N]``: the row of each sequence, read before its first token and written after its last; or
            ``[N, slots]``: the rows after each of its tokens, for speculative decoding. Token ``t`` writes
            ``state_indices[n, t]``; the first token reads ``state_indices[n, num_accepted_tokens[n] - 1]``, the state
            after the last token that was accepted. Slots outside ``[0, rows)`` are not written, and a sequence that
            would read one is padding: nothing is read or written, and its outputs are zero. With ``[N, slots]`` each
            token starts from the state as a row of the pool holds it, in the pool's dtype, as plain decoding does.
        num_accepted_tokens: ``[N]`` int32 or int64, in ``[1, slots]`` (anything else marks padding); 1 by default.
        The others: see :func:`chunk_kda_paged`.

    Returns:
        ``o [B, T, HV, V]`` in the dtype of ``q``.

    Raises:
        ValueError: naming the argument that is not as described.
    """
    op = torch.ops.flashkda.recurrent_kda_paged.default if torch.compiler.is_compiling() else eager.recurrent_kda_paged
    return op(
        q, k, v, g, beta, state_pool, state_indices, A_log, dt_bias, cu_seqlens, num_accepted_tokens, scale,
        use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, lower_bound,
        state_v_first, validate,
    )  # fmt: skip
