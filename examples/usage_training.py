"""Training under torch.compile: one graph, forward and backward."""

import torch

from flashkda_ops import chunk_kda


@torch.compile(fullgraph=True)
def loss_fn(q, k, v, g, beta, A_log, dt_bias):
    o, _ = chunk_kda(
        q, k, v, g, beta, A_log=A_log, dt_bias=dt_bias, lower_bound=-5.0,
        use_gate_in_kernel=True, use_qk_l2norm_in_kernel=True, use_beta_sigmoid_in_kernel=True,
    )  # fmt: skip
    return o.square().mean()


B, T, H, K = 2, 128, 4, 64
q, k, v, g = (torch.randn(B, T, H, K, requires_grad=True) for _ in range(4))
beta, A_log, dt_bias = (torch.zeros(s, requires_grad=True) for s in ((B, T, H), (H,), (H, K)))
loss = loss_fn(q, k, v, g, beta, A_log, dt_bias)
loss.backward()
print(f"loss {loss.item():.4f}, norm of the gradient of A_log {A_log.grad.norm():.1e}")
