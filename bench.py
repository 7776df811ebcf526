"""Measures comparisons on this machine. What a number is compared with is measured in the same run.

    python bench.py transport --json transport.json    slots against queues that carry the data (and
                                                       Ray, where it is installed)
    python bench.py weights                            a weight sync against a memcpy, and what it
                                                       costs a rollout worker that serves
    python bench.py ladder                             the five presets of RL-VLA³'s Table 1 against
                                                       each other and their bound, and its second
                                                       version's headlines
    python bench.py prefix --model pi05                the actor with and without the frozen
                                                       prefix's cache in the slots
    python bench.py inference --model oft --size full  inference over batch sizes against a matrix
                                                       product, eager and compiled
    python bench.py envs                               simulators against the way their own
                                                       documentation has it
    python bench.py tracing                            what --trace costs a run
    python bench.py machinery                          the pipeline with stages that cost nothing;
                  --against FOLDER                     in turns with another checkout,
                  --peer PYTHON                        or with TorchRL
    python bench.py tuning                             --ratio auto and automatic batches against an
                                                       exhaustive search
    python bench.py gpu                                in at most 8 minutes, all that only a GPU can
                                                       show

It prints a table and, with --json, writes {"what", "machine", "rows"}; gpu does so row by row, and
ends with status 1 where a part of it failed. Units are in the names of
the keys. What they mean is said at the top of the files in benchmarks/.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks import (
    envs,
    gpu,
    inference,
    ladder,
    machinery,
    prefix,
    tracing,
    transport,
    tuning,
    weights,
)
from benchmarks.measuring import cell, end_on_sigterm
from checks import AboveZero, Natural, Positive, check_ranges, check_writable
from config import Family, expanded, parse_ratio
from errors import exit_on_user_error, require
from processes import keep_freed_memory


@dataclass(kw_only=True)
class BenchConfig:
    """Measured comparisons: transport, weights, presets, prefix cache, inference, simulators,
    tracing, machinery, tuning, a GPU."""

    what: tyro.conf.Positional[
        Literal[
            "transport",
            "weights",
            "ladder",
            "prefix",
            "inference",
            "envs",
            "tracing",
            "machinery",
            "tuning",
            "gpu",
        ]
    ]
    """what to measure"""
    json: Path | None = None
    """also write the result to this file"""
    repeats: Positive = 5
    """transport, machinery: repetitions behind each median; weights: tens of versions; tracing:
    runs with and without"""
    seconds: AboveZero = 1.0
    """transport, machinery: length of one repetition; prefix, inference, envs: time spent on each
    median"""
    setting: Literal[
        "all",
        "columns",
        "emulated",
        "gr00t",
        "vectorised",
        "headlines",
        "metaworld_colocated",
        "maniskill_hybrid",
        "embedded",
        "libero",
    ] = "all"
    """ladder: of the paper's columns emulated (LIBERO + π0.5), gr00t and vectorised (ManiSkill +
    π0), which sleep; of its second version's headlines metaworld_colocated and maniskill_hybrid,
    which sleep, too; embedded (the default model and simulator) and libero, all real; columns is
    the first three. tracing: all is emulated and embedded"""
    env: Literal["all", "libero", "metaworld", "vectorised"] = "all"
    """envs: which simulator, libero or metaworld; ladder: vectorised is the same as that
    --setting"""
    iterations: Natural = 0
    """ladder, tracing, tuning: iterations measured after the warm-up; 0: 5 emulated, 6 gr00t, 2
    vectorised, 5 headlines, 4 real, 10 tuning"""
    ratio: str = ""
    """ladder, tracing: R:A; empty means 1:1, 2:1 and 3:1 of the paper's columns (tracing: 1:1) and
    3:1 of the real settings; headlines have one of their own"""
    model: Family = "pi05"
    """prefix, inference: the model family, with random weights; oft has no prefix"""
    size: Literal["auto", "small", "full"] = "auto"
    """prefix, inference: the embedded default or the published model; full needs a GPU, auto is
    full where there is one"""
    peer: str = ""
    """machinery: a Python that has TorchRL, to be measured in turns with ours"""
    against: Path | None = None
    """machinery: the folder of another checkout of this project, to be measured in turns with this
    one"""


def check(config: BenchConfig) -> None:
    """Raises UserError where settings cannot be."""
    check_ranges(config)
    if config.json:
        check_writable(config.json, "the result", "--json FILE")
    require(
        config.what != "envs" or config.env != "vectorised",
        "--env vectorised only takes time, so there is nothing to compare: give libero or "
        "metaworld",
    )
    require(
        not config.peer or config.against is None,
        "--peer and --against are two comparisons: give one of them",
    )
    if config.ratio:
        parse_ratio(config.ratio)


def measure(config: BenchConfig) -> list[dict]:
    """Measures what is asked for. Returns rows, which have the same keys."""
    match config.what:
        case "transport":
            return transport.measure(config.repeats, config.seconds)
        case "weights":
            return weights.measure(config.repeats)
        case "ladder":
            setting = "vectorised" if config.env == "vectorised" else config.setting
            return ladder.measure(setting, config.ratio, config.iterations, config.json)
        case "prefix":
            return prefix.measure(config.model, config.size, config.seconds)
        case "inference":
            return inference.measure(config.model, config.size, config.seconds)
        case "envs":
            names = ("libero", "metaworld") if config.env == "all" else (config.env,)
            return envs.measure(names, config.seconds)
        case "tracing":
            return tracing.measure(config.setting, config.ratio, config.iterations, config.repeats)
        case "tuning":
            return tuning.measure(config.iterations)
        case "machinery" if config.peer:
            return machinery.compare(config.peer, config.repeats, config.seconds)
        case "machinery" if config.against:
            return machinery.measure_against(config.against, config.repeats, config.seconds)
        case "machinery":
            return machinery.measure(config.repeats, config.seconds)


def machine(asks_gpus: bool = True) -> str:
    """Describes what was measured on, without naming anybody's machine. asks_gpus: for their names,
    which opens them."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else os.uname().machine
    cores = len(os.sched_getaffinity(0))
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = f"{count} GPUs" if count else "no GPU"
    if asks_gpus and count:
        gpus = ", ".join(map(torch.cuda.get_device_name, range(count)))
    return f"{cores} cores, {processor}, torch {torch.__version__}, {gpus}"


def show(result: dict) -> None:
    """Prints the rows as a table."""
    table = Table(title=f"{result['what']}: {result['machine']}", show_lines=False)
    for key, value in result["rows"][0].items():
        justify = "left" if isinstance(value, str) else "right"
        table.add_column(key.replace("_", " "), justify=justify)
    for row in result["rows"]:
        table.add_row(*map(cell, row.values()))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def main(config: BenchConfig) -> None:
    check(config)
    torch.set_num_threads(1)
    keep_freed_memory()  # as workers do
    end_on_sigterm()
    if config.what == "gpu":
        sys.exit(gpu.main(machine(False), not torch.cuda.is_available(), config.json))
    rows = measure(config)
    result = {"what": config.what, "machine": machine(), "rows": rows}
    if config.what == "ladder":
        print(f"\n{result['machine']}\n\n{ladder.report(rows)}")
    else:
        show(result)
    if config.json:
        config.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    with exit_on_user_error():
        main(expanded(tyro.cli(BenchConfig)))
