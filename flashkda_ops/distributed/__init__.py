"""KDA over many ranks, on ``torch.distributed``: context parallel, sharding rules for DTensors, tensor parallel.

Importing it registers the sharding rules.
"""

from flashkda_ops.distributed import sharding as sharding
from flashkda_ops.distributed.context_parallel import context_parallel_chunk_kda, context_parallel_halo
from flashkda_ops.distributed.tensor_parallel import KimiDeltaAttentionParallel, tensor_parallel_plan

__all__ = [
    "context_parallel_chunk_kda",
    "context_parallel_halo",
    "KimiDeltaAttentionParallel",
    "tensor_parallel_plan",
]
