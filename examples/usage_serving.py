"""Serving: slots from a StatePool, prefill and decode through a GraphRunner."""

import torch
from torch import nn

from flashkda_ops import chunk_kda_paged, recurrent_kda_paged
from flashkda_ops.serving import GraphRunner, PoolExhausted, StatePool

H, K, SLOTS, VOCAB = 2, 64, 8, 100
OPTIONS = {"state_v_first": True, "use_qk_l2norm_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
OPTIONS |= {"use_gate_in_kernel": True, "lower_bound": -5.0}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, 64), nn.Linear(H * K, VOCAB)
        self.proj = nn.Linear(64, 4 * H * K + H)
        self.register_buffer("state", torch.zeros(SLOTS, H, K, K))

    def inputs(self, tokens):
        *qkvg, beta = self.proj(self.embed(tokens)).split([H * K] * 4 + [H], -1)
        return [*(x.unflatten(-1, (H, K)) for x in qkvg), beta]

    def decode(self, tokens, state_indices):
        o = recurrent_kda_paged(*self.inputs(tokens[:, None]), self.state, state_indices, **OPTIONS)
        return self.head(o.flatten(1)).argmax(-1)

    def prefill(self, tokens, cu_seqlens, state_indices, has_initial_state):
        o = chunk_kda_paged(
            *self.inputs(tokens), self.state, state_indices, cu_seqlens=cu_seqlens,
            has_initial_state=has_initial_state, **OPTIONS,
        )  # fmt: skip
        return self.head(o[0, cu_seqlens[1:] - 1].flatten(1)).argmax(-1)


model = Model().to("cuda" if torch.cuda.is_available() else "cpu")
pool = StatePool({"recurrent": model.state})
runner = GraphRunner(model.decode, model.prefill, pool, batch_buckets=(1, 2, 4), token_buckets=(64, 256))
print(runner.capture())  # on a CPU nothing is captured, and the rest is the same

slots = pool.allocate(2)
rows = torch.tensor(slots, dtype=torch.int32)
prompts = {"tokens": torch.randint(VOCAB, (1, 50)), "cu_seqlens": torch.tensor([0, 20, 50], dtype=torch.int32)}
token = runner.prefill(**prompts, state_indices=rows, has_initial_state=torch.tensor([False, False]))
for _ in range(5):
    token = runner.decode(tokens=token, state_indices=rows)
pool.free(slots)
try:
    pool.allocate(SLOTS + 1)
except PoolExhausted as full:
    print(f"next tokens {token.tolist()}; {full}")
