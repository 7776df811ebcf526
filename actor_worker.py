"""Trains: micro-batch forward and backward as trajectories complete, one optimizer step per
minibatch, publish per batch.

Several ranks each train their share of every minibatch and sum gradients through torch.distributed
before the step, so all hold the same weights; rank 0 publishes, writes checkpoints and reports
metrics.

Left out: FSDP2 (trainable weights are replicated), multi-node start-up.
"""

import json
import math
import os
import pickle
import time
from collections import deque
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import metrics
import models
from algorithms import (
    STALENESS,
    AdvantageScale,
    PolicyLoss,
    by_staleness,
    explained_variance,
    gae,
    group_advantages,
    interpolated_proximal,
    units,
    value_loss,
)
from channel import RESTART, VERSION, Channels, Record, SlotPool
from config import Config, UserError
from models import checkpoint
from scheduler import Admission
from streamer import Streamer

ERRORS = (
    "returns",
    "returns_square",
    "error",
    "error_square",
)  # of the value head, for its explained variance
BUCKETS = tuple(f"{what}_at_{name}" for what in ("samples", "kl", "ratio") for name in STALENESS)
SUMS = (
    "loss_policy",
    "loss_value",
    "entropy_or_noise",
    "approx_kl",
    "clip_fraction",
    "masked",
    "filtered",
    "skipped",
    "restart",
    "after_end",
    "advantage_square",
    "staleness",
    "samples",
    "trained_once",
    "reward",
    *ERRORS,
    *BUCKETS,
)
MAXIMA = ("ratio_max", "staleness_max")


def gather(
    pool: SlotPool, slots: tuple[int, ...], names: tuple[str, ...], device: str
) -> dict[str, Tensor]:
    """Trajectories `slots` as tensors [n, rows, …] on `device`."""
    index = np.array(slots)
    return {name: pool.gather(name, index).to(device, non_blocking=True) for name in names}


def played(data: dict[str, Tensor], algorithm: str) -> Tensor:
    """Which rows [n, T] belong to the trajectory: all, but GRPO's ends with its first episode and
    leaves old rows behind.
    """
    done = data["terminated"] | data["truncated"]
    return done.cumsum(1) - done.long() == 0 if algorithm == "grpo" else torch.ones_like(done)


def outcomes_of_groups(pool: SlotPool, slots: tuple[int, ...], size: int, device: str) -> Tensor:
    """Success (1 or 0) of every member of the groups of `slots` [n, G]; the G lanes of a group have
    slots in a row.
    """
    members = np.array(
        [range(slot - slot % size, slot - slot % size + size) for slot in slots]
    )  # [n, G]
    data = {name: pool.gather(name, members.flatten()) for name in ("terminated", "truncated")}
    success = (data["terminated"] & played(data, "grpo")).any(1)
    return success.view(members.shape).float().to(device)


def advantages_of(
    data: dict[str, Tensor], rows: Tensor, config: Config
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Advantages [n, T], returns [n, T] (GRPO: None, for want of a critic) and which of the played
    `rows` are trained on [n, T].
    """
    hyper = config.algorithm
    if config.train.algorithm == "ppo":
        ends = data["terminated"], data["truncated"]
        return *gae(
            data["reward"], data["value"], *ends, hyper.gamma, hyper.gae_lambda, data.get("final")
        ), rows
    advantages, kept = group_advantages(data["outcomes"], hyper.group_low, hyper.group_high)
    mine = advantages.gather(1, data["member"][:, None])  # [n, 1]
    return mine.expand_as(rows), None, rows & kept[:, None]


def train_micro_batch(
    model,
    data: dict[str, Tensor],
    version: int,
    samples: int,
    config: Config,
    scale: AdvantageScale,
    proximal=None,
) -> dict[str, Tensor]:
    """Forward and backward of one micro-batch; gradients accumulate. Returns sums and maxima for
    the metrics, and "rows" [n]: how many chunk steps of each trajectory were trained.

    data: slot fields [n, T or T+1, …], for GRPO also "outcomes" [n, G] and "member" [n], the place
    in the group; samples: chunk steps of the whole minibatch over all ranks, which the loss divides
    by, trained on or not, so that it does not depend on outcomes; proximal: rows' log-probs [m, C,
    A] → the exact proximal ones, where they are asked for.
    """
    hyper = config.algorithm
    segment = data["reward"].shape[1]
    mine = played(data, config.train.algorithm)
    advantages, returns, rows = advantages_of(data, mine, config)
    kept = rows.flatten().nonzero()[:, 0]  # [m]
    sums = {"reward": (data["reward"] * mine).sum(), "advantage_square": advantages.square().sum()}
    sums |= {"filtered": (mine & ~rows).sum(), "rows": rows.sum(1)}
    sums |= dict.fromkeys(("samples", "trained_once"), torch.tensor(float(len(kept))))
    if not len(kept):
        return sums

    def pick(x):
        return x[:, :segment].flatten(0, 1)[kept]

    flat = {name: pick(data[name]) for name in model.training_fields()}
    out = model.evaluate(flat)
    staleness = (version - pick(data["version"])).to(torch.float32)
    new = units(out["logprob"], hyper.granularity)
    old = units(pick(data["logprob"]), hyper.granularity)
    if hyper.proximal == "behaviour":
        prox = old
    elif proximal is None:
        prox = interpolated_proximal(new, old, staleness)
    else:
        prox = torch.where(
            staleness[:, None] > 0,
            units(proximal(flat, out["logprob"], kept), hyper.granularity),
            old,
        )
    loss, stats = PolicyLoss(
        clip_low=hyper.clip_low,
        clip_high=hyper.clip_high,
        dual_clip=hyper.dual_clip,
        weight_max=hyper.behaviour_weight_max,
        weight_mode=hyper.behaviour_weight,
    )(new, old, prox, scale(pick(advantages)))
    total = loss
    values = torch.zeros_like(loss)
    if returns is not None:
        target = pick(returns)
        before = pick(data["value"])
        values = value_loss(out["value"], before, target, hyper.value_clip, hyper.huber)
        total = total + hyper.value_weight * values
        error = target - before
        found = target.sum(), target.square().sum(), error.sum(), error.square().sum()
        sums |= dict(zip(ERRORS, found, strict=True))
    (total / samples).backward()
    entropy = out.get("entropy", torch.zeros(()))  # zero where exploration is not learned
    return (
        sums
        | stats
        | by_staleness(new, old, staleness)
        | {
            "loss_policy": loss.detach(),
            "loss_value": values.detach(),
            "entropy_or_noise": entropy.detach() * len(kept),
            "staleness": staleness.sum(),
            "staleness_max": staleness.max(),
        }
    )


class ExactProximal:
    """Log-probs under the weights that a batch's first update begins from: computed once per
    trajectory, kept for later epochs.
    """

    def __init__(self, model, parameters: list[Tensor]):
        self.model = model
        self.parameters = parameters
        self.begin_batch()

    def begin_batch(self) -> None:
        self.before: list[Tensor] | None = (
            None  # weights at the beginning, once an update has changed them
        )
        self.stored: dict[int, Tensor] = {}  # by slot

    def keep_weights(self) -> None:
        """Before every optimizer step."""
        self.before = self.before or [p.detach().clone() for p in self.parameters]

    def of(self, slots: tuple[int, ...], segment: int):
        """For the micro-batch of these slots, a function as `train_micro_batch` wants it."""

        def proximal(flat: dict[str, Tensor], new: Tensor, kept: Tensor) -> Tensor:
            trajectory = kept // segment
            row = kept % segment
            if not self.stored.keys() >= set(slots):
                found = new.detach()
                if self.before is not None:
                    self.exchange()
                    with torch.no_grad():
                        found = self.model.evaluate(flat)["logprob"]
                    self.exchange()
                for i, slot in enumerate(slots):
                    whole = new.new_zeros(segment, *new.shape[1:])
                    whole[row[trajectory == i]] = found[trajectory == i]
                    self.stored[slot] = whole
            return torch.stack([self.stored[slot] for slot in slots])[trajectory, row]

        return proximal

    def exchange(self) -> None:
        for parameter, before in zip(self.parameters, self.before, strict=True):
            parameter.data, before.data = before.data, parameter.data


def outcomes(data: dict[str, Tensor], algorithm: str) -> dict[str, Tensor]:
    """Trajectories, episodes that ended and those that succeeded, per task: trajectories_0,
    episodes_0, successes_0, …
    """
    mine = played(data, algorithm)
    counted = {
        "episodes": (data["terminated"] | data["truncated"]) & mine,
        "successes": data["terminated"] & mine,
    }
    counted["trajectories"] = torch.ones_like(data["task"])
    tasks = data["task"].unique().tolist()
    return {
        f"{what}_{task}": each[data["task"] == task].sum()
        for what, each in counted.items()
        for task in tasks
    }


def schedule(version: int, config: Config) -> float:
    """Factor of the learning rates while batch `version` is trained: warm-up, 1, then with `anneal`
    a fall to 0 in the second half.

    A fall over the whole run (CleanRL's anneal_lr) ended 5 points lower after as many iterations.
    """
    warm = min(1.0, (version + 1) / (config.actor.warmup + 1))
    return (
        warm * min(1.0, 2.0 * (1.0 - version / config.train.iterations))
        if config.actor.anneal
        else warm
    )


def all_reduce_gradients(parameters: list[Tensor], ranks: int) -> None:
    """Sums gradients over actor ranks, as one flat tensor. The loss is already divided by the
    global count.

    A weight may have none on any rank (the last layer's, with --train-vlm), and then keeps none; or
    on some ranks, whose groups were all filtered (GRPO): theirs is 0.
    """
    if ranks == 1:
        return
    has = parameters[0].new_tensor([p.grad is not None for p in parameters])
    flat = torch.cat(
        [
            has,
            *(
                torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
                for p in parameters
            ),
        ]
    )
    dist.all_reduce(flat)
    has, *parts = flat.split([len(parameters), *(p.numel() for p in parameters)])
    for p, part, somewhere in zip(parameters, parts, has.tolist(), strict=True):
        if somewhere:
            p.grad = part.view_as(p).clone()


def save_checkpoint(
    folder: Path, model, idle: dict[str, Tensor], optimizer, scale: AdvantageScale, state: dict
) -> Path:
    """folder/NNNNNN/{model.safetensors, optimizer.pt, state.json}: written beside, then renamed
    into place.

    idle: the weights that `model` left out (`models.formats.source.Part`).
    """
    path = folder / f"{state['version']:06d}"
    partial = folder / f".{path.name}.partial"
    partial.mkdir(exist_ok=True)
    checkpoint.save(partial / "model.safetensors", model.header, model.state_dict() | idle)
    torch.save(optimizer.state_dict(), partial / "optimizer.pt")
    (partial / "state.json").write_text(json.dumps(state | {"scale": asdict(scale)}))
    if (
        path.exists()
    ):  # interrupted again at the same version: keep the old one until the new one is in place
        old = folder / f".{path.name}.old"
        os.replace(path, old)
        os.replace(partial, path)
        for file in old.iterdir():
            file.unlink()
        old.rmdir()
    else:
        os.replace(partial, path)
    return path


def run(
    rank: int,
    config: Config,
    spec,
    device: str,
    channels: Channels,
    run_folder: Path,
    resume: dict | None,
    report: Connection | None,
    meter: metrics.Meter,
) -> None:
    """The worker. resume: state.json of the checkpoint to continue from, or None; report: rank 0's
    pipe to the launcher.
    """
    ranks = config.actor.actor_workers
    actor = config.actor
    queue = channels.finished[rank]
    plane = channels.plane
    pool = channels.pool
    queue.close_writer()
    if device != "cpu":
        torch.cuda.set_device(device)
        pool.pin()
    if ranks > 1:
        # of this start of the workers: one file serves one meeting
        meeting = f"rendezvous-{resume['version'] if resume else 0}"
        store = dist.FileStore(str(run_folder / ".spans" / meeting), ranks)
        dist.init_process_group(
            "nccl" if device != "cpu" else "gloo", store=store, rank=rank, world_size=ranks
        )
    torch.manual_seed(config.train.seed)
    model = models.build(config, spec, device, "training")
    idle = {}
    if (
        rank == 0 and model.idle()
    ):  # a frozen VLM: no use for it here but to save it, so it stays in the host's memory
        whole = models.build(config, spec, weights="idle").state_dict()
        idle = {name: tensor for name, tensor in whole.items() if name.startswith(model.idle())}
    trainable = model.trainable()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
    critic = model.critic()
    groups = {False: [], True: []}
    for name, parameter in trainable.items():
        groups[name in critic].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": groups[False], "lr": actor.lr}, {"params": groups[True], "lr": actor.value_lr}],
        betas=(0.9, 0.95),
        weight_decay=actor.weight_decay,
    )
    scale = AdvantageScale(config.algorithm.advantage_memory)
    version = 0
    if resume is not None:
        version = resume["version"]
        scale = AdvantageScale(**resume["scale"])
        saved = Path(config.train.checkpoint) / "optimizer.pt"
        try:
            optimizer.load_state_dict(torch.load(saved, map_location=device, weights_only=True))
        except (OSError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
            raise UserError(
                f"cannot read {saved} ({error}): remove {saved.parent} to continue from an older "
                "checkpoint"
            ) from None
        for group in optimizer.param_groups:  # a flag given on resuming counts, not what was saved
            group["weight_decay"] = actor.weight_decay
    admission = Admission.of(config)
    segment = pool["actions"].shape[1]
    algorithm = config.train.algorithm
    group = admission.group
    fields = (
        "task",
        "reward",
        "value",
        "terminated",
        "truncated",
        "logprob",
        "version",
        *model.training_fields(),
    )
    fields += ("final",) if config.algorithm.bootstrap_truncated else ()
    once = [
        f"{what}_{k}"
        for what in ("episodes", "successes", "trajectories")
        for k in range(len(spec.tasks))
    ]
    once += [
        "reward",
        "advantage_square",
        "filtered",
        "trained_once",
        *ERRORS,
    ]  # of a batch, not of every epoch over it
    names = tuple(dict.fromkeys((*SUMS, *once)))
    streamer = Streamer(
        actor.batch,
        actor.minibatch,
        actor.micro_batch,
        actor.max_staleness + 1,
        actor.update_epochs,
        actor.stream,
        rank,
        ranks,
        config.train.seed,
        version,
        admission.whole,
        group,
    )
    parameters = list(trainable.values())
    proximal = ExactProximal(model, parameters) if config.exact_proximal else None
    past = deque(
        maxlen=actor.extra_staleness + 1
    )  # weights of the newest versions, of which the oldest acts
    collected, received, trajectory = (
        pool.arrays[name] for name in ("collected", "received", "trajectory")
    )
    settled = np.zeros_like(
        collected
    )  # chunk steps of each slot, as far as trajectories from it were received
    rows: dict[int, int] = {}  # chunk steps trained, of each slot of the batch
    spared: list[int] = []  # slots whose epochs --kl-stop left out, once for each

    def publish() -> None:
        """Rank 0: new weights and the word that they are there, to everyone who may be waiting for
        a version.
        """
        with meter.work("publish", version=version, bytes=plane.bytes if rank == 0 else 0):
            if rank == 0:
                past.append(
                    {n: p.detach().clone() for n, p in trainable.items()}
                    if actor.extra_staleness
                    else trainable
                )
                plane.publish(past[0], version)
                for target in (*channels.replies, *channels.requests):
                    target.put([Record(0, 0, VERSION, 0)])

    def receive(wait_s: float) -> None:
        """Takes in finished trajectories. `received` marks the slot before any weight can depend on
        it; a worker that replaces a dead one reads the marks, which are complete once its RESTART,
        queued behind all that the dead one wrote, is echoed.
        """
        for record in queue.get(wait_s):
            if record.kind == RESTART:
                channels.replies[record.sender].put([record])
                continue
            slots = range(record.slot, record.slot + config.env.width)  # of all envs of the lane
            steps = record.t * len(slots)  # that their trajectories have
            if algorithm == "grpo":
                steps = int(
                    played(gather(pool, slots, ("terminated", "truncated"), "cpu"), algorithm).sum()
                )
            lane = slice(slots.start, slots.stop)
            # They were stepped `record.t` times for their trajectories; what lies before, dead
            # workers had stepped.
            sums["restart"] += float((collected[lane] - settled[lane]).sum()) - record.t * len(
                slots
            )
            sums["after_end"] += record.t * len(slots) - steps
            settled[lane] = collected[lane]
            received[lane] = trajectory[lane] + 1
            for slot in slots:
                streamer.add(slot)

    def save() -> Path:
        with meter.work("checkpoint"):
            state = {
                "version": version,
                "seed": config.train.seed,
            }  # all randomness is named by seed and version: no RNG state
            state["settings"] = {
                "train_vlm": actor.train_vlm,
                "oft_train": actor.oft_train,
                "noise": config.rollout.noise,
            }
            return save_checkpoint(run_folder / "checkpoints", model, idle, optimizer, scale, state)

    publish()
    meter.ready()
    sums = dict.fromkeys(names, 0.0)
    maxima = dict.fromkeys(MAXIMA, 0.0)
    norms = [0.0, 0.0, 0.0]
    begun = time.monotonic()
    kl = [0.0, 0.0]  # of the running minibatch: the sum and how many samples
    updated = False  # whether the weights are past those of `version`
    while version < config.train.iterations:
        if rank == 0 and channels.counters.get(0, "stop") and not updated:
            report.send({"saved": str(save())})
            # the launcher ends us; leaving first would fail the other ranks before it has read this
            while True:
                time.sleep(1.0)
        receive(0)
        micro = streamer.next()
        if micro is None and not streamer.done:
            with meter.wait("trajectory"):
                receive(
                    1.0
                )  # who is to blame for a long wait, the launcher knows better: `processes.Crew`
            continue

        if micro is not None:
            with meter.work(
                "train", slots=micro.slots, epoch=micro.epoch, minibatch=micro.minibatch
            ):
                data = gather(pool, micro.slots, fields, device)
                if algorithm == "grpo":
                    data["outcomes"] = outcomes_of_groups(pool, micro.slots, group, device)
                    data["member"] = torch.tensor(micro.slots, device=device) % group
                exact = proximal.of(micro.slots, segment) if proximal else None
                stats = train_micro_batch(
                    model, data, version, actor.minibatch * segment, config, scale, exact
                )
                stats |= outcomes(data, algorithm) if micro.epoch == 0 else {}
                rows |= dict(zip(micro.slots, stats.pop("rows").tolist(), strict=True))
                kl = [kl[0] + float(stats.get("approx_kl", 0.0)), kl[1] + float(stats["samples"])]
                for name, value in stats.items():
                    if name in maxima:
                        maxima[name] = max(maxima[name], float(value))
                    elif micro.epoch == 0 or name not in once:
                        sums[name] += float(value)
            if micro.last:
                with meter.wait("gradient") if ranks > 1 else meter.nothing:
                    all_reduce_gradients(parameters, ranks)
                with meter.work("optimizer"):
                    if version < config.algorithm.critic_warmup:  # not even by weight decay
                        for parameter in groups[False]:
                            parameter.grad = None
                    parts = [
                        float(
                            torch.nn.utils.get_total_norm(
                                p.grad for p in part if p.grad is not None
                            )
                        )
                        for part in groups.values()
                    ]
                    norm = float(torch.nn.utils.clip_grad_norm_(parameters, actor.grad_clip))
                    if not math.isfinite(norm):
                        raise FloatingPointError(
                            f"the gradient of version {version} is {norm}: lower --lr"
                        )
                    norms = list(map(max, norms, (norm, *parts)))
                    for part, lr in zip(
                        optimizer.param_groups, (actor.lr, actor.value_lr), strict=True
                    ):
                        part["lr"] = lr * schedule(version, config)
                    if (
                        norm > 0.0
                    ):  # 0: every group was filtered, and weight decay alone teaches nothing
                        if proximal:
                            proximal.keep_weights()
                        optimizer.step()
                        updated = True
                    optimizer.zero_grad(set_to_none=False)
                if config.algorithm.kl_stop:
                    kl = torch.tensor(kl, device=device)
                    if ranks > 1:
                        dist.all_reduce(kl)
                    if float(kl[0]) > config.algorithm.kl_stop * float(kl[1]):
                        spared += streamer.stop()
                kl = [0.0, 0.0]
        if not streamer.done:
            continue

        # The batch is trained: publish it, which also frees its slots, and report.
        version = streamer.finish_batch()
        sums["skipped"] = float(sum(rows[slot] for slot in spared))
        rows = {}
        spared = []
        if ranks > 1:
            totals = torch.tensor([sums[n] for n in names], dtype=torch.float64)
            highest = torch.tensor([maxima[n] for n in MAXIMA], dtype=torch.float64)
            on = "cpu" if device == "cpu" else device
            totals = totals.to(on)
            highest = highest.to(on)
            dist.all_reduce(totals)
            dist.all_reduce(highest, dist.ReduceOp.MAX)
            sums = dict(zip(names, totals.tolist(), strict=True))
            maxima = dict(zip(MAXIMA, highest.tolist(), strict=True))
        if algorithm == "ppo":  # GRPO's are scaled within their groups
            scale.update(sums["advantage_square"], actor.batch * segment, version == 1)
        if proximal:
            proximal.begin_batch()
        publish()
        now = time.monotonic()
        if rank == 0:
            if version % config.train.checkpoint_every == 0 or version == config.train.iterations:
                save()
            report.send(
                iteration_metrics(
                    sums, maxima, version, now - begun, config, norms, streamer.waiting, spec.tasks
                )
            )
        sums = dict.fromkeys(names, 0.0)
        maxima = dict.fromkeys(MAXIMA, 0.0)
        norms = [0.0, 0.0, 0.0]
        begun = now
        updated = False
        if device != "cpu":
            meter.set("gpu_memory_gb", torch.cuda.max_memory_allocated() / 1e9)
    if ranks > 1:
        dist.barrier()  # no rank leaves while another still needs it
        dist.destroy_process_group()
    if rank == 0:
        report.send({"done": version})


def iteration_metrics(
    sums: dict,
    maxima: dict,
    version: int,
    seconds: float,
    config: Config,
    norms: list[float],
    waiting: int,
    tasks: tuple[str, ...],
) -> dict:
    """What the actor knows of an iteration, under the names of the run folder's interface."""
    actor = config.actor
    # chunk steps over all epochs, and in the first
    n = max(1.0, sums["samples"])
    once = max(1.0, sums["trained_once"])
    # The mean over tasks: trajectories have a fixed length, so pooled episodes would count the
    # quick tasks more often.
    rates = {
        f"success_{task}": sums[f"successes_{i}"] / sums[f"episodes_{i}"]
        for i, task in enumerate(tasks)
        if sums[f"episodes_{i}"]
    }
    line = {
        "iteration": version,
        "version": version,
        "samples_per_s": once / seconds,
        "trajectories_per_task": {
            task: int(sums[f"trajectories_{i}"]) for i, task in enumerate(tasks)
        },
        "episodes": int(sum(sums[f"episodes_{i}"] for i in range(len(tasks)))),
        "success_rate": sum(rates.values()) / len(rates) if rates else None,
        "reward": sums["reward"] / actor.batch,
        "loss_policy": sums["loss_policy"] / n,
        "loss_value": sums["loss_value"] / n,
        "entropy_or_noise": sums["entropy_or_noise"] / n if sums["entropy_or_noise"] else None,
        "approx_kl": sums["approx_kl"] / n,
        "clip_fraction": sums["clip_fraction"] / n,
        "ratio_max": maxima["ratio_max"],
        "grad_norm": norms[0],
        "grad_norm_policy": norms[1],
        "grad_norm_value": norms[2],
        "lr": actor.lr * schedule(version - 1, config),
        "staleness_mean": sums["staleness"] / n,
        "staleness_max": int(maxima["staleness_max"]),
        "staleness_hist": {
            name: int(sums[f"samples_at_{name}"])
            for name in STALENESS
            if sums[f"samples_at_{name}"]
        },
        "masked": int(sums["masked"]),
        "masked_fraction": sums["masked"] / n,
        "reuse": sums["samples"] / once,
        "queue_depths": {"finished": waiting},
        "filtered_fraction": sums["filtered"] / (sums["filtered"] + once),
        "trained": int(sums["samples"]),
        "filtered": int(sums["filtered"]),
        "skipped": int(sums["skipped"]),
        "trained_once": int(sums["trained_once"]),
        "discarded_by": {reason: int(sums[reason]) for reason in metrics.REASONS if reason in sums},
    } | rates
    if config.train.algorithm == "ppo":
        line["explained_variance"] = explained_variance(*(sums[name] for name in ERRORS), once)
    for name in STALENESS:
        if count := sums[f"samples_at_{name}"]:
            line |= {
                f"kl_at_{name}": sums[f"kl_at_{name}"] / count,
                f"ratio_at_{name}": sums[f"ratio_at_{name}"] / count,
            }
    return line
