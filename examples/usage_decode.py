"""Prefill packed prompts into a pool of states, then decode from it, one token a sequence."""

import torch

from flashkda_ops import chunk_kda_paged, recurrent_kda_paged

H, K = 4, 128
options = {"state_v_first": True, "use_qk_l2norm_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
options |= {"use_gate_in_kernel": True, "lower_bound": -5.0}


def tokens(B: int, T: int) -> list[torch.Tensor]:  # q, k, v, g and beta
    return [*torch.randn(4, B, T, H, K), torch.randn(B, T, H)]


pool = torch.zeros(16, H, K, K)  # a server's states; these two prompts live in rows 3 and 8
rows = torch.tensor([3, 8])
prompt_out = chunk_kda_paged(*tokens(1, 90), pool, rows, cu_seqlens=torch.tensor([0, 37, 90]), **options)
for _ in range(5):
    o = recurrent_kda_paged(*tokens(2, 1), pool, rows, **options)  # in place: the states advance
print(f"prefill {tuple(prompt_out.shape)}, decode {tuple(o.shape)}, rows in use {pool.flatten(1).any(1).nonzero().T}")
