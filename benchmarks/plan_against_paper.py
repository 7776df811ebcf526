"""What `plan.py` predicts beside what was measured: RL-VLA³'s tables, and the emulated ladder.

    python plan.py --validate [--ladder FILE] [--json FILE]

From the paper only synchronous rows calibrate, and asynchronous ones are predicted:

- the step time of a synchronous iteration, from that row's own rollout and actor seconds;
- actor: 442 s for 4 passes over 24,576 chunk steps on 4 GPUs (π0, 1:1, 16 and 32 GPUs; 2 passes on
  8 took 222 s), so 111 s a pass. The main table gives no phases: π0.5, GR00T and ManiSkill's π0 are
  taken to train as fast per chunk step;
- rollout: the rest of that column's own synchronous disaggregated row;
- the simulators' tail: such that twice the GPUs shorten the lockstep rollout as that column's
  colocated row does, on one node. It depends on inference's share of the rollout, which no
  synchronous row tells: SHARES spans the range that is printed, its middle is the prediction.
  Vectorised simulators have no tail, and FIXED spans their range.

The second version gives gains and no seconds. What they can be is predicted over the range of what
it does not say (`SECOND`); in the emulated headlines the gain itself has fixed that.

From the ladder the seconds that its own sync-disaggregated row measured for rollout and actor
calibrate; all else is nominal.
"""

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from benchmarks.emulated import libero
from benchmarks.emulated.devices import SLICE
from benchmarks.emulated.policy import shares
from config import from_preset, parse_ratio
from errors import UserError, require
from planning import STAGES, Costs, Node, Prediction, scaled
from planning.costs import calibrate
from planning.events import simulate
from planning.settings import PlanConfig, divisor, node_of, planned
from scheduler import place

SHARES = (0.0, 0.2, 0.4)  # inference's part of the lockstep rollout
FIXED = (0.0, 0.5, 1.0)  # part of a vectorised step that does not depend on the number of envs
PASS_S = 442.2 / 4 / 24576  # seconds of the actor per chunk step and pass, on 4 GPUs (1:1)
GPUS = (8, 16, 32)
EMULATED = {  # settings of the ladder, and where their times are
    "emulated": "benchmarks.emulated.libero",
    "gr00t": "benchmarks.emulated.gr00t",
    "vectorised": "benchmarks.emulated.maniskill",
    "metaworld_colocated": "benchmarks.emulated.metaworld",
    "maniskill_hybrid": "benchmarks.emulated.maniskill_hybrid",
}

# RL-VLA³, main comparison: env steps/s at 8, 16 and 32 GPUs, in the order of TABLE_1.
TABLE_1 = ("sync-colocated", "sync-disaggregated", "train-async", "rollout-async", "full")
MAIN = {
    "LIBERO π0.5": (
        (289.23, 547.55, 703.85),
        (162.75, 307.84, 457.23),
        (229.68, 441.49, 737.46),
        (369.56, 686.80, 1041.36),
        (383.40, 713.38, 1120.91),
    ),
    "LIBERO GR00T": (
        (371.80, 680.46, 1125.62),
        (220.81, 409.60, 729.98),
        (243.57, 477.20, 951.33),
        (434.20, 816.48, 1620.39),
        (439.64, 816.48, 1592.40),
    ),
    "ManiSkill π0": (
        (132.56, 232.23, 370.26),
        (60.64, 150.59, 257.21),
        (126.65, 244.61, 436.32),
        (69.07, 139.32, 275.36),
        (71.61, 141.49, 280.07),
    ),
}


HYBRID = ", hybrid"  # after a preset's name: on the GPUs of RL-VLA³'s second version


class Gain(NamedTuple):
    """A headline of the second version: a setting of the ladder, and what it is compared with.

    scales: what multiplies the emulated times, so that they cover what the paper does not say."""

    synchronous: str
    asynchronous: str
    ratio: str
    paper: float  # env steps/s over those of the synchronous row
    scales: dict[str, dict[str, float]]


# Simulation, in Meta-World's synchronous round: 0.53 as calibrated. Training, in ManiSkill's: 0.05
# as calibrated; at the first version's pace inference takes 0.62 of simulation, and training 0.48.
SECOND = {
    "metaworld_colocated": Gain(
        "sync-colocated",
        "full-colocated",
        "1:1",
        1.852,
        {
            "simulators as calibrated": {},
            "simulators a quarter as long": {"env": 0.25},
            "simulators half as long": {"env": 0.5},
            "simulators as long as the GPU": {"env": 1.32},
            "simulators twice as long": {"env": 2.0},
            "simulators four times as long": {"env": 4.0},
            "training a quarter as long": {"actor": 0.25},
            "training half as long": {"actor": 0.5},
            "training twice as long": {"actor": 2.0},
        },
    ),
    "maniskill_hybrid": Gain(
        "sync-disaggregated" + HYBRID,
        "full" + HYBRID,
        "6:2",
        1.786,
        {
            "training as calibrated, 5 % of a step": {},
            "training 11 %": {"actor": 2.5},
            "training 20 %": {"actor": 5.1},
            "training 33 %": {"actor": 10.1},
            "inference half as long as simulation": {"rollout": 0.5},
            "inference twice as long": {"rollout": 2.0},
            "the first version's pace": {"rollout": 0.62, "actor": 4.86},
        },
    ),
}


class Setup(NamedTuple):
    """What a node of 8 GPUs does in one iteration."""

    envs: int
    rollout_epochs: int
    episode_steps: int
    chunk: int
    update_epochs: int
    vectorised: bool

    def env_steps(self, gpus: int) -> float:
        return gpus / 8 * self.envs * self.rollout_epochs * self.episode_steps

    def actor_s(self) -> float:
        """Seconds of training, at 1:1."""
        return PASS_S * self.update_epochs * self.env_steps(8) / self.chunk


SETUPS = {
    "LIBERO π0.5": Setup(64, 8, 480, 10, 1, False),
    "LIBERO GR00T": Setup(64, 8, 480, 10, 1, False),
    "ManiSkill π0": Setup(256, 4, 80, 5, 4, True),
}

# RL-VLA³, stage times: GPUs, seconds of a step, its rollout, its actor. Hybrid rows overlap in ways
# that they do not say.
STAGE_TIMES = {
    ("π0", "colocated"): (
        (8, 807.4, 577.4, 228.6),
        (16, 831.19, 591.0, 240.25),
        (32, 905.6, 672.4, 227.8),
    ),
    ("π0", "1:1, 2 passes"): ((8, 1249.8, 1207.8, 222.0),),
    ("π0", "1:1"): (
        (8, 1911.8, 1050.0, 861.0),
        (16, 1504.0, 1058.0, 442.8),
        (32, 1574.0, 1126.0, 441.6),
    ),
    ("π0", "1:1 T+R"): ((8, 2810.0, 1950.0, 860.0),),
    ("π0", "3:1"): (
        (8, 2542.0, 1114.0, 1428.0),
        (16, 2382.0, 1092.0, 1286.0),
        (32, 2528.0, 1214.0, 1308.0),
    ),
    ("π0", "3:1 T+R"): ((8, 3418.0, 2024.0, 1394.0),),
    ("π0", "2:1"): ((6, 1884.4, 1025.4, 859.0), (24, 2140.0, 1240.0, 892.0)),
    ("π0", "2:1 T+R"): ((6, 4216.0, 2930.0, 1286.0),),
    ("OFT", "colocated"): (
        (8, 1006.0, 674.6, 312.6),
        (16, 1125.0, 767.83, 352.17),
        (32, 1336.0, 965.0, 353.6),
    ),
    ("OFT", "1:1"): (
        (8, 1816.0, 1210.0, 589.8),
        (16, 2114.0, 1288.0, 807.8),
        (32, 2246.67, 1500.0, 707.33),
    ),
    ("OFT", "3:1"): (
        (8, 3326.0, 1450.0, 1876.0),
        (16, 3208.0, 1354.0, 1838.0),
        (32, 3696.67, 1706.67, 1940.0),
    ),
    ("OFT", "2:1"): ((6, 2362.0, 1236.0, 1106.0), (24, 2728.0, 1440.0, 1288.0)),
    ("OFT", "2:1 T+R"): ((6, 5240.0, 3570.0, 1670.0),),
}


class Part(NamedTuple):
    """A row of the stage times that the row of 1:1 predicts."""

    model: str
    placement: str
    gpus: int
    envs: int  # of a node; the 1:1 row has 128. Its env steps, throughput × step, say so


PARTS = (
    Part("π0", "colocated", 16, 128),
    Part("π0", "colocated", 32, 128),
    Part("π0", "1:1 T+R", 8, 128),
    Part("π0", "3:1", 16, 192),
    Part("π0", "3:1", 32, 192),
    Part("OFT", "colocated", 8, 128),
    Part("OFT", "colocated", 16, 128),
    Part("OFT", "colocated", 32, 128),
    Part("OFT", "3:1", 8, 192),
    Part("OFT", "3:1", 16, 192),
    Part("OFT", "3:1", 32, 192),
)


def compare(label: str, found: float, measured: float, more: str = "") -> float:
    """Prints one comparison. Returns the relative error."""
    error = found / measured - 1
    print(f"  {label:44s} {measured:8.1f}  {found:8.1f}  {error:+6.1%}  {more}", flush=True)
    return error


# ---------------------------------------------------------------- the paper


def stage_times() -> list[dict]:
    """Compares synchronous rows: a step is its rollout and its actor, one after the other."""
    print(
        "RL-VLA³, stage times: seconds of a synchronous step, from its own rollout and actor    "
        "paper  predicted"
    )
    rows = []
    for (model, placement), found in STAGE_TIMES.items():
        for gpus, step, rollout, actor in found:
            row = {"table": "stage times", "row": f"{model} {placement}", "gpus": gpus}
            seconds = synchronous_step(placement, gpus, rollout, actor)
            error = compare(f"{model} {placement}, {gpus} GPUs", seconds, step)
            rows.append(row | {"paper": step, "predicted": seconds, "error": error})
    return rows


def synchronous_step(placement: str, gpus: int, rollout: float, actor: float) -> float:
    """Returns the predicted seconds of a step whose phases take so many seconds."""
    colocated = placement == "colocated"
    per_node = 6 if gpus in (6, 24) else 8
    plan = PlanConfig(
        gpus=gpus,
        gpus_per_node=per_node,
        ratio="1:1" if colocated else placement[:3],
        rounds=8,
        rollout_s=rollout,
        actor_s=actor,
        envs=96 if per_node == 6 else 64,
        rollout_epochs=4,
        preset="sync-colocated" if colocated else "sync-disaggregated",
    )
    node, nodes, _ = planned(plan)
    return simulate(node, calibrate(plan), nodes, iterations=8, warmup=2).step_s


def row_of(model: str, placement: str, gpus: int) -> tuple[float, float, float]:
    """Returns the paper's seconds of a step, its rollout and its actor."""
    return next(row for row in STAGE_TIMES[model, placement] if row[0] == gpus)[1:]


def other_parts() -> list[dict]:
    """Compares what more or fewer GPUs for a phase make of both, from the row of 1:1 alone."""
    print(
        "\nRL-VLA³, stage times: seconds of a synchronous step on other parts, from the row of 1:1 "
        "alone    paper  predicted"
    )
    rows = []
    for part in PARTS:
        step, rollout, actor = row_of(part.model, part.placement, part.gpus)
        found = on_other_parts(part)
        waits = found.bubble_actor * found.step_s
        trains = (1 - found.bubble_actor) * found.step_s
        more = f"rollout {waits:.0f} (paper {rollout:.0f}), actor {trains:.0f} (paper {actor:.0f})"
        name = f"{part.model} {part.placement}"
        error = compare(f"{name}, {part.gpus} GPUs", found.step_s, step, more)
        row = {"table": "other parts", "row": name, "gpus": part.gpus}
        row |= {"paper": step, "predicted": found.step_s, "error": error}
        rows.append(row | {"rollout": [rollout, waits], "actor": [actor, trains]})
    return rows


def on_other_parts(part: Part) -> Prediction:
    """Predicts a row from the phases of its 1:1 row."""
    _, rollout, actor = row_of(part.model, "1:1", part.gpus)
    plan = PlanConfig(
        gpus=part.gpus,
        rounds=8,
        rollout_s=rollout,
        actor_s=actor,
        envs=128,
        rollout_epochs=4,
        preset="sync-disaggregated",
        ratio="1:1",
    )
    special = {"colocated": ("1:1", "colocated"), "1:1 T+R": ("2:2", "hybrid")}
    ratio, where = special.get(part.placement, (part.placement, "disaggregated"))
    node, nodes, _ = planned(replace(plan, ratio=ratio, placement=where, envs=part.envs))
    return simulate(node, calibrate(plan), nodes, iterations=8, warmup=2)


def tail_for(column: str, share: float) -> float:
    """Returns the σ with which the lockstep rollout shortens as the column's synchronous rows do,
    disaggregated to colocated, on one node."""
    setup = SETUPS[column]
    plan = replace(column_plan(column, 8, "sync-disaggregated"), infer_share=share)
    colocated, disaggregated = (setup.env_steps(8) / row[0] for row in MAIN[column][:2])
    shorter = (colocated - setup.actor_s() / 2) / (disaggregated - setup.actor_s())
    twice, _, _ = planned(replace(plan, preset="sync-colocated"))
    low = 0.0
    high = 1.5
    for _ in range(6):
        tail = (low + high) / 2
        costs = calibrate(replace(plan, rollout_s=1.0, actor_s=0, weights_gb=0.0, tail=tail))
        if simulate(twice, costs, iterations=12, warmup=1).step_s > shorter:
            high = tail
        else:
            low = tail
    return (low + high) / 2


def column_plan(column: str, gpus: int, preset: str) -> PlanConfig:
    """Returns the flags of one row of the main table."""
    setup = SETUPS[column]
    lane = 1
    if setup.vectorised:  # one simulator on each of the 4 GPUs; dynamic batching splits it in two
        lane = 32 if preset in ("rollout-async", "full") else 64
    return PlanConfig(
        gpus=gpus,
        preset=preset,
        envs=setup.envs,
        rollout_epochs=setup.rollout_epochs,
        episode_steps=setup.episode_steps,
        chunk=setup.chunk,
        update_epochs=setup.update_epochs,
        lane_envs=lane,
        iterations=10,
        rounds=16 if lane == 1 else 64,
    )


class Case(NamedTuple):
    """One assumption about what no synchronous row tells."""

    infer_share: float
    tail: float
    step_fixed: float


def env_steps_per_s(plan: PlanConfig, rollout_s: float, actor_s: float, case: Case) -> float:
    """Predicts a row's throughput under an assumption."""
    plan = replace(plan, rollout_s=rollout_s, actor_s=actor_s, **case._asdict())
    node, nodes, _ = planned(plan)
    costs = calibrate(plan)
    return simulate(node, costs, nodes, iterations=plan.iterations, warmup=4).env_steps_per_s


def main_table() -> list[dict]:
    """Compares the asynchronous rows of the main table."""
    rows = []
    print(
        "\nRL-VLA³, main comparison, env steps/s                 paper predicted   error   range "
        "of what no synchronous row tells"
    )
    for column, setup in SETUPS.items():
        tails = {share: 0.0 if setup.vectorised else tail_for(column, share) for share in SHARES}
        print(
            f"{column}: actor {setup.actor_s():.0f} s; σ "
            + ", ".join(f"{t:.2f} if inference is {s:.0%}" for s, t in tails.items())
        )
        low, usual, high = SHARES
        cases = [Case(share, tails[share], 0.0) for share in SHARES]
        cases[1] = Case(usual, tails[usual], FIXED[1])
        if setup.vectorised:
            cases = [Case(usual, tails[usual], fixed) for fixed in FIXED]
        for i, gpus in enumerate(GPUS):
            for preset in TABLE_1[2:]:
                rows.append(main_row(column, i, gpus, preset, cases))
    for name in ("error", "given_train_async"):
        errors = [abs(row[name]) for row in rows if row[name] is not None]
        print(
            f"  mean size of the error{' given train-async' * (name != 'error')}: "
            f"{sum(errors) / len(errors):.0%}"
        )
    return rows


def main_row(column: str, i: int, gpus: int, preset: str, cases: list[Case]) -> dict:
    """Compares one row; i: its place in MAIN. The middle one of `cases` is the prediction."""
    setup = SETUPS[column]
    table = dict(zip(TABLE_1, (row[i] for row in MAIN[column]), strict=True))
    measured = table[preset]
    actor_s = setup.actor_s()
    rollout_s = setup.env_steps(gpus) / table["sync-disaggregated"] - actor_s
    middle = cases[1]
    plan = column_plan(column, gpus, preset)
    if preset == "train-async":  # which no assumption changes
        cases = [middle]
    found = [env_steps_per_s(plan, rollout_s, actor_s, case) for case in cases]
    span = f"{min(found):.0f} … {max(found):.0f}" if len(found) > 1 else ""
    best = found[len(found) // 2]
    error = compare(f"{gpus} GPUs, {preset} (rollout {rollout_s:.0f} s)", best, measured, span)
    row = {"table": "main", "row": f"{column} {preset}", "gpus": gpus}
    row |= {"paper": measured, "predicted": best, "error": error}
    row |= {"low": min(found), "high": max(found), "given_train_async": None}
    if len(found) > 1 and not setup.vectorised:
        # No prediction from synchronous rows, it shows the batcher's part alone: the rollout takes
        # what the row + train-async takes, if that one hides the actor.
        alone_s = setup.env_steps(gpus) / table["train-async"]
        given = env_steps_per_s(plan, alone_s, actor_s, middle)
        label = f"   given train-async's {alone_s:.0f} s"
        row["given_train_async"] = compare(label, given, measured)
    return row


def gain(row: Gain, setting: str, scales: dict[str, float]) -> float:
    """Predicts a headline, as a ratio of env steps/s, with times that are so much longer."""
    speeds = []
    for preset in (row.synchronous, row.asynchronous):
        node, costs = emulated_node(preset, row.ratio, setting)
        speeds.append(simulate(node, scaled(costs, **scales), iterations=12).env_steps_per_s)
    return speeds[1] / speeds[0]


def second_version() -> list[dict]:
    """Compares the second version's gains with what its unknown times would make of them."""
    print("\nRL-VLA³, second version, per cent of the synchronous row      paper predicted   error")
    rows = []
    for setting, row in SECOND.items():
        for case, scales in row.scales.items():
            found = gain(row, setting, scales)
            name = f"{setting}: {case}"
            error = compare(f"{name:58s}", 100 * found, 100 * row.paper)
            line = {"table": "second version", "row": name, "gpus": 8}
            rows.append(line | {"paper": row.paper, "predicted": found, "error": error})
    return rows


LIMITS = """
What the paper's figures do not determine, and so no plan can predict:
- Train Async gains more than it hides. Hiding the actor can at most halve a step; ManiSkill at 8
  GPUs gains 109 %, and LIBERO π0.5 gains 1.41 to 1.61 times although a pass over its batch should
  take 111 of 1510 to 2150 s. Whatever else that row changed (resets between epochs, offloading,
  synchronisation) is in no stage time.
- inference's share of the rollout: see the range.
- how much of a vectorised simulator's step does not depend on its size: see ManiSkill's range.
- the second version's gains: of a step's parts it gives none. At the first version's pace training
  is 23 % of ManiSkill's hybrid step, and GPUs that train in turns with either side could gain 42 %
  at most where 78.6 % are reported.
- colocated at 32 GPUs (rollout + 16 % over 8 GPUs): neither random stragglers nor gradients explain
  it."""


# ---------------------------------------------------------------- the ladder


def emulated_node(preset: str, ratio: str, setting: str = "emulated") -> tuple[Node, Costs]:
    """Returns what `benchmarks/ladder.py` runs: sleeps of a simulator and a model that only take
    time. preset: its name, with HYBRID after it there. setting: of EMULATED."""
    costs = importlib.import_module(EMULATED[setting])
    vectorised = hasattr(costs, "Envs")
    config = from_preset(preset.removesuffix(HYBRID))
    if preset.endswith(HYBRID):
        config.train.placement = "hybrid"
    placement = config.train.placement
    for_rollout, for_actor = libero.devices(ratio, placement)
    workers, envs = libero.sizes(costs, ratio, placement)
    actors = parse_ratio(ratio)[1]

    # Settings, as the ladder's flags give them.
    config.env.envs = envs
    config.env.env_workers = workers
    if vectorised:
        lockstep = config.rollout.batch_max == "all"
        config.env.lanes = costs.LOCKSTEP_LANES if lockstep else costs.LANES
    config.env.segment = costs.EPISODE
    config.rollout.chunk = costs.CHUNK
    config.actor.batch = costs.TRAJECTORIES * envs
    config.actor.minibatch = config.actor.batch // costs.MINIBATCHES
    together = divisor(config.actor.minibatch, costs.MICRO_BATCH)
    config.actor.micro_batch = together * costs.EPISODE
    config.actor.update_epochs = costs.UPDATE_EPOCHS
    node = node_of(config, place(ratio, placement, 0, 1, workers, 1, actors))
    if placement in ("colocated", "hybrid"):  # who shares a device, as `devices.device_of` has it
        ranks = ("0", "1") if placement == "hybrid" else ("0",)
        node = replace(
            node,
            env_devices=("0",) * workers if placement == "hybrid" else node.env_devices,
            rollout_devices=ranks[-1:],
            actor_devices=tuple(ranks[i % len(ranks)] for i in range(actors)),
        )

    # Costs, which are of as many envs as there are at 1:1.
    infer = costs.INFER_ALL / for_rollout
    train = costs.TRAIN_ALL / for_actor * shares(placement, actors)
    return node, Costs(
        step_s=costs.FIXED + config.env.width * costs.EACH if vectorised else costs.MEAN,
        step_tail=0.0 if vectorised else costs.TAIL,
        draw_share=vars(costs).get("DRAWN", 0.0),
        slice_s=SLICE,
        infer_fixed_s=costs.INFER_FIXED * infer,
        infer_each_s=(1 - costs.INFER_FIXED) * infer / costs.ENVS,
        train_each_s=train / costs.ENVS,
    )


def read_ladder(file: Path) -> list[dict]:
    """Returns its rows of the paper's columns, as far as they are presets. Raises UserError."""
    try:
        rows = json.loads(file.read_text())["rows"]
        known = {*TABLE_1, *(name for row in SECOND.values() for name in row[:2])}
        measured = [row for row in rows if row["setting"] in EMULATED and row["preset"] in known]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read the ladder in {file}: {error}") from None
    require(
        measured,
        f"{file} has no emulated rows: make it with `python bench.py ladder --setting columns "
        f"--json {file}`",
    )
    return measured


def calibrated_on(base: dict, node: Node, costs: Costs) -> float:
    """Predicts with the seconds that a synchronous row measured for its two phases, which contain
    what this machine adds to a sleep."""
    there = emulated_node("sync-disaggregated", base["ratio"], base["setting"])
    sync = simulate(*there, iterations=40)
    # While the actor waits, the rollout phase runs.
    rollout = base["rollout_s"] / (sync.bubble_actor * sync.step_s)
    actor = base["actor_s"] / ((1 - sync.bubble_actor) * sync.step_s)
    priced = scaled(costs, env=rollout, rollout=rollout, actor=actor)
    return simulate(node, priced, iterations=40).env_steps_per_s


def ladder(measured: list[dict]) -> list[dict]:
    """Compares every measured row with two predictions: from the nominal sleeps, and calibrated on
    the ladder's own synchronous row."""
    print(
        "\nemulated ladder, env steps/s                        measured   nominal   error   "
        "calibrated on sync-disaggregated"
    )
    bases = {
        (row["setting"], row["ratio"]): row
        for row in measured
        if row["preset"] == "sync-disaggregated"
    }
    rows = []
    for row in measured:
        preset = row["preset"]
        ratio = row["ratio"]
        setting = row["setting"]
        reached = row["env_steps_per_s"]
        node, costs = emulated_node(preset, ratio, setting)
        found = simulate(node, costs, iterations=40)
        calibrated = None
        more = ""
        if base := bases.get((setting, ratio)):
            calibrated = calibrated_on(base, node, costs)
            more = f"{calibrated:8.1f}  {calibrated / reached - 1:+6.1%}"
        error = compare(f"{setting} {ratio} {preset}", found.env_steps_per_s, reached, more)
        bubbles = {s: [row[f"bubble_{s}"], getattr(found, f"bubble_{s}")] for s in STAGES}
        print(
            "      waits: " + ", ".join(f"{s} {a:.0%} and {b:.0%}" for s, (a, b) in bubbles.items())
        )
        row = {"table": "emulated ladder", "row": f"{setting} {ratio} {preset}"}
        row |= {"measured": reached, "predicted": found.env_steps_per_s}
        row |= {"calibrated": calibrated, "error": error}
        rows.append(row | {f"bubble_{stage}": pair for stage, pair in bubbles.items()})
    return rows


def validate(file: Path | None) -> list[dict]:
    """Compares all there is: the paper's tables, and the ladder in `file`. Raises UserError."""
    measured = read_ladder(file) if file else []
    rows = stage_times() + other_parts() + main_table() + second_version()
    print(LIMITS)
    if not measured:
        print(
            "\nFor the emulated ladder: python bench.py ladder --setting columns --json L.json, "
            "then --validate --ladder L.json"
        )
    return rows + (ladder(measured) if measured else [])
