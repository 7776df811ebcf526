"""Actor ranks that hold a part of every weight each (--shard): parameters, gradients and what the
optimizer remembers, by PyTorch's FSDP2 (arXiv 2304.11277). For models that do not fit one device.

A block of the model is whole on a device while it computes there, so all ranks take part in every
forward and backward pass, and in publishing and saving, where one weight at a time is whole. What
they agree on (`Ranks.plan`) keeps them together: whoever has no rows makes a pass of no weight.

All this stays within a node. Every node has all weights (hybrid sharding), and its ranks meet those
of other nodes once for every optimizer step: ranks with the same part sum its gradients.

Where networks compute in bf16, a block's weights are gathered in bf16, and gradients are summed in
fp32. Left out: weights that wait on the host.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from metrics import Meter
from models import checkpoint, layers
from ranks import LIMIT, Ranks


class ShardedRanks(Ranks):
    """This actor's place among those of its node, which share the weights, and of other nodes."""

    sharded = True

    def __init__(self, meter: Meter, *place):
        """place: as of `Ranks`."""
        super().__init__(*place)
        self.meter = meter
        self.saves = 0 in self.of_node
        self.publishes = True
        self.node = dist.group.WORLD  # who shares the weights with this rank
        local = len(self.of_node)
        if self.count > local:
            # Its ranks alone make a group.
            how = {"timeout": LIMIT, "use_local_synchronization": True}
            self.node = dist.new_group(list(self.of_node), **how)
            twins = range(self.rank - self.of_node.start, self.count, local)
            # Who has the same part, one on every node.
            self.twins = dist.new_group(list(twins), **how)
        self.mesh = DeviceMesh.from_group(self.node, self.device.partition(":")[0])

    def agree(self, *mine: float) -> list[float]:
        return self.highest(self.node, mine)

    def join_nodes(self, stop: bool) -> bool:
        return bool(self.highest(self.twins, [stop])[0]) if self.twins is not None else stop

    def highest(self, group: dist.ProcessGroup, mine: Iterable[float]) -> list[float]:
        """Returns the highest of each number, of any rank of a group. Waits for all of them, with
        signs of life."""
        words = torch.tensor(mine, dtype=torch.float64)
        with self.meter.wait("gradient"):
            for _ in self.meet(words, group):
                self.meter.alive()
        return words.tolist()

    def spread(self, model: nn.Module, methods: tuple[str, ...]) -> None:
        """Leaves this rank its part of every parameter, on its device, frozen ones too. Block by
        block the model comes there; what is in no block is whole while one of `methods` runs. A
        block must compute by its forward."""
        # What they return is a view at times, and nobody changes it in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module")
        unused = {p for p in model.parameters() if p.is_meta}  # `model.idle`
        units = [("", model), *layers.blocks(model).items()]
        for name, unit in reversed(units):  # what is within another one first
            # Whole again for the backward pass: between passes the optimizer finds its parts.
            how = {"mesh": self.mesh, "reshard_after_forward": True, "ignored_params": unused}
            if name and (kind := model.acts_in(f"{name}.")):
                how["mp_policy"] = MixedPrecisionPolicy(kind, torch.float32, None, False)
            fully_shard(unit, **how)
            # The loss is divided by the global count, so gradients are summed.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
        for method in methods:
            register_fsdp_forward_method(model, method)

    def part(self, tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def whole(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def placed(self, part: Tensor, like: Tensor) -> Tensor:
        if not isinstance(like, DTensor) or part.dim() == 0:
            return part
        size = {"shape": like.shape, "stride": like.stride()}
        return DTensor.from_local(part.to(self.device), self.mesh, [Shard(0)], **size)

    def gathered(self, weights: dict[str, Tensor]) -> "Gathered":
        return Gathered(weights, self)

    def on_first(self, parts: dict, like: dict) -> dict:
        found = {}
        for key, part in parts.items():
            if part.is_meta:  # `model.idle`
                continue
            self.meter.alive()
            tensor = self.whole(self.placed(self.part(part), like[key]))
            if self.first:
                found[key] = tensor.to("cpu")
        return found

    def read_optimizer(self, path: Path, parameters: list[Tensor]) -> dict[int, dict]:
        sizes = [parameter.shape for parameter in parameters]
        found = checkpoint.read_optimizer(path, sizes, self.device, self.cut)
        for number, state in found.items():
            for name, part in state.items():
                state[name] = self.placed(part, parameters[number])
        return found

    def cut(self, tensor: Tensor) -> Tensor:
        """Returns this rank's part of a tensor that every rank has, on its device."""
        return distribute_tensor(tensor, self.mesh, [Shard(0)], src_data_rank=None).to_local()


class Gathered(Mapping[str, Tensor]):
    """Weights, each of which is whole while it is looked at. All ranks look at the same ones."""

    def __init__(self, parts: dict[str, Tensor], ranks: ShardedRanks):
        self.parts = parts
        self.ranks = ranks

    def __getitem__(self, name: str) -> Tensor:
        self.ranks.meter.alive()
        return self.ranks.whole(self.parts[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)
