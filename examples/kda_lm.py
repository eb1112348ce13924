"""A byte-level language model of Kimi Delta Attention layers, in plain PyTorch around the ops of ``flashkda_ops``.

One forward serves three phases, told apart by its arguments: training (``cu_seqlens`` alone: packed documents), prefill
(``cu_seqlens`` and ``state_indices``: packed prompts, whose final states go into rows of each layer's pool) and decode
(``state_indices`` alone: one token a sequence, from those rows).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashkda_ops import chunk_kda, chunk_kda_paged, recurrent_kda_paged

VOCAB = 256
IGNORE = -100  # the target of a row that holds no token


@dataclass(frozen=True)
class Config:
    """The model's sizes. ``sequences`` is the rows of the state pools; ``dtype`` that of the activations."""

    hidden_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    sequences: int
    dtype: torch.dtype = torch.float32
    conv_size: int = 4


class Linear(nn.Linear):
    """Without bias; fp32 weights for the optimizer meet activations of any dtype."""

    def __init__(self, in_features: int, out_features: int, gain: float = 1.0) -> None:
        super().__init__(in_features, out_features, bias=False)
        nn.init.normal_(self.weight, std=gain * in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


class ShortConvolution(nn.Module):
    """Causal depthwise convolution and SiLU. Taps stop at the start of a document; the last inputs are the state."""

    def __init__(self, channels: int, config: Config) -> None:
        super().__init__()
        taps = config.conv_size
        self.weight = nn.Parameter(torch.randn(taps, channels) * taps**-0.5)  # weight[j]: the input j tokens back
        state = torch.zeros(config.sequences, taps - 1, channels, dtype=config.dtype)  # newest first
        self.register_buffer("state", state, persistent=False)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None, state_indices: Tensor | None) -> Tensor:
        weight = self.weight.to(x.dtype)
        taps = weight.shape[0]
        if cu_seqlens is None:
            window = torch.cat((x, self.state[state_indices]), 1)
            self.state.index_copy_(0, state_indices, window[:, :-1])
            return F.silu((window * weight).sum(1, keepdim=True))
        token = torch.arange(x.shape[1], device=x.device, dtype=cu_seqlens.dtype)
        position = token - cu_seqlens[torch.searchsorted(cu_seqlens, token, right=True) - 1]
        y = x * weight[0]
        for j in range(1, taps):
            y = y + torch.where((position >= j).unsqueeze(-1), x.roll(j, 1), 0) * weight[j]
        if state_indices is not None:
            last = cu_seqlens[1:, None] - 1 - torch.arange(taps - 1, device=x.device)
            inside = last >= cu_seqlens[:-1, None]
            self.state.index_copy_(0, state_indices, torch.where(inside.unsqueeze(-1), x[0, last.clamp(min=0)], 0))
        return F.silu(y)


class KimiDeltaAttention(nn.Module):
    """The token mixer of Kimi Linear (arXiv:2510.26692): everything between its projections is one op."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        D, H, K = config.hidden_size, config.num_heads, config.head_dim
        self.head_dim = K
        self.qkv_proj = Linear(D, 3 * H * K)
        self.qkv_conv1d = ShortConvolution(3 * H * K, config)
        self.f_proj = nn.Sequential(Linear(D, K), Linear(K, H * K))  # the gate of the state, low rank
        self.b_proj = Linear(D, H)
        self.g_proj = nn.Sequential(Linear(D, K), Linear(K, H * K))  # the gate of the output, low rank
        self.o_norm = RMSNorm(K)
        self.o_proj = Linear(H * K, D, gain=(2 * config.num_layers) ** -0.5)
        # A channel starts with a log decay of -rate: its memory lasts about 1 / rate tokens, from 2 to 1000.
        self.lower_bound = -5.0
        rate = torch.exp(torch.empty(H * K).uniform_(-6.9, -0.7))
        self.dt_bias = nn.Parameter(torch.logit(rate / -self.lower_bound))
        self.A_log = nn.Parameter(torch.zeros(H))
        # A buffer of the module: compiled code and CUDA graphs then update it in place at a fixed address.
        self.register_buffer("state_pool", torch.zeros(config.sequences, H, K, K), persistent=False)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None, state_indices: Tensor | None) -> Tensor:
        qkv = self.qkv_conv1d(self.qkv_proj(x), cu_seqlens, state_indices)
        # Views, strided as the fused projection: the ops read them where they lie.
        q, k, v = qkv.unflatten(-1, (3, -1, self.head_dim)).unbind(2)
        g = self.f_proj(x).unflatten(-1, (-1, self.head_dim))
        tokens = (q, k, v, g, self.b_proj(x))
        options = {
            "A_log": self.A_log,
            "dt_bias": self.dt_bias,
            "lower_bound": self.lower_bound,
            "use_gate_in_kernel": True,
            "use_qk_l2norm_in_kernel": True,
            "use_beta_sigmoid_in_kernel": True,
            "state_v_first": True,
        }
        if state_indices is None:
            o, _ = chunk_kda(*tokens, cu_seqlens=cu_seqlens, **options)
        elif cu_seqlens is None:
            o = recurrent_kda_paged(*tokens, self.state_pool, state_indices, **options)
        else:  # prompts start from nothing, whatever the last occupant of a row left there
            fresh = torch.zeros_like(state_indices, dtype=torch.bool)
            o = chunk_kda_paged(
                *tokens, self.state_pool, state_indices, cu_seqlens=cu_seqlens, has_initial_state=fresh, **options
            )
        return self.o_proj((self.o_norm(o) * self.g_proj(x).view_as(o).sigmoid()).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        D, hidden = config.hidden_size, 8 * config.hidden_size // 3 // 32 * 32
        self.gate_up_proj = Linear(D, 2 * hidden)
        self.down_proj = Linear(hidden, D, gain=(2 * config.num_layers) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attn_norm, self.attn = RMSNorm(config.hidden_size), KimiDeltaAttention(config)
        self.mlp_norm, self.mlp = RMSNorm(config.hidden_size), SwiGLU(config)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None, state_indices: Tensor | None) -> Tensor:
        x = x + self.attn(self.attn_norm(x), cu_seqlens, state_indices)
        return x + self.mlp(self.mlp_norm(x))


class KdaLM(nn.Module):
    """Bytes to logits, and the three callables that the demo compiles: ``loss``, ``prefill`` and ``decode``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.Embedding(VOCAB, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size)
        self.lm_head = Linear(config.hidden_size, VOCAB, gain=0.1)  # small: training starts at ln(256) nats a byte

    def hidden(self, tokens: Tensor, cu_seqlens: Tensor | None = None, state_indices: Tensor | None = None) -> Tensor:
        x = self.embeddings(tokens).to(self.config.dtype)
        for layer in self.layers:
            x = layer(x, cu_seqlens, state_indices)
        return self.norm(x)

    def forward(self, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Logits ``[1, T, 256]`` of packed documents ``tokens [1, T]``."""
        return self.lm_head(self.hidden(tokens, cu_seqlens)).float()

    def loss(self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Mean cross entropy, nats a byte."""
        return F.cross_entropy(self(tokens, cu_seqlens).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)

    def prefill(self, tokens: Tensor, cu_seqlens: Tensor, state_indices: Tensor, temperature: Tensor) -> Tensor:
        """Read packed prompts, leave their states in the pools; the first new token of each, ``[N]``."""
        last = self.hidden(tokens, cu_seqlens, state_indices)[0, cu_seqlens[1:] - 1]
        return sample(self.lm_head(last), temperature)

    def decode(self, tokens: Tensor, state_indices: Tensor, temperature: Tensor) -> Tensor:
        """One token ``[N]`` of each sequence to the next."""
        x = self.hidden(tokens.unsqueeze(1), None, state_indices)
        return sample(self.lm_head(x).squeeze(1), temperature)


def sample(logits: Tensor, temperature: Tensor) -> Tensor:
    """Gumbel-max sampling: on the device, no synchronisation; a temperature of 0 is greedy in the same graph."""
    noise = torch.empty_like(logits, dtype=torch.float32).exponential_().clamp(min=1e-20).log()
    return (logits.float() - temperature * noise).argmax(-1)
