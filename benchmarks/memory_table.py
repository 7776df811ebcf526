"""Writes docs/memory.md's table: what memory.py says of recipes on some machines, as Markdown.

    python -m benchmarks.memory_table                       every recipe, and `LESS`; half an hour
    python -m benchmarks.memory_table "NAME --shard" …      these recipes, with these flags

Each has --micro-batch auto, and 1000 GB of host memory.
"""

import sys

import memory
import prepare
import recipes
import train
from errors import UserError, exit_on_user_error

MACHINES = ((1, 80), (4, 80), (8, 80), (1, 24))  # GPUs, and GB of each
# What makes recipes fit that would not.
LESS = (
    "libero_10_grpo_openvlaoft --shard --ratio 1:1",
    "libero_10_grpo_openvlaoft --oft-train lora --lora-rank 32",
    "libero_10_ppo_openpi_pi05 --lora-rank 32 --envs 16 --batch-max 8 --env-workers 4 "
    "--compile False",
)


def line_of(name: str, gpus: int, gpu_gb: int) -> str:
    """Describes one recipe, with flags behind its name, on one machine: what was chosen, the
    fullest GPU, the host."""
    room = memory.Room(gpus, gpu_gb * memory.GB, 1000 * memory.GB, 16 * gpus)
    try:
        config = train.parse(["--recipe", *name.split(), "--micro-batch", "auto"])
        demand = prepare.demand_of(config, room)[0]
    except UserError as error:
        return f"| `{name}` | {gpus} × {gpu_gb} | {error} | | | | no |"
    sums = {row.device: row for row in memory.Table(demand, room).sums()}
    gpu = max(row.total for device, row in sums.items() if device != "host") / memory.GB
    host = sums["host"].total / memory.GB
    actor = demand.config.actor
    chosen = f"{actor.micro_batch} | {actor.checkpointing} | {actor.cache_prefix}"
    fits = "yes" if all(row.fits for row in sums.values()) else "no"
    return f"| `{name}` | {gpus} × {gpu_gb} | {chosen} | {gpu:.1f} | {host:.0f} | {fits} |"


def main(names: list[str]) -> None:
    print("| recipe | GPUs | micro-batch | checkpointing | prefix | fullest GPU | host | fits |")
    print("|---|---|---|---|---|---|---|---|")
    for name in names or (*recipes.RECIPES, *LESS):
        for gpus, gpu_gb in MACHINES:
            print(line_of(name, gpus, gpu_gb), flush=True)


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
