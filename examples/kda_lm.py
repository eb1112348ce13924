"""A byte-level language model of Kimi Delta Attention layers, in plain PyTorch around the ops of ``flashkda_ops``.

One forward serves three phases, told apart by its ``Sequences``: training (``cu_seqlens`` alone: packed documents),
prefill (``cu_seqlens`` and ``state_indices``: packed prompts, whose states go into rows of each layer's pools) and
decode (``state_indices`` alone: one or a few tokens a sequence, from those rows).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NamedTuple

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


class Sequences(NamedTuple):
    """Where the sequences of a call lie in its tokens, and their states in the pools. See ``chunk_kda_paged``."""

    cu_seqlens: Tensor | None = None  # [N + 1]
    state_indices: Tensor | None = None  # [N], or [N, slots] to decode speculatively; -1 is padding
    has_initial_state: Tensor | None = None  # [N] bool: of prefill
    num_accepted_tokens: Tensor | None = None  # [N]: of speculative decoding


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
        y = x.to(self.weight.dtype)
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


class ShortConvolution(nn.Module):
    """Causal depthwise convolution and SiLU. Taps stop at the start of a document; the last inputs are the state."""

    def __init__(self, channels: int, config: Config) -> None:
        super().__init__()
        taps = config.conv_size
        self.weight = nn.Parameter(torch.randn(taps, channels) * taps**-0.5)  # weight[j]: the input j tokens back
        # Oldest input first. The last row is for padding to read and write, and no sequence's.
        state = torch.zeros(config.sequences + 1, taps - 1, channels, dtype=config.dtype)
        self.register_buffer("state", state, persistent=False)

    def forward(self, x: Tensor, s: Sequences) -> Tensor:
        return F.silu(self.decode(x, s) if s.cu_seqlens is None else self.packed(x, s.cu_seqlens.long(), s))

    def row(self, slots: Tensor) -> Tensor:
        """Of each slot; the last for those that are padding."""
        padding = self.state.shape[0] - 1
        return torch.where((slots >= 0) & (slots < padding), slots, padding).long()

    def decode(self, x: Tensor, s: Sequences) -> Tensor:
        """``x [N, T, channels]``, from the states before its first tokens; as in ``recurrent_kda_paged``."""
        (taps, channels), T = self.weight.shape, x.shape[1]
        slots = written = s.state_indices
        if s.num_accepted_tokens is not None:
            last = s.num_accepted_tokens.long().unsqueeze(1) - 1
            written = torch.where((last >= 0) & (last < slots.shape[1]), slots, -1)  # other counts mark padding
            slots = written.gather(1, last.clamp(0, slots.shape[1] - 1)).squeeze(1)
        elif slots.dim() == 2:
            slots = slots[:, 0]
        window = torch.cat((self.state[self.row(slots)], x), 1)
        if written.dim() == 2:  # a state a token
            states = window.unfold(1, taps - 1, 1)[:, 1:].mT.reshape(-1, taps - 1, channels)
            self.state.index_copy_(0, self.row(written[:, :T]).flatten(), states)
        else:
            self.state.index_copy_(0, self.row(slots), window[:, T:])
        weight = self.weight.to(x.dtype)
        y = x * weight[0]
        for j in range(1, taps):
            y = y + window[:, taps - 1 - j : taps - 1 - j + T] * weight[j]
        return y

    def packed(self, x: Tensor, cu_seqlens: Tensor, s: Sequences) -> Tensor:
        """``x [1, T, channels]`` of packed sequences, the inputs before them from the states where there are any."""
        (taps, channels), (N, T) = self.weight.shape, (cu_seqlens.shape[0] - 1, x.shape[1])
        token = torch.arange(T, device=x.device)
        sequence = torch.searchsorted(cu_seqlens, token, right=True) - 1  # N behind the last one
        position = token - cu_seqlens[sequence]
        earlier = x.new_zeros(())
        if s.state_indices is not None:
            row = self.row(s.state_indices)
            earlier = self.state[row]
            if s.has_initial_state is not None:
                earlier = torch.where(s.has_initial_state[:, None, None], earlier, 0)
            kept = torch.arange(1 - taps, 0, device=x.device) + cu_seqlens.diff().unsqueeze(1)  # of each its position
            older = earlier.gather(1, (kept + taps - 1).clamp(max=taps - 2).unsqueeze(-1).expand(-1, -1, channels))
            newer = x[0, (cu_seqlens[:-1, None] + kept).clamp(0, T - 1)]
            self.state.index_copy_(0, row, torch.where((kept >= 0).unsqueeze(-1), newer, older))
        weight = self.weight.to(x.dtype)
        y = x * weight[0]
        for j in range(1, taps):
            before = earlier
            if s.state_indices is not None:
                before = earlier[sequence.clamp(max=N - 1), (position + taps - 1 - j).clamp(max=taps - 2)]
            y = y + torch.where((position >= j).unsqueeze(-1), x.roll(j, 1), before) * weight[j]
        return y


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

    def forward(self, x: Tensor, s: Sequences) -> Tensor:
        qkv = self.qkv_conv1d(self.qkv_proj(x), s)
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
        if s.state_indices is None:
            o, _ = chunk_kda(*tokens, cu_seqlens=s.cu_seqlens, **options)
        elif s.cu_seqlens is None:
            o = recurrent_kda_paged(
                *tokens, self.state_pool, s.state_indices, num_accepted_tokens=s.num_accepted_tokens, **options
            )
        else:
            o = chunk_kda_paged(
                *tokens, self.state_pool, s.state_indices, cu_seqlens=s.cu_seqlens,
                has_initial_state=s.has_initial_state, **options,
            )  # fmt: skip
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

    def forward(self, x: Tensor, s: Sequences) -> Tensor:
        x = x + self.attn(self.attn_norm(x), s)
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

    def states(self) -> dict[str, Tensor]:
        """Every layer's states, ``[sequences, ...]`` each: what a ``StatePool`` hands out."""
        states = {}
        for i, layer in enumerate(self.layers):
            states[f"layers.{i}.recurrent"] = layer.attn.state_pool
            states[f"layers.{i}.convolution"] = layer.attn.qkv_conv1d.state[:-1]
        return states

    def hidden(self, tokens: Tensor, sequences: Sequences) -> Tensor:
        x = self.embeddings(tokens).to(self.config.dtype)
        for layer in self.layers:
            x = layer(x, sequences)
        return self.norm(x)

    def forward(self, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Logits ``[1, T, 256]`` of packed documents ``tokens [1, T]``."""
        return self.lm_head(self.hidden(tokens, Sequences(cu_seqlens))).float()

    def loss(self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Mean cross entropy, nats a byte."""
        return F.cross_entropy(self(tokens, cu_seqlens).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)

    def prefill(
        self,
        tokens: Tensor,
        cu_seqlens: Tensor,
        state_indices: Tensor,
        temperature: Tensor,
        has_initial_state: Tensor | None = None,
    ) -> Tensor:
        """Read packed prompts, or their next parts, and leave their states in the pools.

        Returns the token that follows each, ``[N]``. Prompts start from nothing, whatever the last occupant of their
        row left there, unless ``has_initial_state [N]`` says that they go on from it.
        """
        if has_initial_state is None:
            has_initial_state = torch.zeros_like(state_indices, dtype=torch.bool)
        hidden = self.hidden(tokens, Sequences(cu_seqlens, state_indices, has_initial_state))
        return sample(self.lm_head(hidden[0, cu_seqlens[1:] - 1]), temperature)

    def decode(
        self, tokens: Tensor, state_indices: Tensor, temperature: Tensor, num_accepted_tokens: Tensor | None = None
    ) -> Tensor:
        """The token that follows each of ``tokens``, ``[N]`` or, decoding speculatively, ``[N, T]``."""
        sequences = Sequences(None, state_indices, None, num_accepted_tokens)
        x = self.hidden(tokens.reshape(tokens.shape[0], -1), sequences)
        return sample(self.lm_head(x), temperature).view(tokens.shape)


def sample(logits: Tensor, temperature: Tensor) -> Tensor:
    """Gumbel-max sampling of ``logits [N, ..., 256]``: on the device, no synchronisation.

    ``temperature`` is a scalar or ``[N]``; one of 0 is greedy in the same graph.
    """
    noise = torch.empty_like(logits, dtype=torch.float32).exponential_().clamp(min=1e-20).log()
    return (logits.float() - temperature.view(-1, *[1] * (logits.dim() - 1)) * noise).argmax(-1)


def serving_copy(model: KdaLM) -> KdaLM:
    """The model with its matrices in the dtype of the activations; gate parameters, norms and states stay fp32."""
    served = copy.deepcopy(model).requires_grad_(False)
    for module in served.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.to(model.config.dtype)
    return served
