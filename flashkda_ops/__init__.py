"""Kimi Delta Attention (KDA) as first-class PyTorch operators."""

from flashkda_ops import ops as ops  # registers the flashkda namespace
from flashkda_ops.config import show_config
from flashkda_ops.functional import chunk_kda, chunk_kda_paged, recurrent_kda, recurrent_kda_paged

__all__ = ["chunk_kda", "chunk_kda_paged", "recurrent_kda", "recurrent_kda_paged", "show_config"]
__version__ = "0.1.0"
