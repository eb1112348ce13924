"""Capture varlen attention in a CUDA graph, replay it with other lengths."""

import torch

from flashkda_ops import chunk_kda

if not torch.cuda.is_available():
    print("this example needs a GPU")
    raise SystemExit

T, H, K = 1024, 4, 128
q, k, v, g = torch.randn(4, 1, T, H, K, device="cuda", dtype=torch.bfloat16)
beta = torch.randn(1, T, H, device="cuda", dtype=torch.bfloat16)
cu_seqlens = torch.tensor([0, 300, T, T], device="cuda", dtype=torch.int32)
options = {"use_gate_in_kernel": True, "lower_bound": -5.0, "use_qk_l2norm_in_kernel": True}
options |= {"use_beta_sigmoid_in_kernel": True, "cu_seqlens": cu_seqlens}

stream = torch.cuda.Stream()
stream.wait_stream(torch.cuda.current_stream())
with torch.cuda.stream(stream):  # warm-up, as capture requires
    chunk_kda(q, k, v, g, beta, **options)
torch.cuda.current_stream().wait_stream(stream)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    o, _ = chunk_kda(q, k, v, g, beta, **options)

cu_seqlens.copy_(torch.tensor([0, 5, 700, 900]))  # other boundaries, and padding at the end
graph.replay()
print(f"replay and eager call differ by {(o - chunk_kda(q, k, v, g, beta, **options)[0]).abs().max():.1e}")
