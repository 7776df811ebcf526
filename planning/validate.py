"""What `plan.py` predicts beside what was measured: RL-VLA³'s tables, and the emulated ladder.

    python plan.py --validate [--ladder FILE] [--json FILE]

From the paper only synchronous rows calibrate, and asynchronous ones are predicted:

- step time of a synchronous iteration, both disaggregated rows of a column and its own rollout and
actor seconds;
- actor: 442 s for 4 passes over 24,576 chunk steps on 4 GPUs (π0, 1:1, 16 and 32 GPUs; 2 passes on
8 took 222 s), so 111 s a
  pass. The main table gives no phases: π0.5, GR00T and ManiSkill's π0 are taken to train as fast
  per chunk step;
- rollout: the rest of that column's own synchronous disaggregated row;
- the simulators' tail: such that twice the GPUs shorten the lockstep rollout as that column's
colocated row does, on one node. It
  depends on inference's share of the rollout, which no synchronous row tells: SHARES spans the
  range that is printed, its middle is
  the prediction. Vectorised simulators have no tail, and FIXED spans their range.

From the ladder the seconds that its own sync-disaggregated row measured for rollout and actor
calibrate; all else is nominal.
"""

import importlib
import json
from dataclasses import replace
from pathlib import Path

from config import PRESETS, UserError, parse_ratio
from planning import STAGES, Costs, Node
from planning.costs import calibrate
from planning.events import simulate
from planning.settings import PlanConfig, divisor, node_of

SHARES = (0.0, 0.2, 0.4)  # inference's part of the lockstep rollout
FIXED = (
    0.0,
    0.5,
    1.0,
)  # part of a vectorised simulator's step that does not depend on the number of envs
PASS_S = (
    442.2 / 4 / 24576
)  # seconds of the actor per chunk step and pass, on the 4 GPUs of a node at 1:1
PRESET_ROWS = ("sync-colocated", "sync-disaggregated", "train-async", "rollout-async", "full")
GPUS = (8, 16, 32)
EMULATED = {
    "emulated": "benchmarks.emulated.libero",
    "gr00t": "benchmarks.emulated.gr00t",
    "vectorised": "benchmarks.emulated.maniskill",
}  # settings of the ladder

# RL-VLA³, main comparison: env steps/s at 8, 16 and 32 GPUs, in the order of PRESET_ROWS.
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
SETUPS = {  # of a node of 8 GPUs: envs, rollout epochs, episode steps, chunk, update epochs
    "LIBERO π0.5": (64, 8, 480, 10, 1),
    "LIBERO GR00T": (64, 8, 480, 10, 1),
    "ManiSkill π0": (256, 4, 80, 5, 4),
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


PARTS = (  # model, placement, GPUs, envs per node where the 1:1 row has 128
    ("π0", "colocated", 16, 128),
    ("π0", "colocated", 32, 128),
    ("π0", "1:1 T+R", 8, 128),
    ("π0", "3:1", 16, 192),
    ("π0", "3:1", 32, 192),
    ("OFT", "colocated", 8, 128),
    ("OFT", "colocated", 16, 128),
    ("OFT", "colocated", 32, 128),
    ("OFT", "3:1", 8, 192),
    ("OFT", "3:1", 16, 192),
    ("OFT", "3:1", 32, 192),
)


def line(label: str, found: float, measured: float, more: str = "") -> float:
    """Prints one comparison. Returns the relative error."""
    error = found / measured - 1
    print(f"  {label:44s} {measured:8.1f}  {found:8.1f}  {error:+6.1%}  {more}", flush=True)
    return error


# ---------------------------------------------------------------- the paper


def stage_times() -> list[dict]:
    """Synchronous rows: a step is its rollout and its actor, one after the other."""
    print(
        "RL-VLA³, stage times: seconds of a synchronous step, from its own rollout and actor    "
        "paper  predicted"
    )
    rows = []
    for model, placement, gpus, step, rollout, actor in (
        (*key, *row) for key, found in STAGE_TIMES.items() for row in found
    ):
        colocated = placement == "colocated"
        per_node = 6 if gpus in (6, 24) else 8
        config = PlanConfig(
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
        node, nodes, _ = node_of(config)
        found = simulate(node, calibrate(config), nodes, iterations=8, warmup=2).step_s
        error = line(f"{model} {placement}, {gpus} GPUs", found, step)
        rows.append(
            {
                "table": "stage times",
                "row": f"{model} {placement}",
                "gpus": gpus,
                "paper": step,
                "predicted": found,
                "error": error,
            }
        )
    return rows


def other_parts() -> list[dict]:
    """From a synchronous 1:1 row: what more or fewer GPUs for a phase make of both phases."""
    print(
        "\nRL-VLA³, stage times: seconds of a synchronous step on other parts, from the row of 1:1 "
        "alone    paper  predicted"
    )
    rows = []
    for model, placement, gpus, envs in PARTS:
        # Env steps of a row are its throughput times its step, so envs say how much more there is
        # to do than at 1:1.
        base = next(row for row in STAGE_TIMES[model, "1:1"] if row[0] == gpus)
        step, rollout, actor = next(row for row in STAGE_TIMES[model, placement] if row[0] == gpus)[
            1:
        ]
        ratio, where = {"colocated": ("1:1", "colocated"), "1:1 T+R": ("2:2", "hybrid")}.get(
            placement, (placement, "disaggregated")
        )
        config = PlanConfig(
            gpus=gpus,
            rounds=8,
            rollout_s=base[2],
            actor_s=base[3],
            envs=128,
            rollout_epochs=4,
            preset="sync-disaggregated",
            ratio="1:1",
        )
        costs = calibrate(config)
        node, nodes, _ = node_of(replace(config, ratio=ratio, placement=where, envs=envs))
        found = simulate(node, costs, nodes, iterations=8, warmup=2)
        waits = found.bubble_actor * found.step_s
        trains = (1 - found.bubble_actor) * found.step_s
        more = f"rollout {waits:.0f} (paper {rollout:.0f}), actor {trains:.0f} (paper {actor:.0f})"
        error = line(f"{model} {placement}, {gpus} GPUs", found.step_s, step, more)
        row = {
            "table": "other parts",
            "row": f"{model} {placement}",
            "gpus": gpus,
            "paper": step,
            "predicted": found.step_s,
        }
        rows.append(row | {"error": error, "rollout": [rollout, waits], "actor": [actor, trains]})
    return rows


def tail_for(column: str, share: float) -> float:
    """σ with which the lockstep rollout shortens as the column's synchronous rows do, disaggregated
    to colocated, on one node.
    """
    config = replace(column_config(column, 8, "sync-disaggregated"), infer_share=share)
    colocated, disaggregated = (env_steps(column, 8) / row[0] for row in MAIN[column][:2])
    actor_s = actor_seconds(column)
    shorter = (colocated - actor_s / 2) / (disaggregated - actor_s)
    low = 0.0
    high = 1.5
    many = node_of(replace(config, preset="sync-colocated"))[0]
    for _ in range(6):
        tail = (low + high) / 2
        costs = calibrate(replace(config, rollout_s=1.0, actor_s=0, weights_gb=0.0, tail=tail))
        low, high = (
            (low, tail)
            if simulate(many, costs, iterations=12, warmup=1).step_s > shorter
            else (tail, high)
        )
    return (low + high) / 2


def actor_seconds(column: str) -> float:
    envs, epochs, steps, chunk, passes = SETUPS[column]
    return PASS_S * passes * envs * epochs * steps / chunk


def column_config(column: str, gpus: int, preset: str) -> PlanConfig:
    envs, epochs, steps, chunk, passes = SETUPS[column]
    lane = (
        64 if envs == 256 else 1
    )  # ManiSkill: one vectorised simulator on each of the 4 GPUs; split in two by dynamic batching
    if lane > 1 and preset in ("rollout-async", "full"):
        lane = 32
    return PlanConfig(
        gpus=gpus,
        preset=preset,
        envs=envs,
        rollout_epochs=epochs,
        episode_steps=steps,
        chunk=chunk,
        update_epochs=passes,
        lane_envs=lane,
        iterations=10,
        rounds=16 if lane == 1 else 64,
    )


def env_steps(column: str, gpus: int) -> float:
    envs, epochs, steps, *_ = SETUPS[column]
    return gpus / 8 * envs * epochs * steps


def predict(
    column: str,
    gpus: int,
    preset: str,
    rollout_s: float,
    actor_s: float,
    share: float,
    tail: float,
    fixed: float,
) -> float:
    """Env steps/s."""
    config = replace(
        column_config(column, gpus, preset),
        rollout_s=rollout_s,
        actor_s=actor_s,
        infer_share=share,
        tail=tail,
        step_fixed=fixed,
    )
    node, nodes, _ = node_of(config)
    return simulate(
        node, calibrate(config), nodes, iterations=config.iterations, warmup=4
    ).env_steps_per_s


def main_table() -> list[dict]:
    rows = []
    print(
        "\nRL-VLA³, main comparison, env steps/s                 paper predicted   error   range "
        "of what no synchronous row tells"
    )
    for column, table in MAIN.items():
        vectorised = SETUPS[column][0] == 256
        actor_s = actor_seconds(column)
        tails = {share: 0.0 if vectorised else tail_for(column, share) for share in SHARES}
        middle = (SHARES[1], tails[SHARES[1]], FIXED[1])
        print(
            f"{column}: actor {actor_s:.0f} s; σ "
            + ", ".join(f"{t:.2f} if inference is {s:.0%}" for s, t in tails.items())
        )
        for i, gpus in enumerate(GPUS):
            rollout_s = env_steps(column, gpus) / table[1][i] - actor_s
            alone_s = (
                env_steps(column, gpus) / table[2][i]
            )  # of the asynchronous row + train-async, if that hides the actor
            for preset, measured in zip(
                PRESET_ROWS[2:], (row[i] for row in table[2:]), strict=True
            ):
                cases = [middle]
                if preset != "train-async":
                    low, _, high = SHARES
                    cases = (
                        [(SHARES[1], tails[SHARES[1]], fixed) for fixed in FIXED]
                        if vectorised
                        else [(low, tails[low], 0.0), middle, (high, tails[high], 0.0)]
                    )
                found = [predict(column, gpus, preset, rollout_s, actor_s, *case) for case in cases]
                span = f"{min(found):.0f} … {max(found):.0f}" if len(found) > 1 else ""
                best = found[len(found) // 2]
                error = line(
                    f"{gpus} GPUs, {preset} (rollout {rollout_s:.0f} s)", best, measured, span
                )
                row = {
                    "table": "main",
                    "row": f"{column} {preset}",
                    "gpus": gpus,
                    "paper": measured,
                    "predicted": best,
                }
                row |= {
                    "error": error,
                    "low": min(found),
                    "high": max(found),
                    "given_train_async": None,
                }
                if (
                    len(cases) > 1 and not vectorised
                ):  # no prediction from synchronous rows: it shows the batcher's part alone
                    given = predict(column, gpus, preset, alone_s, actor_s, *middle)
                    row["given_train_async"] = line(
                        f"   given train-async's {alone_s:.0f} s", given, measured
                    )
                rows.append(row)
    for name in ("error", "given_train_async"):
        errors = [abs(row[name]) for row in rows if row[name] is not None]
        print(
            f"  mean size of the error{' given train-async' * (name != 'error')}: "
            f"{sum(errors) / len(errors):.0%}"
        )
    return rows


LIMITS = """
What the paper's figures do not determine, and so no plan can predict:
- Train Async gains more than it hides. Hiding the actor can at most halve a step; ManiSkill at 8
  GPUs gains 109 %, and LIBERO π0.5 gains 1.41 to 1.61 times although a pass over its batch should
  take 111 of 1510 to 2150 s. Whatever else that row changed (resets between epochs, offloading,
  synchronisation) is in no stage time.
- inference's share of the rollout: see the range.
- how much of a vectorised simulator's step does not depend on its size: see ManiSkill's range.
- colocated at 32 GPUs (rollout + 16 % over 8 GPUs): neither random stragglers nor gradients explain
  it."""


# ---------------------------------------------------------------- the ladder


def emulated_node(preset: str, ratio: str, setting: str = "emulated") -> tuple[Node, Costs]:
    """What `benchmarks/ladder.py` runs: sleeps of a simulator that only takes time and
    benchmarks/emulated/policy.py. setting: of EMULATED.
    """
    from benchmarks.emulated import libero

    costs = importlib.import_module(EMULATED[setting])
    placement, staleness, batch_max, wait, stream = PRESETS[preset]
    for_rollout, for_actor = libero.devices(ratio, placement)
    workers, envs = libero.sizes(costs, ratio, placement)
    actors = parse_ratio(ratio)[1]  # which share their devices
    lanes = envs
    step_s = 0.0
    tail = 0.0
    if hasattr(costs, "Envs"):
        lanes = workers * (1 if batch_max == "all" else 2)
        step_s = costs.FIXED + envs / lanes * costs.EACH
    else:
        step_s = costs.MEAN
        tail = costs.TAIL
    batch = costs.TRAJECTORIES * envs
    minibatch = batch // costs.MINIBATCHES
    node = Node(
        lanes=lanes,
        lane_envs=envs // lanes,
        env_devices=("cpu",) * workers,
        rollout_devices=("cpu",),
        actor_devices=("cpu",) * actors,
        segment=costs.EPISODE,
        chunk=costs.CHUNK,
        batch=batch,
        minibatch=minibatch,
        micro_batch=divisor(minibatch, costs.MICRO_BATCH),
        update_epochs=1,
        max_staleness=staleness,
        batch_max=batch_max,
        batch_wait_s=wait,
        stream=stream,
    )
    # of so many envs as there are at 1:1
    infer = costs.INFER_ALL / for_rollout
    train = costs.TRAIN_ALL / for_actor * actors
    return node, Costs(
        step_s=step_s,
        step_tail=tail,
        infer_fixed_s=costs.INFER_FIXED * infer,
        infer_each_s=(1 - costs.INFER_FIXED) * infer / costs.ENVS,
        train_each_s=train / costs.ENVS,
    )


def read_ladder(file: Path) -> list[dict]:
    """Its rows of the paper's columns, as far as they are presets."""
    try:
        rows = json.loads(file.read_text())["rows"]
        measured = [row for row in rows if row["setting"] in EMULATED and row["preset"] in PRESETS]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read the ladder in {file}: {error}") from None
    if not measured:
        raise UserError(
            f"{file} has no emulated rows: make it with `python bench.py ladder --setting columns "
            f"--json {file}`"
        )
    return measured


def ladder(measured: list[dict]) -> list[dict]:
    """Every measured row beside two predictions: from the nominal sleeps, and with the seconds that
    the ladder's own synchronous row measured, which contain what this machine adds to a sleep.
    """
    print(
        "\nemulated ladder, env steps/s                        measured   nominal   error   "
        "calibrated on sync-disaggregated"
    )
    rows = []
    for row in measured:
        preset = row["preset"]
        ratio = row["ratio"]
        setting = row["setting"]
        reached = row["env_steps_per_s"]
        node, costs = emulated_node(preset, ratio, setting)
        found = simulate(node, costs, iterations=40)
        calibrated = None
        own = (row for row in measured if row["ratio"] == ratio and row["setting"] == setting)
        base = next((row for row in own if row["preset"] == "sync-disaggregated"), None)
        if base:
            sync = simulate(*emulated_node("sync-disaggregated", ratio, setting), iterations=40)
            rollout = base["rollout_s"] / (
                sync.bubble_actor * sync.step_s
            )  # while the actor waits, the rollout phase runs
            actor = base["actor_s"] / ((1 - sync.bubble_actor) * sync.step_s)
            priced = replace(
                costs,
                step_s=costs.step_s * rollout,
                infer_fixed_s=costs.infer_fixed_s * rollout,
                infer_each_s=costs.infer_each_s * rollout,
                train_each_s=costs.train_each_s * actor,
            )
            calibrated = simulate(node, priced, iterations=40).env_steps_per_s
        more = f"{calibrated:8.1f}  {calibrated / reached - 1:+6.1%}" if calibrated else ""
        error = line(f"{setting} {ratio} {preset}", found.env_steps_per_s, reached, more)
        bubbles = {
            f"bubble_{s}": [row[f"bubble_{s}"], getattr(found, f"bubble_{s}")] for s in STAGES
        }  # measured, predicted
        print(
            "      waits: "
            + ", ".join(
                f"{s.removeprefix('bubble_')} {a:.0%} and {b:.0%}" for s, (a, b) in bubbles.items()
            )
        )
        row = {
            "table": "emulated ladder",
            "row": f"{setting} {ratio} {preset}",
            "measured": reached,
            "predicted": found.env_steps_per_s,
        }
        rows.append(row | {"calibrated": calibrated, "error": error} | bubbles)
    return rows


def validate(file: Path | None) -> list[dict]:
    measured = read_ladder(file) if file else []
    rows = stage_times() + other_parts() + main_table()
    print(LIMITS)
    if not measured:
        print(
            "\nFor the emulated ladder: python bench.py ladder --setting columns --json L.json, "
            "then --validate --ladder L.json"
        )
    return rows + (ladder(measured) if measured else [])
