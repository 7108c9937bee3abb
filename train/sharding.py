"""Weights shared out over processes: FSDP2 around student and teacher, and tensors made whole again.

    train.sharding   weights, gradients, moments, average
    none             whole in every process; gradients are averaged (DDP)
    full             a part in each; the weights of a layer are gathered while it computes

A sharded model is a collective: every process has to call it equally often, or all wait for ever. That
holds of the student by construction (equal micro-batches), of the teacher only where it is asked once a
micro-batch whatever the masks. Without `torchrun` there is nothing to share and `full` does nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mdm.convert import decoder_layers
from mdm.denoiser import Denoiser
from mdm.errors import ConfigError

from . import processes
from .teachers.denoised import SEES_MASKS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .recipe import Recipe, TrainSettings

# Asked in equally many passes, whatever is masked.
EQUAL_PASSES = ("left", "mapped", "embedding", *SEES_MASKS)

# Matrices of layers are gathered in bfloat16, in which autocast computes with them; all else stays as it
# is (also the inputs), so that the result is that of autocast. Gradients are summed in float32.
HALF = MixedPrecisionPolicy(
    param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
)


def check_sharding(recipe: Recipe) -> None:
    """Raise ConfigError if the teacher cannot be sharded, or processes would ask it unequally often."""
    target, teacher = recipe.target, recipe.teacher
    if recipe.train.sharding == "none" or not recipe.distils or target.cache:
        return
    if recipe.on_policy.active:
        raise ConfigError(
            f"train.sharding=full with on_policy.fraction={recipe.on_policy.fraction}: how often the"
            " student is called while it writes depends on its text, but a sharded one must be called by"
            " all processes at once; set train.sharding=none"
        )
    if teacher.quantization or teacher.offload:
        name = "offload" if teacher.offload else "quantization"
        raise ConfigError(
            f"train.sharding=full shares out the teacher's weights, which teacher.{name} would have"
            " elsewhere; leave one of the two out, or set target.cache and load no teacher at all"
        )
    if target.kind not in EQUAL_PASSES or target.infill:
        asked = f"target.infill={target.infill}" if target.infill else f"target.kind={target.kind}"
        raise ConfigError(
            f"train.sharding=full with {asked}: how often the teacher is asked depends on the masks of a"
            " process, but a sharded one must be asked by all processes at once; set"
            " train.sharding=none, or a target of as many passes for all masks (target.kind=left, without"
            " target.infill; then target.cache spares the teacher, too)"
        )


def shared_student(denoiser: Denoiser, settings: TrainSettings) -> nn.Module:
    """The student on this process's device, as it is trained: sharded, or wrapped for DDP, or itself.

    A sharded one is the same module with other parameters: make optimizer and average from it after this.
    """
    device = processes.device()
    if _is_shared(settings):
        mesh = _mesh()
        for layer in decoder_layers(denoiser.model):
            if settings.precision == "fp32":
                fully_shard(layer, mesh=mesh)
                continue
            if norms := _norms(layer):
                fully_shard(norms, mesh=mesh)
            fully_shard(layer, mesh=mesh, mp_policy=HALF)
        # The denoiser is the root, not its model: it calls the head outside the model's forward. Sharded
        # again after each forward, or one with other weights (the average) would leave them behind.
        fully_shard(denoiser, mesh=mesh, reshard_after_forward=True)
        return denoiser
    denoiser.to(device)
    if processes.world_size() == 1:
        return denoiser
    devices = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(denoiser, device_ids=devices)


def shard_teacher(model: PreTrainedModel, settings: TrainSettings) -> None:
    """Share out the layers of a frozen teacher, if asked for; `model.to` then moves the rest.

    Embeddings and head stay whole: the head is called outside the forward of what is sharded, may be
    tied to the embeddings, and a look-up of some rows does not pay for gathering all of them.
    """
    if not _is_shared(settings):
        return
    mesh = _mesh()
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    kept = {parameter for end in ends for parameter in end.parameters()}
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model.base_model, mesh=mesh, ignored_params=kept, reshard_after_forward=True)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with the parts of all processes; a collective if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict with whole tensors in the first process, {} in the others; a collective.

    One tensor is gathered at a time, and kept in CPU memory by the first process alone. Tied tensors are
    one tensor here, too.
    """
    gathered: dict[int, torch.Tensor] = {}
    state = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in gathered:
            found = whole(tensor.detach())
            first = processes.rank() == 0
            gathered[id(tensor)] = found.cpu() if first else found.new_empty(0)
        state[name] = gathered[id(tensor)]
    return state if processes.rank() == 0 else {}


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float) -> float:
    """Scale all gradients to a norm of at most `largest` (0 = no limit); returns the norm before."""
    return float(whole(nn.utils.clip_grad_norm_(parameters, largest or math.inf)))


def _norms(layer: nn.Module) -> list[nn.Module]:
    """The modules of a layer that have vectors of their own and no matrix."""
    own = {module: list(module.parameters(recurse=False)) for module in layer.modules()}
    return [module for module, found in own.items() if found and all(p.ndim < 2 for p in found)]


def _is_shared(settings: TrainSettings) -> bool:
    return settings.sharding == "full" and dist.is_initialized()


def _mesh() -> DeviceMesh:
    return init_device_mesh(processes.device().type, (processes.world_size(),))
