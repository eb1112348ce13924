"""What an engine needs around the paged ops: slots for states, and CUDA graphs of a model. See ``docs/serving.md``."""

from flashkda_ops.serving.graph_runner import CapturedGraph, CaptureReport, GraphRunner
from flashkda_ops.serving.state_pool import PoolExhausted, StatePool

__all__ = ["CapturedGraph", "CaptureReport", "GraphRunner", "PoolExhausted", "StatePool"]
