"""KDA over many ranks, on ``torch.distributed``: context parallel, and sharding rules for DTensors."""

from flashkda_ops.distributed.context_parallel import context_parallel_chunk_kda, context_parallel_halo

__all__ = ["context_parallel_chunk_kda", "context_parallel_halo"]
