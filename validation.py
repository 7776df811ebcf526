"""Checks settings: each by itself, and what must hold between them. All are sentences for users."""

import math
from dataclasses import fields
from typing import get_args

from checks import check_ranges, flag_of
from config import FLOW, LOSS_HAS, MOST_WORKERS, Config, Family, Only, group_of, loss_of
from errors import require
from policy_loss import check_correction


def check_by_themselves(config: Config) -> None:
    """Checks every setting for its range, and for meaning something to this model and loss."""
    loss = loss_of(config)
    train = config.train
    known = {train.model, train.algorithm}
    known |= {trait for trait in LOSS_HAS if getattr(loss, trait)}
    if train.model == "emulated":
        known |= {*get_args(Family)}
    for stage in fields(Config):
        settings = getattr(config, stage.name)
        check_ranges(settings)
        for flag in fields(settings):
            marks = getattr(flag.type, "__metadata__", ())
            owners = [mark for mark in marks if isinstance(mark, Only)]
            changed = getattr(settings, flag.name) != flag.default
            for only in owners if changed else ():
                means = f"means something to {', '.join(only)}, not to {train.model} with "
                if needs := LOSS_HAS.get(only[0]):
                    means = f"needs {needs}, unlike "
                means += f"{train.algorithm}: leave it out"
                require(known.intersection(only), f"{flag_of(flag.name)} {means}")


def validate(config: Config) -> None:
    """Checks what must hold between settings once worker counts are known. Raises UserError."""
    check_by_themselves(config)
    check_algorithm(config)
    check_shares(config)
    old = "--extra-staleness makes evaluations meet old weights"
    instead = "add --eval-every 0, and use evaluate.py afterwards"
    require(not (config.actor.extra_staleness and config.env.evaluates), f"{old}: {instead}")


def check_algorithm(config: Config) -> None:
    algorithm = config.algorithm
    check_correction(algorithm, densities=config.train.model in FLOW)
    rates = f"--group-low {algorithm.group_low} must not be above --group-high"
    require(algorithm.group_low <= algorithm.group_high, rates)
    dual_clip = f"--dual-clip {algorithm.dual_clip} must be more than 1, or 0 for off"
    require(not algorithm.dual_clip or algorithm.dual_clip > 1, dual_clip)
    rank = config.actor.lora_rank
    adapted = rank or rank is None and config.train.adapter
    frozen = not config.actor.train_vlm or adapted or config.rollout.prefix_dtype != "bfloat16"
    instead = "leave out --train-vlm, or give --prefix-dtype float32 or --lora-rank"
    require(frozen, f"--prefix-dtype bfloat16 is for a frozen VLM: {instead}")
    nowhere = config.actor.cache_prefix in ("auto", "off") or not config.actor.train_vlm
    require(nowhere, "--cache-prefix keeps what a frozen VLM made: leave it out with --train-vlm")


def check_shares(config: Config) -> None:
    """Checks that envs, batches and workers divide into whole lanes, groups and micro-batches."""
    env = config.env
    actor = config.actor
    ranks = actor.actor_workers
    every_lane = f"{env.lanes} lanes of each of {env.env_workers} env workers"
    even = env.lanes == 0 or env.envs % (env.env_workers * env.lanes) == 0
    require(even, f"--envs {env.envs} cannot be split evenly into {every_lane}")
    group = group_of(config)
    smaller, larger = sorted((group, env.width))
    both = f"--group-size {group} and the {env.width} envs of a lane must divide one another"
    require(group == 1 or larger % smaller == 0, both)
    for flag, total, parts, what in (
        ("--envs", env.envs, group, "--group-size"),
        ("--batch", actor.batch, env.envs, "--envs"),
    ):
        said = f"{flag} {total} is not divisible by {what} ({parts})"
        require(total % parts == 0, f"{said}: choose {flag} as a multiple of it")
    more = f"--minibatch {actor.minibatch} is larger than --batch {actor.batch}"
    require(actor.minibatch <= actor.batch, f"{more}: give --minibatch at most {actor.batch}")
    several = ranks * config.train.nodes > 1
    least = ranks * larger if several else group  # an actor worker trains whole lanes and groups
    share = f"a {'group' if group > env.width else 'lane'} of {larger} trajectories"
    each = f"cannot give each of {ranks} actor workers {share if larger > 1 else 'a trajectory'}"
    most = actor.batch // least  # minibatches of which that is true
    require(most, f"--batch {actor.batch} {each}: give --batch at least {least}")
    enough = math.ceil(actor.batch / (most + 0.5))
    enough += round(actor.batch / enough) > most  # a half is rounded to the even number
    small = f"--minibatch {actor.minibatch} {each}: give --minibatch at least {enough}"
    require(actor.minibatches <= most, small)
    alone = "--shard divides the weights among actor workers, and there is one: leave it out, or "
    require(ranks > 1 or not actor.shard, f"{alone}give more by --ratio or --actor-workers")
    few = f"{env.env_workers} env workers have only {env.envs} envs"
    require(env.env_workers <= env.envs, f"{few}: lower --env-workers or raise --envs")
    lanes = env.envs // env.width
    rollouts = config.rollout.rollout_workers
    require(rollouts <= lanes, f"{rollouts} rollout workers have only {lanes} lanes: raise --envs")
    workers = env.env_workers + rollouts + ranks
    many = f"{workers} workers are more than one machine can start ({MOST_WORKERS})"
    require(workers <= MOST_WORKERS, f"{many}: lower --env-workers")
