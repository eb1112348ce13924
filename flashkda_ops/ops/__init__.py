"""The ops of the ``flashkda`` namespace, one file each: schema, fake, kernel call, autograd.

Importing this package registers them; nothing in it imports the extension before a CUDA tensor asks for a kernel.
"""

from flashkda_ops.ops import (
    chunk_kda,
    chunk_kda_backward,
    chunk_kda_paged,
    chunk_kda_transition,
    eager,
    recurrent_kda_paged,
    rules,
)

__all__ = [
    "chunk_kda",
    "chunk_kda_backward",
    "chunk_kda_paged",
    "chunk_kda_transition",
    "eager",
    "recurrent_kda_paged",
    "rules",
]
