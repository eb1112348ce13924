"""Small random models of transformers that have KDA layers, and their own PyTorch path."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", minversion="5.23")
import transformers
from transformers import (
    BailingHybridConfig,
    BailingHybridForCausalLM,
    Glm5NextConfig,
    Glm5NextForConditionalGeneration,
    KimiLinearConfig,
    KimiLinearForCausalLM,
)

transformers.logging.set_verbosity_error()

KDA_FUNCTIONS = ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention")

# Two KDA layers around a full-attention layer, a dense feed-forward and two of experts.
_SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 16, "v_head_dim": 8, "qk_nope_head_dim": 8,
    "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
}  # fmt: skip
_KDA: dict[str, Any] = {"linear_head_dim": 8, "linear_num_heads": 2}


def _kimi_linear() -> Any:
    layers = ["linear_attention", "full_attention", "linear_attention"]
    return KimiLinearForCausalLM(
        KimiLinearConfig(**_SIZES, **_KDA, layer_types=layers, qk_rope_head_dim=8, num_local_experts=4)
    )


def _glm5_next() -> Any:
    layers = ["linear_attention", "indexed_attention", "linear_attention"]
    text = {
        **_SIZES, **_KDA, "layer_types": layers, "q_lora_rank": 16, "n_routed_experts": 4, "index_topk": 8,
        "index_head_dim": 16, "index_n_heads": 2, "index_kpool": 2, "hc_mult": 2, "hc_sinkhorn_iters": 3,
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
    return Glm5NextForConditionalGeneration(Glm5NextConfig(text_config=text, vision_config=vision))


def _bailing_hybrid() -> Any:
    sizes = _SIZES | {"head_dim": 8, "qk_rope_head_dim": 8, "num_local_experts": 4, "n_group": 2, "topk_group": 1}
    return BailingHybridForCausalLM(BailingHybridConfig(**sizes, layer_group_size=2, num_mtp_layers=0))


MODELS: dict[str, Callable[[], Any]] = {
    "kimi_linear": _kimi_linear,
    "glm5_next": _glm5_next,
    "bailing_hybrid": _bailing_hybrid,
}


def make_model(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def modeling(name: str) -> ModuleType:
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def use_own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models' PyTorch functions, which fla's replace where it is installed; fla's need a GPU."""
    for name in MODELS:
        module = modeling(name)
        for function in KDA_FUNCTIONS:
            own = getattr(module, function)
            monkeypatch.setattr(module, function, getattr(own, "__wrapped__", own))


def prompts(batch: int = 2, tokens: int = 70, seed: int = 0) -> Tensor:
    return torch.randint(3, 50, (batch, tokens), generator=torch.Generator().manual_seed(seed))
