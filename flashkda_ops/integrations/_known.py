"""The signatures that this package knows, of the functions and classes of other libraries that it stands in for.

Read off flash-linear-attention 0.6.0, and transformers 5.23.0 and 5.24.0, whose are the same. What an integration finds
installed is compared with them, and the tests compare them with what they run on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["CLASSES", "CHUNK_KEYWORDS", "FUNCTIONS", "FlaClass"]

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "fla.ops.kda.chunk_kda": (
        lambda q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False,
        use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False, use_beta_sigmoid_in_kernel=False,
        allow_neg_eigval=False, safe_gate=False, lower_bound=None, disable_recompute=False,
        return_intermediate_states=False, state_v_first=False, cu_seqlens=None, cu_seqlens_cpu=None, cp_context=None,
        use_graph=False, max_num_seqs=None, **kwargs: None
    ),
    "fla.ops.kda.fused_recurrent.fused_recurrent_kda_fwd": (
        lambda q, k, v, g, beta, A_log=None, dt_bias=None, initial_state=None, scale=None, output_final_state=False,
        inplace_final_state=True, state_v_first=False, cu_seqlens=None, ssm_state_indices=None,
        num_accepted_tokens=None, use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False,
        use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, lower_bound=None, out=None, **kwargs: None
    ),
    "fla.models.cache_utils.FLACache.from_legacy_cache": (
        lambda cls, past_key_values=None, seen_tokens=0, **kwargs: None
    ),
    "chunk_kimi_delta_attention": (  # of transformers' modeling files
        lambda query, key, value, g, beta, chunk_size=64, initial_state=None, output_final_state=False,
        use_qk_l2norm_in_kernel=False, **kwargs: None
    ),
    "recurrent_kimi_delta_attention": (
        lambda query, key, value, g, beta, initial_state, output_final_state, use_qk_l2norm_in_kernel=False,
        **kwargs: None
    ),
}  # fmt: skip

CHUNK_KEYWORDS = frozenset(("A_log", "dt_bias", "chunk_size", "transpose_state_layout"))
"""What fla's ``chunk_kda`` takes as further keywords."""


class FlaClass(NamedTuple):
    """Of a class of fla's, the names of its options and the signature of its ``forward``."""

    options: frozenset[str]
    forward: Callable[..., Any]


def _class(options: str, forward: Callable[..., Any]) -> FlaClass:
    return FlaClass(frozenset(options.split()), forward)


CLASSES = {
    "KimiDeltaAttention": _class(
        "hidden_size expand_v head_dim num_heads num_v_heads mode use_short_conv allow_neg_eigval safe_gate "
        "lower_bound conv_size conv_bias layer_idx norm_eps",
        lambda self, hidden_states, attention_mask=None, past_key_values=None, use_cache=False,
        output_attentions=False, **kwargs: None,
    ),
    "ShortConvolution": _class(
        "hidden_size kernel_size bias activation backend device dtype",
        lambda self, x, residual=None, mask=None, cache=None, output_final_state=False, cu_seqlens=None,
        chunk_indices=None, **kwargs: None,
    ),
    "FusedRMSNormGated": _class(
        "hidden_size elementwise_affine eps activation device dtype",
        lambda self, x, g, residual=None, prenorm=False, residual_in_fp32=False: None,
    ),
    "RMSNorm": _class(
        "hidden_size elementwise_affine bias eps device dtype",
        lambda self, x, residual=None, prenorm=False, residual_in_fp32=False: None,
    ),
    "GatedMLP": _class(
        "hidden_size hidden_ratio intermediate_size hidden_act fuse_swiglu powglu_power",
        lambda self, x, **kwargs: None,
    ),
    "FusedLinearCrossEntropyLoss": _class(
        "ignore_index label_smoothing logit_scale logit_softcapping num_chunks reduction use_l2warp l2_penalty_factor "
        "accumulate_grad_in_fp32 process_group",
        lambda self, x, target, weight, bias=None: None,
    ),
    "FusedCrossEntropyLoss": _class(
        "ignore_index reduction label_smoothing logit_scale lse_square_scale logit_softcapping inplace_backward "
        "process_group return_z_loss",
        lambda self, input, target: None,
    ),
}  # fmt: skip
"""Of fla, by name."""
