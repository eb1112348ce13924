"""A small Kimi Linear of transformers: tokens a second with fla's KDA and with ``flashkda_ops.integrations``.

Prefill, a training step and ``generate`` (prompt and new tokens, a batch of sequences), each eager and compiled:
prefill and training by ``torch.compile``, ``generate`` by transformers itself, which compiles its decode step where the
cache is static. Both implementations run in one process, in turn, in the same model with random weights; they
differ in the two functions that the integration replaces. Without a GPU the sizes are tiny and fla is left out.

    python benchmarks/bench_transformers.py [--modes eager compiled]
"""

from __future__ import annotations

import argparse
import inspect
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from common import cpu_us, error, gpu_us, version, write
from transformers import CompileConfig, KimiLinearConfig, KimiLinearForCausalLM
from transformers.models.kimi_linear import modeling_kimi_linear as modeling

from flashkda_ops.integrations import transformers as integration

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)
BACKEND = "inductor" if ON_GPU else "aot_eager"  # no minutes of C++ compilation for a trial run
BATCH, TOKENS, SEQUENCES, PROMPT, NEW = (2, 4096, 16, 256, 32) if ON_GPU else (1, 128, 2, 16, 4)
WIDTH, HEADS, HEAD_DIM, EXPERTS = (1024, 16, 128, 8) if ON_GPU else (64, 2, 16, 4)
FUNCTIONS = ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention")


def make_model() -> Any:
    config = KimiLinearConfig(
        vocab_size=8192, hidden_size=WIDTH, intermediate_size=4 * WIDTH, moe_intermediate_size=WIDTH,
        num_hidden_layers=4, num_attention_heads=HEADS, num_key_value_heads=HEADS, num_experts_per_tok=2,
        kv_lora_rank=WIDTH // 2, qk_rope_head_dim=HEAD_DIM // 2, v_head_dim=HEAD_DIM, qk_nope_head_dim=HEAD_DIM,
        num_local_experts=EXPERTS, linear_head_dim=HEAD_DIM, linear_num_heads=HEADS, pad_token_id=0, eos_token_id=None,
        layer_types=["linear_attention"] * 3 + ["full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    return KimiLinearForCausalLM(config).to(DEVICE, DTYPE).eval()


def implementations() -> dict[str, list[Callable[..., Any]]]:
    """The two functions of the modeling file, by who serves them."""
    theirs = [getattr(modeling, name) for name in FUNCTIONS]
    integration.enable()
    impls = {"flashkda_ops": [getattr(modeling, name) for name in FUNCTIONS]}
    integration.disable()
    # transformers takes its PyTorch path without a word where fla cannot be imported.
    found_fla = inspect.getclosurevars(theirs[0]).nonlocals["is_new_implementation"]
    return impls | ({"fla": theirs} if ON_GPU and found_fla else {})


def phases(model: Any) -> dict[str, tuple[int, Callable[[], Any], Callable[[], Any]]]:
    """Tokens, and what gives them: eager and compiled."""
    tokens = torch.randint(1, 8192, (BATCH, TOKENS), device=DEVICE)
    prompts = torch.randint(1, 8192, (SEQUENCES, PROMPT), device=DEVICE)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    compile_config = CompileConfig(fullgraph=False)
    compile_config._compile_all_devices = True
    if not ON_GPU:
        compile_config.mode, compile_config.backend = None, BACKEND

    @torch.no_grad()
    def prefill() -> torch.Tensor:
        return model(tokens, use_cache=False, logits_to_keep=1).logits

    def training() -> torch.Tensor:
        loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        model.zero_grad(set_to_none=True)
        return loss

    # Compiled is the model alone: the loss and its backward pass included, zero_grad not.
    compiled = torch.compile(model, backend=BACKEND)

    @torch.no_grad()
    def compiled_prefill() -> torch.Tensor:
        return compiled(tokens, use_cache=False, logits_to_keep=1).logits

    def compiled_training() -> torch.Tensor:
        loss = compiled(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        model.zero_grad(set_to_none=True)
        return loss

    return {
        "prefill": (tokens.numel(), prefill, compiled_prefill),
        "training": (tokens.numel(), training, compiled_training),
        "generate": (
            SEQUENCES * NEW,
            lambda: model.generate(prompts, **options),
            lambda: model.generate(prompts, cache_implementation="static", compile_config=compile_config, **options),
        ),
    }


def serve(functions: list[Callable[..., Any]]) -> None:
    for name, function in zip(FUNCTIONS, functions, strict=True):
        setattr(modeling, name, function)


def served(functions: list[Callable[..., Any]], call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        serve(functions)
        return call()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description="KDA models of transformers")
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"])
    chosen = parser.parse_args().modes
    transformers.logging.set_verbosity_error()
    model, impls = make_model(), implementations()
    breaks = torch._dynamo.utils.counters["graph_break"]
    rows: list[dict[str, Any]] = []
    sizes = {"batch": BATCH, "tokens": TOKENS, "sequences": SEQUENCES, "prompt": PROMPT, "new_tokens": NEW}
    sizes |= {"hidden": WIDTH, "heads": HEADS, "head_dim": HEAD_DIM, "layers": 4, "experts": EXPERTS}
    peers = {"fla": version("fla-core"), "transformers": version("transformers")}
    for phase, (tokens, *modes) in phases(model).items():
        for mode, call in zip(("eager", "compiled"), modes, strict=True):
            if mode not in chosen:
                continue
            calls, records, outputs = {}, {}, {}
            for impl, functions in impls.items():
                breaks.clear()
                start = time.perf_counter()
                run = served(functions, call)
                record = {"phase": phase, "mode": mode, "impl": impl}
                try:
                    outputs[impl] = run()
                except Exception as failure:
                    rows.append(record | {"failed": f"{type(failure).__name__}: {failure}"[:300]})
                    print(f"{phase:9} {mode:8} {impl:13} {rows[-1]['failed']}")
                    continue
                calls[impl] = run
                records[impl] = record | {"first_s": time.perf_counter() - start, "graph_breaks": breaks.total()}
            if phase == "prefill" and {"fla", "flashkda_ops"} <= outputs.keys():
                records["flashkda_ops"]["difference"] = error(outputs["flashkda_ops"], outputs["fla"].double())
            times = gpu_us(calls, inner=1, runs=20) if ON_GPU else cpu_us(calls, runs=2, warmup=1)
            for impl, (us, spread) in times.items():
                rows.append(records[impl] | {"us": us, "spread": spread, "tokens_s": tokens / us * 1e6})
                print(
                    f"{phase:9} {mode:8} {impl:13} {rows[-1]['tokens_s']:12.0f} tokens/s (spread {spread:.2f}), "
                    f"{rows[-1]['graph_breaks']} graph breaks, first call {rows[-1]['first_s']:.1f} s"
                )
            # At once: a run that is cut short leaves what it has.
            written = write("transformers", rows, sizes=sizes, peers=peers)
    print(written)


if __name__ == "__main__":
    main()
