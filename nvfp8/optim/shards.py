"""DTensors: the part of one that lies in this process, and state that is placed as its parameter is.

Each shard is updated as a tensor of its own. Its state is DTensors over the same mesh, as that of torch's optimizers is, so that
torch.distributed.checkpoint saves every shard and loads it over another number of ranks.

FP8 scales are of 128 elements of a shard. Where rows stay whole and 128 divides them, blocks lie in the whole tensor as they do in
its shards, and scales are a DTensor of one row a row, cut as the parameter is. Anything else, above all a sharded vector, has its
blocks' borders where its shards have theirs: its scales are a DTensor of one row a shard, which the same number of ranks loads, and
another one is refused by its shape. Who wants to change the number of ranks gives such parameters a group with fp32 state.
"""

from typing import Any

import torch
from torch import Tensor

from nvfp8.rounding import BLOCK


def placed(tensor: Any) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies in this process: of a DTensor its shard, of any other itself."""
    whole: Any = tensor.detach()
    return whole.to_local() if placed(whole) else whole


def local_gradient(parameter: Any, gradient: Any) -> Tensor:
    """The gradient of what `local(parameter)` is. A DTensor's may come summed over nobody yet, or cut otherwise."""
    if placed(parameter) and gradient.placements != parameter.placements:
        gradient = gradient.redistribute(parameter.device_mesh, parameter.placements)
    return local(gradient)


def which(parameter: Any) -> str:
    """Which shard `local` is; the same on all processes that hold the same one, and of a whole tensor nothing."""
    if not placed(parameter):
        return ""
    coordinate = parameter.device_mesh.get_coordinate() or ()
    return "".join(f"@{c}" for c, place in zip(coordinate, parameter.placements, strict=True) if not place.is_replicate())


def beside(parameter: Any, part: Tensor) -> Tensor:
    """State `part`, an element for each of `local(parameter)`'s, placed as the parameter is."""
    if not placed(parameter):
        return part
    return _from_local(part, parameter.device_mesh, parameter.placements, parameter.shape, parameter.stride())


def scales_beside(parameter: Any, scale: Tensor) -> Tensor:
    """The scales of such state, (blocks,) as a codec allocates them; their values are not kept."""
    if not placed(parameter):
        return scale
    mesh, shape, cut = parameter.device_mesh, parameter.shape, [not place.is_replicate() for place in parameter.placements]
    row = parameter.numel() // max(1, shape[0])
    if row and row % BLOCK == 0 and all(place.dim == 0 for place, is_cut in zip(parameter.placements, cut, strict=True) if is_cut):
        size = torch.Size((shape[0], row // BLOCK))
        return _from_local(scale.view(-1, size[1]), mesh, parameter.placements, size, (size[1], 1))
    from torch.distributed.tensor import Replicate, Shard

    largest = list(shape)  # shard
    for n, place, is_cut in zip(mesh.shape, parameter.placements, cut, strict=True):
        if is_cut:
            largest[place.dim] = -(-largest[place.dim] // n)
    blocks = -(-torch.Size(largest).numel() // BLOCK)
    size = torch.Size((*(n for n, is_cut in zip(mesh.shape, cut, strict=True) if is_cut), blocks))
    axes = iter(range(len(size)))
    placements = [Shard(next(axes)) if is_cut else Replicate() for is_cut in cut]
    part = scale.new_zeros((*[1] * (len(size) - 1), blocks))
    return _from_local(part, mesh, placements, size, torch.empty(size, device="meta").stride())


def local_scales(scale: Tensor, part: Tensor) -> Tensor:
    """Of `scales_beside` those of the local `part`, (blocks,); scales of a whole tensor in any shape."""
    own = local(scale).flatten()
    return own[: -(-part.numel() // BLOCK)] if placed(scale) else own


def _from_local(part: Tensor, mesh: Any, placements: Any, shape: torch.Size, stride: tuple[int, ...]) -> Tensor:
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)
