"""Predicts what it would give if actors that wait for trajectories inferred meanwhile. No run does:
docs/performance.md says why.

    python -m benchmarks.helping [--json FILE]      minutes; all in virtual time (`plan.py`)

verl lends trainers' GPUs to generation while they wait, and reports 15.3 % less time than the best
fixed split of 32 GPUs that it tried (its docs/advance/dynamic_schedule.md), and 10.3 % less than
another one of 24 (docs/advance/v1_async_trainer.md). Here a rollout worker would share out a batch
of requests among itself and the actor ranks of its node that wait:

- a rank does when it has no complete micro-batch and is at no optimizer step: training comes first;
- it acts by the newest published weights, between two optimizer steps, too: it has a copy of them;
- and it infers all of its part: trajectories that complete meanwhile are trained later.

A worker whose GPU infers notices nothing, so a batch is shared when the rollout worker begins it.
The way there costs nothing here, and inference as much as on a rollout worker, which makes a row
more than a run could reach.

Rivals are what users have without it, each at the best B_max of SHARES, as are the rows with help:
the same ratio; other ratios; and `--placement colocated` with as many actor workers as GPUs, or
half of them, where every GPU infers and trains in turns, as long as an inference of one sample.
Nodes are closed units (only gradients leave them), so 8 GPUs are the largest.

    RL-VLA³'s times       as in `benchmarks/scaling.py`; simulators in proportion to R
    a core for each env   the same, but as many simulator processes as envs at every ratio
    on H100s, estimated   per chunk step, docs/performance.md ("What a GPU is asked for"); 86 ms of
                          LIBERO's `fast` simulator on a core of its own
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import tyro

from benchmarks.scaling import GR00T, MANISKILL, PI05
from config import parse_ratio
from errors import exit_on_user_error
from planning import Costs, Node, Prediction, events
from planning.costs import calibrate
from planning.events import SOON, ActorRank, Request, RolloutWorker
from planning.settings import PlanConfig, planned

SHARES = (1 / 4, 1 / 2, 1.0)  # B_max tried, of the lanes that ask a rollout worker
SAME = ("1:1", "3:1", "1:3")  # ratios that a column compares with and without help


class Sharing(RolloutWorker):
    """Shares out every batch that it begins among itself and all actors that wait."""

    def proceed(self) -> None:
        remaining = self.batcher.remaining()
        if self.busy or self.stalled or remaining is None or remaining > SOON:
            super().proceed()
            return
        batch, _ = self.batcher.take()
        helpers = [actor for actor in self.state.actors if actor.can_help()]
        mine, *others = shared_out(batch, 1 + len(helpers))
        for helper, part in zip(helpers, others, strict=False):
            helper.help(part, self)
        self.serve(mine)


def shared_out(batch: list[Request], workers: int) -> list[list[Request]]:
    """Cuts a batch into as many parts as there are workers, or requests if these are fewer."""
    count = min(workers, len(batch))
    return [batch[i::count] for i in range(count)]


class HelpingRank(ActorRank):
    """An actor rank that infers for its node while it has nothing to train."""

    def can_help(self) -> bool:
        return not (self.busy or self.waking or self in self.state.barrier.present)

    def help(self, batch: list[Request], rollout: RolloutWorker) -> None:
        """Infers a batch; all costs are those of the rollout worker."""
        self.begin()
        rollout.batches += 1
        rollout.samples += len(batch) * self.node.lane_envs
        seconds = self.costs.infer_fixed_s
        seconds += len(batch) * self.node.lane_envs * self.costs.infer_each_s
        self.work(seconds, self.helped, batch)

    def helped(self, batch: list[Request]) -> None:
        """Answers, still busy: whom an answer wakes may ask for more, or finish a trajectory."""
        for request in batch:
            request[0].worker.replies.append(request)
        for lane, _, _ in batch:
            lane.worker.wake()
        self.proceed()


def best(node: Node, costs: Costs, kind: str = "alone") -> Prediction:
    """Predicts it at its best B_max. kind: "helped", or one without help."""
    found = []
    with ExitStack() as stack:
        if kind == "helped":
            stack.enter_context(patch.object(events, "RolloutWorker", Sharing))
            stack.enter_context(patch.object(events, "ActorRank", HelpingRank))
        for size in {max(1, round(share * node.served)) for share in SHARES}:
            sized = replace(node, batch_max=size)
            found.append(events.simulate(sized, costs, iterations=5, warmup=3))
    return max(found, key=lambda each: each.env_steps_per_s)


# ---------------------------------------------------------------- settings


# Two rollout epochs instead of eight, so that every chunk step is simulated (`coarse` is 1).
USUAL = {"preset": "full", "envs": 64, "rollout_epochs": 2, "episode_steps": 480, "chunk": 10}
LIBERO = {"step_s": 0.086, "step_tail": 0.27, "optimizer_s": 0.02, "fetch_s": 0.01}


def shorter(flags: dict) -> dict:
    """Returns a column's phases for the rollout epochs of USUAL."""
    return flags | {name: flags[name] / 4 for name in ("rollout_s", "actor_s")}


def on_h100s(infer_s: float, train_s: float) -> Costs:
    """Costs of a chunk step, in seconds; infer_s: its part of 16, of which a fifth is fixed."""
    each = {"infer_fixed_s": 16 * 0.2 * infer_s, "infer_each_s": 0.8 * infer_s}
    return Costs(**each, train_each_s=train_s, **LIBERO)


@dataclass(frozen=True)
class Case:
    """A setting, per node of 8 GPUs."""

    flags: dict  # of PlanConfig
    costs: Costs | None = None  # where no phases were measured
    cores: bool = False  # every env has a core of its own, at every ratio

    def plan(self, gpus: int, ratio: str, placement: str = "") -> PlanConfig:
        """Returns the settings on so many GPUs, with envs in proportion: to those that simulate
        where these are GPUs. They are as many as actor ranks can share."""
        flags = USUAL | self.flags
        r, a = parse_ratio(ratio)
        colocated = placement == "colocated"
        part = gpus // (r + a)
        lane = flags.get("lane_envs", 1)
        share = 1.0 if colocated or lane == 1 else 2 * r / (r + a)
        unit = lane * (1 if colocated else part * a)
        envs = max(1, round(flags["envs"] * gpus / 8 * share / unit)) * unit
        segment = flags["episode_steps"] // flags["chunk"]
        sizes = {"envs": envs, "rounds": segment * flags["rollout_epochs"]}
        sizes["env_workers"] = envs if self.cores else 0
        return PlanConfig(**flags | sizes, gpus=gpus, ratio=ratio, placement=placement)

    def costs_on(self, gpus: int) -> Costs:
        """Returns what work costs, at every ratio, as measured at 1:1."""
        return self.costs or replace(calibrate(self.plan(gpus, "1:1")), gradient_s=0.0)


CASES = {
    "LIBERO + π0.5, RL-VLA³'s times": Case(shorter(PI05)),
    "LIBERO + GR00T, RL-VLA³'s times": Case(shorter(GR00T)),
    "ManiSkill + π0, RL-VLA³'s times": Case(MANISKILL),
    "LIBERO + π0.5, a core for each env": Case(shorter(PI05), cores=True),
    "LIBERO + GR00T, a core for each env": Case(shorter(GR00T), cores=True),
    "π0.5 on H100s, estimated": Case({}, on_h100s(0.0087, 0.0086), cores=True),
    "π0.5 on H100s, prefixes in slots": Case({}, on_h100s(0.0087, 0.00021), cores=True),
    "π0.5 on H100s, twice as many envs": Case({"envs": 128}, on_h100s(0.0087, 0.0086), cores=True),
    "π0.5 on H100s, half the training": Case({}, on_h100s(0.0087, 0.0043), cores=True),
    "GR00T on H100s, estimated": Case({}, on_h100s(0.0045, 0.0058), cores=True),
    "OFT (LoRA) on H100s, estimated": Case({}, on_h100s(0.0173, 0.0395), cores=True),
    "OFT on H100s, twice as many envs": Case({"envs": 128}, on_h100s(0.0173, 0.0395), cores=True),
}
RATIOS = {2: ("1:1",), 4: ("3:1", "1:1", "1:3"), 8: ("7:1", "3:1", "1:1")}  # by GPUs


def ratios_of(name: str, gpus: int) -> tuple[str, ...]:
    """Lists the ratios that are tried: with more actors, too, where training costs more than
    inference does; of two and four GPUs RATIOS has all of those."""
    costs = CASES[name].costs
    trains = (
        gpus == 8 and costs and costs.train_each_s > costs.infer_fixed_s / 16 + costs.infer_each_s
    )
    return RATIOS[gpus] + (("3:5", "1:3") if trains else ())


def rows_of(name: str, gpus: int) -> Iterator[dict]:
    """Predicts a case at every ratio, without and with help; and colocated."""
    case = CASES[name]
    costs = case.costs_on(gpus)
    for ratio in ratios_of(name, gpus):
        node, _, _ = planned(case.plan(gpus, ratio))
        for kind in ("alone", "helped"):
            yield row_of(name, gpus, ratio, kind, best(node, costs, kind))
    node, _, _ = planned(case.plan(gpus, "1:1", "colocated"))
    one = costs.infer_fixed_s + node.lane_envs * costs.infer_each_s
    for actors in (len(node.actor_devices), len(node.actor_devices) // 2):
        fewer = replace(node, actor_devices=node.actor_devices[:actors])
        found = best(fewer, replace(costs, slice_s=one))
        yield row_of(name, gpus, f"{actors} actors", "colocated", found)


def row_of(name: str, gpus: int, ratio: str, kind: str, found: Prediction) -> dict:
    row = {"case": name, "gpus": gpus, "ratio": ratio, "kind": kind}
    bubbles = ("bubble_env", "bubble_rollout", "bubble_actor")
    return row | {what: getattr(found, what) for what in ("env_steps_per_s", *bubbles)}


# ---------------------------------------------------------------- what to tell


def speed(row: dict) -> float:
    return row["env_steps_per_s"]


def line(name: str, gpus: int, rows: list[dict]) -> str:
    """Writes a row of the table in docs/performance.md."""
    fastest = {}
    for kind in ("alone", "colocated", "helped"):
        fastest[kind] = max((row for row in rows if row["kind"] == kind), key=speed)
    cells = [name, str(gpus), *(f"{speed(row):.0f} ({row['ratio']})" for row in fastest.values())]
    alone = {row["ratio"]: speed(row) for row in rows if row["kind"] == "alone"}
    helped = {row["ratio"]: speed(row) for row in rows if row["kind"] == "helped"}
    same = [helped[ratio] / alone[ratio] for ratio in SAME if ratio in alone]
    ratio = speed(fastest["helped"]) / speed(fastest["alone"])
    rival = speed(fastest["helped"]) / max(speed(fastest["alone"]), speed(fastest["colocated"]))
    for gains in (same, [ratio], [rival]):
        cells.append(" · ".join(f"{gain - 1:+.1%}" for gain in gains))
    return f"| {' | '.join(cells)} |"


def as_json(rows: list[dict], what: str = "helping") -> str:
    """Writes all rows, a line each. what: measured them."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    return f'{{"what": "{what}", "rows": [\n{lines}\n]}}\n'


@dataclass(kw_only=True)
class HelpingConfig:
    """Predicts what actors that help out would give."""

    json: Path | None = None  # also write {"what", "rows"}
    only: str = ""  # predict cases that have this in their name
    gpus: tuple[Literal[2, 4, 8], ...] = tuple(RATIOS)


def main(config: HelpingConfig) -> None:
    heads = (
        "setting",
        "GPUs",
        "best ratio",
        "colocated",
        "helped",
        f"to the same, {' · '.join(SAME)}",
    )
    heads += ("to the best ratio", "to the best of both")
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    found = []
    for gpus in config.gpus:
        for name in (name for name in CASES if config.only in name):
            rows = list(rows_of(name, gpus))
            print(line(name, gpus, rows), flush=True)
            found += rows
            if config.json:
                config.json.write_text(as_json(found))


if __name__ == "__main__":
    with exit_on_user_error():
        main(tyro.cli(HelpingConfig))
