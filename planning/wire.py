"""What it costs to sum gradients: bytes on the wire, seconds, and what training hides of them.

Nodes are closed. Between them gradients alone travel, summed at each optimizer step over the actor
ranks of all nodes. Weights are published within a node and cost the wire nothing.

Sources: Gloo sums in a ring (gloo/allreduce.cc). NCCL takes a ring or a tree, whichever it expects
to be faster (src/graph/tuning.cc: 2 (n − 1) steps of a ring, of which 2 (nodes − 1) cross the
network; 2 log₂ nodes of them in a tree, at 0.9 of the speed).

Left out: traffic of others, switches that cannot carry all nodes at once, sums made in a switch,
and what NCCL's kernels take from the backward pass beside them.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """Between nodes, and between the ranks of one."""

    gb_s: float  # GB/s of a node to the others, each way
    hop_s: float = 0.0  # seconds that a message takes there, whatever its size
    inside_gb_s: float = math.inf  # GB/s of a rank to another one of its node
    inside_hop_s: float = 0.0
    trees: bool = False  # NCCL may take a tree


def wire_gb(gb: float, ranks: int) -> float:
    """Returns what each rank sends in a ring of so many. One rank of each node sends it to another
    node, so it is also what a node sends."""
    return 2 * (ranks - 1) / ranks * gb


def all_reduce_s(gb: float, nodes: int, ranks: int, network: Network) -> float:
    """Returns the seconds of summing so many gigabytes over nodes of `ranks` ranks each."""
    # A ring goes as fast as its slowest link.
    everybody = nodes * ranks
    links = [network.gb_s] * (nodes > 1) + [network.inside_gb_s] * (ranks > 1)
    slowest = min(links, default=math.inf)
    steps = 2 * (everybody - nodes) * network.inside_hop_s
    ring = wire_gb(gb, everybody) / slowest + steps + 2 * (nodes - 1) * network.hop_s
    if not network.trees or nodes == 1:
        return ring

    # In a tree every node sends all of it up and all of it down.
    levels = math.ceil(math.log2(nodes))
    steps = 2 * (ranks - 1) * network.inside_hop_s + 2 * levels * network.hop_s
    return min(ring, 2 * gb / (0.9 * slowest) + steps)


def exposed_s(bucket_s: float, buckets: int, beside_s: float) -> float:
    """Returns the seconds for which reductions go on when the last backward pass is over.

    They go one after another, and the pass makes buckets ready at even times: the first after
    1/buckets of it, so all but that much of it hides reductions, and the last one is never hidden.

    bucket_s: of one bucket's reduction; beside_s: of the pass."""
    return max(bucket_s, buckets * bucket_s - (1 - 1 / buckets) * beside_s)
