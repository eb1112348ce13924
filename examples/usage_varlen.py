"""Packed sequences: one row of tokens, the boundaries in cu_seqlens."""

import torch
import torch.nn.functional as F

from flashkda_ops import chunk_kda

T, H, K = 100, 4, 64
q, k, v = (torch.randn(1, T, H, K) for _ in range(3))
g, beta = F.logsigmoid(torch.randn(1, T, H, K)), torch.rand(1, T, H)
# 37 and 53 tokens; a repeated entry is an empty sequence; the 10 rows past the end are padding.
cu_seqlens = torch.tensor([0, 37, 90, 90])
o, state = chunk_kda(
    q, k, v, g, beta, use_qk_l2norm_in_kernel=True, cu_seqlens=cu_seqlens, output_final_state=True, state_v_first=True
)
alone, _ = chunk_kda(*(x[:, 37:90] for x in (q, k, v, g, beta)), use_qk_l2norm_in_kernel=True)
print(f"states {tuple(state.shape)}, packed and alone differ by {(o[:, 37:90] - alone).abs().max():.1e}")
