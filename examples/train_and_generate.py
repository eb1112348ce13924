"""Train a byte-level KDA language model on Python's own standard library, then let it write some.

The train step is compiled with ``fullgraph=True``: forward, loss, backward and optimizer. Documents are packed: ``T``
tokens a step, their boundaries in ``cu_seqlens``, which changes at every step and recompiles nothing. Prompts are then
prefilled into a pool of states and decoded from there. On a GPU the train step and decoding are CUDA graphs. Needs no
download.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import shutil
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._dynamo
from kda_lm import IGNORE, Config, KdaLM, serving_copy
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from flashkda_ops import show_config

PROMPTS = ("def __init__(self, ", "import ", "class ", "    for i in range(")
CHECKED_TOKENS = 64
RULE = "-" * 100
Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True)
class Plan:
    """What one device does: the model, the shape of a step, the schedule."""

    model: Config
    tokens_per_step: int
    documents_per_step: int  # the capacity of cu_seqlens
    steps: int
    lr: float
    new_tokens: int


CPU_PLAN = Plan(Config(hidden_size=128, num_layers=2, num_heads=4, head_dim=32, sequences=4), 1024, 16, 400, 4e-3, 200)
GPU_PLAN = Plan(
    Config(hidden_size=512, num_layers=4, num_heads=4, head_dim=128, sequences=64, dtype=torch.bfloat16),
    8192, 64, 150, 1e-3, 400,
)  # fmt: skip


# Data ----------------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """``tokens`` and ``targets`` ``[1, T]`` of packed documents and their ``cu_seqlens [N + 1]``."""

    tokens: Tensor
    targets: Tensor
    cu_seqlens: Tensor


def standard_library() -> tuple[list[bytes], list[bytes]]:
    """The files of the running Python's standard library for training, and every 20th of them held out."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    paths = sorted(p for p in root.rglob("*.py") if skipped.isdisjoint(p.relative_to(root).parts))
    files = [data for p in paths if len(data := p.read_bytes()) > 1]
    if not files:
        raise SystemExit(f"no Python sources in {root}: this Python carries its standard library in another form")
    return [data for i, data in enumerate(files) if i % 20], files[::20]


def packed(files: list[bytes], plan: Plan, device: torch.device, seed: int) -> Iterator[Batch]:
    """An endless stream of batches: excerpts of random files and lengths, packed until ``T`` tokens are reached."""
    rng, T, capacity = random.Random(seed), plan.tokens_per_step, plan.documents_per_step
    sizes = list(accumulate(map(len, files)))
    while True:
        tokens, targets, ends = bytearray(), bytearray(), [0]
        while len(tokens) < T and len(ends) <= capacity:
            (file,) = rng.choices(files, cum_weights=sizes)
            length = min(int(T ** rng.uniform(0.6, 1.0)), len(file) - 1, T - len(tokens))
            start = rng.randrange(len(file) - length)
            tokens += file[start : start + length]
            targets += file[start + 1 : start + length + 1]
            ends.append(len(tokens))
        ends += ends[-1:] * (capacity + 1 - len(ends))  # repeated entries are empty sequences: the shape never changes
        padding = T - len(tokens)  # rows past the last sequence
        x = torch.tensor([*tokens, *[0] * padding])
        y = torch.tensor([*targets, *[IGNORE] * padding])
        yield Batch(*(t.to(device) for t in (x[None], y[None], torch.tensor(ends, dtype=torch.int32))))


def packed_prompts(prompts: list[bytes], plan: Plan, device: torch.device) -> tuple[Tensor, Tensor]:
    """``tokens [1, T]`` and ``cu_seqlens`` of prompts that may fill less than the ``T`` tokens of a step."""
    data = b"".join(prompts)
    tokens = torch.tensor([*data, *[0] * (plan.tokens_per_step - len(data))], device=device)
    ends = torch.tensor([0, *accumulate(map(len, prompts))], dtype=torch.int32, device=device)
    return tokens[None], ends


# Training ------------------------------------------------------------------------------------------------------------


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    mean: Sequence[Tensor],
    square: Sequence[Tensor],
    lr: Tensor,
    step: Tensor,
) -> None:
    """AdamW with gradients clipped to a norm of 1, in place. ``lr`` and ``step`` are tensors: values may change."""
    beta1, beta2, decay = 0.9, 0.95, 0.1
    clip = (1.0 / torch.stack([g.square().sum() for g in grads]).sum().sqrt()).clamp(max=1.0)
    for p, g, m, s in zip(params, grads, mean, square, strict=True):
        g = g * clip
        m.lerp_(g, 1 - beta1)
        s.lerp_(g.square(), 1 - beta2)
        update = (m / (1 - beta1**step)) / ((s / (1 - beta2**step)).sqrt() + 1e-8)
        p.sub_(lr * (update + decay * p if p.dim() > 1 else update))


class Moments(NamedTuple):
    """AdamW's, of each parameter, which steps update: zero before the first."""

    mean: list[Tensor]
    square: list[Tensor]

    @classmethod
    def of(cls, model: KdaLM) -> Moments:
        return cls(*([torch.zeros_like(p) for p in model.parameters()] for _ in range(2)))


def make_train_step(model: KdaLM, moments: Moments, compile: Compile) -> Callable[..., Tensor]:
    """``(tokens, targets, cu_seqlens, lr, step) -> loss``, which updates the model's parameters."""
    params, (mean, square) = list(model.parameters()), moments
    loss_fn, update = model.loss, adamw_

    def train_step(tokens: Tensor, targets: Tensor, cu_seqlens: Tensor, lr: Tensor, step: Tensor) -> Tensor:
        loss = loss_fn(tokens, targets, cu_seqlens)
        grads = torch.autograd.grad(loss, params)
        with torch.no_grad():
            update(params, grads, mean, square, lr, step)
        return loss.detach()

    if hasattr(torch._dynamo.config, "trace_autograd_ops"):  # torch 2.11: autograd.grad inside the graph
        torch._dynamo.config.trace_autograd_ops = True
        return compile(train_step)
    print(
        "this torch does not trace autograd.grad: the loss with its backward, and the update, are graphs of their own"
    )
    loss_fn, update = compile(model.loss), compile(adamw_)
    return train_step


class CapturedStep:
    """The same step replayed from a CUDA graph, optimizer included. It must have run before, to be compiled and warm.

    A replay reads its inputs where ``example`` lies during the capture; ``cu_seqlens`` among them may change freely.
    """

    def __init__(self, train_step: Callable[..., Tensor], *example: Tensor) -> None:
        # The step holds the parameters and the optimizer's state: the graph writes to them, but keeps nothing alive.
        self._step = train_step
        self._inputs = [x.clone() for x in example]
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._loss = train_step(*self._inputs)

    def __call__(self, *arguments: Tensor) -> Tensor:
        for static, x in zip(self._inputs, arguments, strict=True):
            static.copy_(x)
        self._graph.replay()
        return self._loss.clone()


def schedule(step: int, plan: Plan) -> float:
    """Learning rate: warm-up over a twentieth of the steps, then a cosine to a tenth of the peak."""
    warmup = max(1, plan.steps // 20)
    if step < warmup:
        return plan.lr * (step + 1) / warmup
    return plan.lr * (0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, plan.steps - warmup)))


# Generation ----------------------------------------------------------------------------------------------------------


class Decoder:
    """Decodes one token for every sequence a call, from the states that prefill left in the model's pools."""

    def __init__(self, decode: Callable[..., Tensor], rows: Tensor, temperature: Tensor) -> None:
        self.tokens = torch.zeros_like(rows)  # static: a captured graph reads and writes this very tensor
        self._decode: Callable[[], object] = lambda: self.tokens.copy_(decode(self.tokens, rows, temperature))
        self._advance = self._decode
        self._device = rows.device

    def capture(self) -> None:
        """From here on a call replays a CUDA graph. Warms up on a side stream first, as capture requires.

        ``_decode`` stays: the graph keeps nothing alive of what it reads.
        """
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._decode()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._decode()
        self._advance = graph.replay

    def generate(self, first: Tensor, count: int, bar: str | None = None) -> tuple[Tensor, float]:
        """``count`` tokens of each sequence, ``[N, count]``, and the tokens/s of decoding them."""
        out = first.new_empty(count, first.shape[0])
        self.tokens.copy_(first)
        synchronize(self._device)
        start = time.perf_counter()
        for i in tqdm(range(count), desc=bar, unit="tok", disable=bar is None, mininterval=0.5):
            out[i] = self.tokens
            self._advance()
        synchronize(self._device)
        return out.T, out.numel() / (time.perf_counter() - start)


@torch.no_grad()
def greedy_gap(model: KdaLM, prompt: bytes, generated: Tensor) -> tuple[int, float]:
    """How many greedily decoded tokens the training path over the whole sequence chooses too.

    And the most that one falls short of its choice, in logits.
    """
    tokens = torch.cat((torch.tensor([*prompt], device=generated.device), generated))
    ends = torch.tensor([0, len(tokens)], device=tokens.device, dtype=torch.int32)
    logits = model(tokens[None], ends)[0, len(prompt) - 1 : -1]
    best, argmax = logits.max(-1)
    chosen = logits.gather(1, generated[:, None]).squeeze(1)
    return int((argmax == generated).sum()), float((best - chosen).max())


# The demo ------------------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def choose_backend(device: torch.device) -> str:
    """Inductor writes C++ for a CPU, Triton (with launchers in C) for a GPU: both need a compiler and Python.h."""
    names = [os.environ.get("CC"), "gcc", "clang"]
    if device.type == "cpu":
        names = [os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")]
    has_header = (Path(sysconfig.get_path("include")) / "Python.h").is_file()
    if has_header and any(shutil.which(name) for name in names if name):
        return "inductor"
    print(f"no {'C++' if device.type == 'cpu' else 'C'} compiler (or no Python.h) found: compiling with aot_eager")
    return "aot_eager"


def compilations() -> Counter[str]:
    """Graph breaks and compiled graphs so far, by torch's own count."""
    counters = torch._dynamo.utils.counters
    return Counter(breaks=counters["graph_break"].total(), graphs=counters["stats"]["unique_graphs"])


class Training(NamedTuple):
    """``before`` and ``after``: the loss on training and on held-out files."""

    losses: list[float]
    before: list[float]
    after: list[float]
    speed: float
    compiled: Counter[str]
    held_out_files: list[bytes]


class Serving(NamedTuple):
    samples: list[list[int]]
    speeds: dict[str, float]
    compiled: Counter[str]


def plot(training: Training, out: Path) -> None:
    losses, held_out = training.losses, (training.before[1], training.after[1])
    fig = Figure(figsize=(7, 4), layout="constrained")  # without pyplot, which would look for a display
    ax = fig.subplots()
    ax.plot(losses, lw=0.8, alpha=0.4, color="tab:blue")
    window = max(1, len(losses) // 25)
    smooth = [sum(part) / len(part) for i in range(len(losses)) if (part := losses[max(0, i - window + 1) : i + 1])]
    ax.plot(smooth, color="tab:blue", label="training")
    ax.plot([0, len(losses)], held_out, "o", color="tab:orange", label="held-out files")
    ax.axhline(math.log(256), ls=":", color="gray", label="uniform")
    ax.set(xlabel="step", ylabel="loss (nats per byte)", title="KDA on the Python standard library")
    ax.legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(out, dpi=150)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--steps", type=int, help=f"training steps ({CPU_PLAN.steps} on a CPU, {GPU_PLAN.steps} on a GPU)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and samples (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument(
        "--prompt", action="append", help="what a sample starts with; may be repeated, up to 4 are shown"
    )
    parser.add_argument("--tokens", type=int, help=f"of each sample ({CPU_PLAN.new_tokens}, {GPU_PLAN.new_tokens})")
    parser.add_argument("--temperature", type=float, default=0.6, help="of sampling; 0 is greedy (%(default)s)")
    # On a CPU the kernels of this small model take microseconds: a second thread gains little, and costs tenfold where
    # another program has its core.
    parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU (%(default)s)")
    out = Path(__file__).parent / "out" / "loss.png"
    parser.add_argument("--out", type=Path, default=out, help="the loss curve (examples/out/loss.png)")
    return parser.parse_args()


def train(model: KdaLM, plan: Plan, compile: Compile, seed: int, device: torch.device) -> Training:
    """Train the model in place. The first calls compile; after them nothing may break a graph or compile again."""
    train_files, held_out_files = standard_library()
    print(
        f"data   {len(train_files)} files, {sum(map(len, train_files)) / 1e6:.1f} MB; {len(held_out_files)} held out\n"
        f"model  {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {plan.model.num_layers} layers, "
        f"{plan.model.num_heads} heads of {plan.model.head_dim}, {plan.tokens_per_step} tokens a step"
    )
    train_step = make_train_step(model, Moments.of(model), compile)
    eval_loss = torch.no_grad()(model.loss)  # eager: a few batches are done before another graph would have compiled
    streams = (packed(files, plan, device, seed=-1) for files in (train_files, held_out_files))
    eval_batches = [list(islice(stream, 8)) for stream in streams]

    def evaluate() -> list[float]:
        return [sum(float(eval_loss(*batch)) for batch in batches) / len(batches) for batches in eval_batches]

    batches = packed(train_files, plan, device, seed)
    scalars = [torch.tensor([schedule(i, plan), i + 1.0], device=device) for i in range(plan.steps)]
    before, start = evaluate(), time.perf_counter()
    losses = [train_step(*next(batches), *scalars[0])]
    if device.type == "cuda":
        train_step = CapturedStep(train_step, *next(batches), *scalars[0])
    synchronize(device)
    print(f"train step compiled in {time.perf_counter() - start:.0f} s")

    warm, start = compilations(), time.perf_counter()
    with tqdm(range(1, plan.steps), desc="train", unit="step", mininterval=0.5) as bar:
        for i in bar:
            losses.append(train_step(*next(batches), *scalars[i]))
            if i % 10 == 0:
                bar.set_postfix(loss=f"{losses[-1].item():.2f}")
    synchronize(device)
    speed = (plan.steps - 1) * plan.tokens_per_step / (time.perf_counter() - start)
    return Training([float(x) for x in losses], before, evaluate(), speed, compilations() - warm, held_out_files)


def serve(
    model: KdaLM, plan: Plan, compile: Compile, prompts: list[bytes], texts: list[bytes], temperature: float
) -> Serving:
    """Prefill and decode a pool full of sequences: timed, held against the training path, and to be read.

    ``prompts`` start the samples; the beginnings of ``texts`` are the prompts that prefill is timed with.
    """
    served = serving_copy(model)
    prefill, decode = (torch.no_grad()(compile(fn)) for fn in (served.prefill, served.decode))
    rows = torch.arange(plan.model.sequences, device=model.embeddings.weight.device)
    heat = rows.new_zeros((), dtype=torch.float32)  # a tensor: greedy and sampled decoding share one graph
    decoders = {
        "decode, eager": Decoder(torch.no_grad()(served.decode), rows, heat),
        "decode, compiled": Decoder(decode, rows, heat),
    }
    timed, asked = (packed_prompts(parts, plan, rows.device) for parts in (texts, prompts))

    start = time.perf_counter()
    for batch in (asked, timed):
        first = prefill(*batch, rows, heat)
    for decoder in decoders.values():
        decoder.generate(first, 2)
    if rows.is_cuda:
        decoders["decode, CUDA graph"] = Decoder(decode, rows, heat)
        decoders["decode, CUDA graph"].capture()
    synchronize(rows.device)
    print(f"prefill and decode compiled in {time.perf_counter() - start:.0f} s")

    warm, start, repeats = compilations(), time.perf_counter(), 5
    for _ in range(repeats):
        first = prefill(*timed, rows, heat)
    synchronize(rows.device)
    speeds = {"prefill": repeats * int(timed[1][-1]) / (time.perf_counter() - start)}
    for name, decoder in decoders.items():
        _, speeds[name] = decoder.generate(first, 50)

    # The last decoder is the fastest, and what it decodes must be what training would have chosen.
    greedy, _ = decoder.generate(prefill(*asked, rows, heat), CHECKED_TOKENS)
    checks = [greedy_gap(served, prompt, tokens) for prompt, tokens in zip(prompts[:4], greedy, strict=False)]
    same, gap = sum(same for same, _ in checks), max(gap for _, gap in checks)
    print(
        f"greedy decode: {same} of {len(checks) * CHECKED_TOKENS} tokens as in the training path, logit gap {gap:.1e}"
    )
    if gap > (0.25 if plan.model.dtype == torch.bfloat16 else 1e-3):  # near ties may fall either way
        raise SystemExit(f"prefill and decode disagree with the training path by {gap:.2e} in the logits")

    heat.fill_(temperature)
    samples, _ = decoder.generate(prefill(*asked, rows, heat), plan.new_tokens, bar="generate")
    return Serving(samples.tolist(), speeds, compilations() - warm)


def main() -> None:
    began, args = time.perf_counter(), parse_args()
    device = torch.device(args.device)
    plan = GPU_PLAN if device.type == "cuda" else CPU_PLAN
    plan = replace(plan, steps=args.steps or plan.steps, new_tokens=args.tokens or plan.new_tokens)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    show_config()
    backend = choose_backend(device)
    print(f"device {device}, torch {torch.__version__}, backend {backend}")

    def compile(fn: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(fn, fullgraph=True, dynamic=False, backend=backend)

    with device:
        model = KdaLM(plan.model)
    training = train(model, plan, compile, args.seed, device)
    plot(training, args.out)
    saved = {"config": asdict(plan.model), "weights": model.state_dict()}
    torch.save(saved, args.out.with_name("model.pt"))  # serve.py loads it

    sequences = plan.model.sequences
    length = plan.tokens_per_step // sequences
    shown = [prompt.encode()[-length:] or b"\n" for prompt in args.prompt or PROMPTS][:4]
    longest = sorted(training.held_out_files, key=len, reverse=True)
    prompts, texts = (list(islice(cycle(part), sequences)) for part in (shown, longest))
    serving = serve(model, plan, compile, prompts, [text[:length] for text in texts], args.temperature)

    for prompt, tokens in zip(shown, serving.samples, strict=False):
        print(f"{RULE}\n{(prompt + bytes(tokens)).decode(errors='replace')}")
    print(f"{RULE}\n{'loss, nats per byte':<28}{'before':>10}{'after':>10}")
    for name, a, b in zip(("training files", "held-out files"), training.before, training.after, strict=True):
        print(f"  {name:<26}{a:>10.3f}{b:>10.3f}")
    print("tokens per second")
    for name, speed in {"train": training.speed, **serving.speeds}.items():
        print(f"  {name:<26}{speed:>20,.0f}")
    compiled = training.compiled + serving.compiled
    print(f"after warm-up: {compiled['breaks']} graph breaks, {compiled['graphs']} recompilations")
    print(f"loss curve: {os.path.relpath(args.out)}; all in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
