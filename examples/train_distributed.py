"""The demo's model over many ranks: data, context and tensor parallel on one mesh, FSDP2 over the first two.

    torchrun --nproc-per-node 4 examples/train_distributed.py --mesh 1 2 2 --steps 20 --checkpoint examples/out/step20
    torchrun --nproc-per-node 2 examples/train_distributed.py --mesh 2 1 1 --steps 40 --checkpoint examples/out/step20

The second command resumes what the first one saved, on another mesh: a step is the same computation on every mesh.
Runs on GPUs with NCCL, or on CPUs with gloo.
"""

from __future__ import annotations

import argparse
import os
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from kda_lm import IGNORE, VOCAB, Config, Linear, RMSNorm
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from flashkda_ops.distributed import context_parallel_chunk_kda, context_parallel_halo, tensor_parallel_plan


class Batch(NamedTuple):
    """This rank's slice of a row of packed documents."""

    tokens: Tensor  # [1, T]
    targets: Tensor  # [1, T]
    position: Tensor  # [T]: of each token in its document
    cu_seqlens: Tensor  # of the whole row


class Attention(nn.Module):
    """The demo's token mixer, its projections apart so that they split by heads, on tokens that lie over ranks."""

    def __init__(self, config: Config, cp_mesh: DeviceMesh) -> None:
        super().__init__()
        D, H, K = config.hidden_size, config.num_heads, config.head_dim
        self.head_dim, self.num_heads, self.num_v_heads = K, H, H
        self.cp_mesh = cp_mesh
        self.q_proj, self.k_proj, self.v_proj = Linear(D, H * K), Linear(D, H * K), Linear(D, H * K)
        self.q_conv1d, self.k_conv1d, self.v_conv1d = (
            nn.Conv1d(H * K, H * K, config.conv_size, groups=H * K, bias=False) for _ in range(3)
        )
        self.f_proj = nn.Sequential(Linear(D, K), Linear(K, H * K))
        self.b_proj = Linear(D, H)
        self.g_proj = nn.Sequential(Linear(D, K), Linear(K, H * K))
        self.o_norm = RMSNorm(K)
        self.o_proj = Linear(H * K, D, gain=(2 * config.num_layers) ** -0.5)
        self.lower_bound = -5.0
        rate = torch.exp(torch.empty(H * K).uniform_(-6.9, -0.7))
        self.dt_bias = nn.Parameter(torch.logit(rate / -self.lower_bound))
        self.A_log = nn.Parameter(torch.zeros(H))

    def convolved(self, qkv: Tensor, position: Tensor) -> Tensor:
        """Causal, over the tokens of the rank before as well; taps stop at the start of a document."""
        weight = torch.cat([conv.weight for conv in (self.q_conv1d, self.k_conv1d, self.v_conv1d)])[:, 0].to(qkv.dtype)
        T, past = qkv.shape[1], weight.shape[1] - 1
        history = torch.cat((context_parallel_halo(qkv, past, self.cp_mesh), qkv), 1)
        y = qkv * weight[:, past]
        for back in range(1, past + 1):
            inside = (position >= back).unsqueeze(-1)
            y = y + torch.where(inside, history[:, past - back : past - back + T], 0) * weight[:, past - back]
        return F.silu(y)

    def forward(self, x: Tensor, batch: Batch) -> tuple[Tensor]:
        qkv = self.convolved(torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), -1), batch.position)
        q, k, v, g = (y.unflatten(-1, (-1, self.head_dim)) for y in (*qkv.chunk(3, -1), self.f_proj(x)))
        o, _ = context_parallel_chunk_kda(
            q, k, v, g, self.b_proj(x), self.cp_mesh, cu_seqlens=batch.cu_seqlens, A_log=self.A_log,
            dt_bias=self.dt_bias, lower_bound=self.lower_bound, use_gate_in_kernel=True, use_qk_l2norm_in_kernel=True,
            use_beta_sigmoid_in_kernel=True, check_ranks=False,
        )  # fmt: skip
        return (self.o_proj((self.o_norm(o) * self.g_proj(x).view_as(o).sigmoid()).flatten(2)),)


class SwiGLU(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        D, hidden = config.hidden_size, 8 * config.hidden_size // 3 // 32 * 32
        self.gate_proj, self.up_proj = Linear(D, hidden), Linear(D, hidden)
        self.down_proj = Linear(hidden, D, gain=(2 * config.num_layers) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: Config, cp_mesh: DeviceMesh) -> None:
        super().__init__()
        self.attn_norm, self.attn = RMSNorm(config.hidden_size), Attention(config, cp_mesh)
        self.mlp_norm, self.mlp = RMSNorm(config.hidden_size), SwiGLU(config)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        x = x + self.attn(self.attn_norm(x), batch)[0]
        return x + self.mlp(self.mlp_norm(x))


class Model(nn.Module):
    def __init__(self, config: Config, cp_mesh: DeviceMesh) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(VOCAB, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, cp_mesh) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size)
        self.lm_head = Linear(config.hidden_size, VOCAB, gain=0.1)

    def forward(self, batch: Batch) -> Tensor:
        """The sum of the cross entropies of this rank's tokens."""
        x = self.embeddings(batch.tokens)
        for layer in self.layers:
            x = layer(x, batch)
        logits = self.lm_head(self.norm(x)).float()
        return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE, reduction="sum")


def parallelized(config: Config, mesh: DeviceMesh, token_ranks: DeviceMesh) -> Model:
    """Heads and hidden units over ``tp``; then all parameters over the ranks that have tokens of their own."""
    torch.manual_seed(0)
    model = Model(config, mesh["cp"]).to(mesh.device_type)
    plan = {
        **tensor_parallel_plan("layers.*.attn"),
        "layers.*.mlp.gate_proj": ColwiseParallel(),
        "layers.*.mlp.up_proj": ColwiseParallel(),
        "layers.*.mlp.down_proj": RowwiseParallel(),
    }
    parallelize_module(model, mesh["tp"], plan)
    for layer in model.layers:
        fully_shard(layer, mesh=token_ranks)
    fully_shard(model, mesh=token_ranks)
    return model


class Data:
    """Rows of bytes of the Python standard library, cut into documents: a function of the step alone."""

    def __init__(self, rows: int, tokens: int, documents: int = 5) -> None:
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:80]
        self.text = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8)
        self.rows, self.tokens, self.documents = rows, tokens, documents

    def batch(self, step: int, mesh: DeviceMesh) -> Batch:
        """What this rank has: of the rows of its place in ``dp``, one after the other, the slice of that in ``cp``."""
        generator = torch.Generator().manual_seed(step)
        starts = torch.randint(len(self.text) - self.tokens, (self.rows,), generator=generator)
        cuts = torch.randint(self.tokens, (self.rows, self.documents - 1), generator=generator).sort(1).values
        rows = torch.arange(self.rows).chunk(mesh["dp"].size())[mesh["dp"].get_local_rank()]
        tokens = torch.cat([self.text[start : start + self.tokens] for start in starts[rows].tolist()]).long()
        begins = F.pad(cuts[rows], (1, 0)) + torch.arange(len(rows)).unsqueeze(1) * self.tokens
        cu_seqlens = torch.cat((begins.flatten(), torch.tensor([len(tokens)])))
        token = torch.arange(len(tokens))
        document = torch.searchsorted(cu_seqlens, token, right=True)
        targets = torch.where(token + 1 == cu_seqlens[document], IGNORE, tokens.roll(-1))
        row = (tokens, targets, token - cu_seqlens[document - 1])
        mine = [x.chunk(mesh["cp"].size())[mesh["cp"].get_local_rank()].to(mesh.device_type) for x in row]
        return Batch(mine[0].unsqueeze(0), mine[1].unsqueeze(0), mine[2], cu_seqlens.to(mesh.device_type))


class Training:
    """Model and optimizer, whose state is saved from one mesh and loaded on another."""

    def __init__(self, config: Config, mesh: DeviceMesh) -> None:
        self.ranks = mesh["dp", "cp"]._flatten("fsdp")
        self.model = parallelized(config, mesh, self.ranks)
        # Some parameters are on the mesh of two dimensions, some on one: no grouping of them.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3, foreach=False)
        self.steps = torch.zeros((), dtype=torch.int64)

    def step(self, batch: Batch, tokens: int) -> float:
        """One step; the loss of the whole batch of ``tokens``, nats a byte."""
        loss = self.model(batch) / tokens
        (loss * self.ranks.size()).backward()  # FSDP averages gradients; the loss is a sum over ranks
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        loss = loss.detach()
        dist.all_reduce(loss, group=self.ranks.get_group())
        return loss.item()

    def state(self) -> dict[str, object]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "steps": self.steps}

    def save(self, folder: str) -> None:
        dcp.save(self.state(), storage_writer=dcp.FileSystemWriter(folder, overwrite=True))

    def load(self, folder: str) -> None:
        state = self.state()
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])  # type: ignore[arg-type]


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """The losses of the steps that were taken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh", type=int, nargs=3, default=(1, 1, 1), metavar=("DP", "CP", "TP"))
    parser.add_argument("--steps", type=int, default=20, help="train until this many have been taken")
    parser.add_argument("--checkpoint", help="folder: resumed from where it exists, saved to at the end")
    parser.add_argument("--rows", type=int, default=4, help="of a batch")
    parser.add_argument("--tokens", type=int, default=256, help="in a row")
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    options = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    started = not dist.is_initialized()
    if started:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    mesh = init_device_mesh(device, tuple(options.mesh), mesh_dim_names=("dp", "cp", "tp"))

    head_dim = options.hidden_size // options.heads
    config = Config(options.hidden_size, options.layers, options.heads, head_dim, sequences=0)
    training, data = Training(config, mesh), Data(options.rows, options.tokens)
    if options.checkpoint and Path(options.checkpoint).exists():
        training.load(options.checkpoint)
    losses, first, start = [], int(training.steps), time.perf_counter()
    for step in range(first, options.steps):
        losses.append(training.step(data.batch(step, mesh), options.rows * options.tokens))
        if dist.get_rank() == 0:
            speed = (step + 1 - first) * options.rows * options.tokens / (time.perf_counter() - start)
            print(f"step {step + 1:4}  loss {losses[-1]:.4f}  {speed:,.0f} bytes/s", flush=True)
    if options.checkpoint:
        training.save(options.checkpoint)
    if started:
        dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()
