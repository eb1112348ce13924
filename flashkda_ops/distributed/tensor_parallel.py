"""Tensor parallel for the layer: each rank has some of the heads."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement

__all__ = ["KimiDeltaAttentionParallel", "tensor_parallel_plan"]

# How the parameters split by heads. What all heads share is replicated.
_PLACEMENTS: dict[str, Placement] = {
    **{f"{name}_proj.weight": Shard(0) for name in ("q", "k", "v", "b")},
    **{f"{name}_conv1d.{parameter}": Shard(0) for name in ("q", "k", "v") for parameter in ("weight", "bias")},
    **{f"{name}_proj.0.weight": Replicate() for name in ("f", "g")},
    **{f"{name}_proj.1.{parameter}": Shard(0) for name in ("f", "g") for parameter in ("weight", "bias")},
    "A_log": Shard(0),
    "dt_bias": Shard(0),
    "o_norm.weight": Replicate(),
    "o_proj.weight": Shard(1),
}


class KimiDeltaAttentionParallel(ParallelStyle):
    """Splits a :class:`flashkda_ops.nn.KimiDeltaAttention` by heads, for ``parallelize_module``.

    The parameters become DTensors, for optimizers, checkpoints and ``fully_shard`` to see whole; the layer itself reads
    its rank's parts of them and computes on plain tensors. So what is communicated is the sum of the outputs in the
    forward pass and that of the gradients of the input in the backward pass, as in any attention, and the small
    gradients of the parameters that all heads share. Caches hold the states of the rank's heads.

    Args:
        input_layouts: how the layer's input ``[B, T, hidden_size]`` comes: ``Replicate()``, or ``Shard(1)`` where ranks
            hold slices of the tokens in between (sequence parallel).
        output_layouts: how its output is to leave.

    Raises:
        ValueError: the heads do not split evenly over the mesh, or the module is another.
    """

    def __init__(self, *, input_layouts: Placement | None = None, output_layouts: Placement | None = None) -> None:
        super().__init__()
        self.input_layouts = input_layouts or Replicate()
        self.output_layouts = output_layouts or Replicate()

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name in ("num_heads", "num_v_heads"):
            heads = getattr(module, name)
            if heads % device_mesh.size():
                raise ValueError(
                    f"{name} must be a multiple of the {device_mesh.size()} ranks of the mesh, got {heads}"
                )
        owners: dict[str, list[str]] = {}
        for name, parameter in list(module.named_parameters()):
            if name not in _PLACEMENTS:
                raise ValueError(f"module must be a KimiDeltaAttention, got a {type(module).__name__} with {name}")
            owner, _, leaf = name.rpartition(".")
            whole = distribute_tensor(parameter, device_mesh, [_PLACEMENTS[name]], src_data_rank=self.src_data_rank)
            split = nn.Parameter(whole, requires_grad=parameter.requires_grad)
            split.__dict__.update(parameter.__dict__)  # marks for the optimizer
            module.get_submodule(owner).register_parameter(leaf, split)
            owners.setdefault(owner, []).append(leaf)
        for owner, leaves in owners.items():
            _read_locally(module.get_submodule(owner), leaves, device_mesh)
        module.tensor_parallel_size = device_mesh.size()  # type: ignore[assignment]  # caches hold the rank's heads
        module.register_forward_pre_hook(partial(self._take, device_mesh), with_kwargs=True)
        module.register_forward_hook(partial(self._give, device_mesh))
        return module

    def _take(
        self, mesh: DeviceMesh, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The whole input; its gradient is the sum over the ranks."""
        x, *rest = args or (kwargs.pop("hidden_states"),)
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, mesh, [self.input_layouts], run_check=False)
        return (x.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()]), *rest), kwargs

    def _give(self, mesh: DeviceMesh, module: nn.Module, args: Any, outputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """The sum over the ranks of their heads' part of the output."""
        o = DTensor.from_local(outputs[0], mesh, [Partial()], run_check=False)
        return (o.redistribute(placements=[self.output_layouts]).to_local(), *outputs[1:])


def tensor_parallel_plan(path: str = "") -> dict[str, ParallelStyle]:
    """A plan for ``parallelize_module`` that splits :class:`flashkda_ops.nn.KimiDeltaAttention` by heads.

    Args:
        path: of the layers in the module, such as ``"layers.*.attn"``; by default the module is the layer.
    """
    return {path: KimiDeltaAttentionParallel()}


def _read_locally(module: nn.Module, names: list[str], mesh: DeviceMesh) -> None:
    """Reading these parameters as attributes of the module gives this rank's part, a plain tensor."""

    def local(name: str, self: nn.Module) -> Tensor:
        parameter = self._parameters[name]
        if not isinstance(parameter, DTensor) or parameter.device_mesh != mesh:
            return cast(Tensor, parameter)  # as fully_shard keeps it between uses
        if parameter.placements[0].is_shard():
            return parameter.to_local()
        # Each rank has the gradient of its own heads: the sum over the ranks is taken on the way back.
        return parameter.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])

    cls = type(module)
    views = {name: property(partial(local, name)) for name in names}
    described = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    module.__class__ = type(cls.__name__, (cls,), {**described, **views})
