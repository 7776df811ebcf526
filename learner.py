"""What the actor computes: the loss of one micro-batch, one optimizer step, the end of one batch.

PPO or GRPO is the affair of `algorithms.Algorithm`: this file asks it for advantages and a loss.
Which trajectories make a micro-batch is decided in streamer.py; who else trains is in ranks.py.
"""

import math
from collections import deque
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import algorithms
import models
import transfers
from algorithms import Samples, Targets, by_staleness, interpolated_proximal, units
from config import Config
from epochs import ExactProximal, Kept
from gradients import Gradients
from models import checkpoint, contract, layers
from ranks import Ranks
from rows import START, Rows, cut, drawn, joined
from saving import Snapshot
from scheduler import Admission
from streamer import MicroBatch
from tally import Tally

# Slot fields that every loss is computed from, on the host.
COMMON = ("task", "length", "reward", "value", "success", "terminated", "truncated")
COMMON += ("logprob", "version")


class Learner:
    """The model in training, its optimizer, and what is known of the running batch."""

    def __init__(self, config: Config, spec, device: str, ranks: Ranks, resume: dict | None):
        """resume: state.json of the checkpoint that training goes on from, or None."""
        self.config = config
        self.spec = spec
        self.device = device
        self.ranks = ranks
        torch.manual_seed(config.train.seed)
        # Ranks that share the weights bring them to their devices block by block.
        self.model = models.build(config, spec, "cpu" if ranks.sharded else device, "training")
        self.idle = idle_weights(config, spec, self.model) if ranks.first else {}
        self.trainable = self.model.trainable()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in self.trainable)
        ranks.check_alike(self.model)
        # What a frozen VLM makes of a frame is kept for later epochs (--cache-prefix gpu).
        keeps = config.actor.cache_prefix == "gpu" and config.actor.update_epochs > 1
        ranks.spread(self.model, ("evaluate", "look_once") if keeps else ("evaluate",))
        self.trainable = self.model.trainable()
        self.parameters = list(self.trainable.values())
        critic = self.model.critic()
        self.critic = list(critic.values())
        self.policy = [p for name, p in self.trainable.items() if name not in critic]
        self.numbered = [*self.policy, *self.critic]  # as the optimizer counts them
        self.optimizer = torch.optim.AdamW(
            [
                {"params": self.policy, "lr": config.actor.lr},
                {"params": self.critic, "lr": config.actor.value_lr},
            ],
            betas=(0.9, 0.95),
            weight_decay=config.actor.weight_decay,
            fused=device != "cpu",
        )
        # With --shard FSDP2 sums within a node, and twins over nodes.
        sums = not ranks.sharded or ranks.twins is not None
        self.gradients = Gradients(self.parameters, ranks) if sums else None
        self.algorithm = algorithms.load(config, spec)
        # Names of the slot fields that are read on the host, and of those that go to the device.
        self.host_fields = tuple(dict.fromkeys((*COMMON, *self.algorithm.slot_fields(config))))
        self.device_fields = tuple(
            n for n in self.model.training_fields() if n not in self.host_fields
        )
        self.fields = self.host_fields + self.device_fields
        self.step_fields = [name for name in self.fields if name not in ("task", "length")]
        self.sample: dict[str, Tensor] = {}  # a row [1, …] for passes of no weight (--shard)
        self.proximal: ExactProximal | None = None
        if config.exact_proximal:
            self.proximal = ExactProximal(self.model, [ranks.part(p) for p in self.parameters])
        self.prefixes = Kept() if keeps else None
        if config.actor.checkpointing == "on":
            layers.recompute_blocks(self.model)
        self.version = 0
        if resume is not None:
            self.load(resume)
        # Weights of the newest versions, of which the oldest acts (--extra-staleness).
        held_back = config.actor.extra_staleness
        self.newest_weights: deque[dict[str, Tensor]] = deque(maxlen=held_back + 1)
        self.begin_batch()

    def begin_batch(self) -> None:
        self.tally = Tally()
        self.rows: Rows | None = None  # of the running minibatch, not yet enough for a pass
        self.updates = 0  # optimizer steps by which the weights are past those of `version`
        self.before_updates: tuple[dict[str, Tensor], dict] | None = None  # `on_host`
        self.kl_samples = 0  # of the running minibatch
        self.steps: dict[int, int] = {}  # chunk steps trained of each slot, in one epoch
        self.spared: list[int] = []  # slots whose later epochs --kl-stop left out, once for each

    def train(self, data: dict[str, Tensor], micro: MicroBatch) -> None:
        """Runs forward and backward over --micro-batch chunk steps at once; gradients accumulate
        until `step`.

        data: of the micro-batch's trajectories [n, T or T + 1, …], `host_fields` on the host and
        `device_fields` on the device. It is emptied, for the memory."""
        # Compute advantages of whole trajectories, and choose the chunk steps to train on.
        self.tally.first_epoch = micro.epoch == 0
        played = torch.arange(self.config.env.segment) < data["length"][:, None]
        targets = self.algorithm.targets(data, played)
        chosen = self.chosen(targets.kept, micro.slots)
        self.tally_trajectories(data, played, targets, chosen)
        self.steps |= dict(zip(micro.slots, chosen.sum(1).tolist(), strict=True))

        # With --shard, keep a row for passes that have none of their own (`train_nothing`).
        if self.ranks.sharded and not self.sample:
            first = torch.zeros(1, dtype=torch.long)
            self.sample = {name: self.picked(data[name], first) for name in self.step_fields}

        # Add these chunk steps to those left over, and agree on how many passes they make. The last
        # ones of a minibatch make a smaller pass.
        self.rows = joined(self.rows, self.rows_of(data, targets, chosen, micro.slots))
        data.clear()
        most = self.config.actor.micro_batch
        whole, left = divmod(len(self.rows.places), most)
        count = whole + (micro.last and left > 0)
        passes = self.ranks.plan(count)
        if passes is None:  # all are to stop
            return

        # Run the passes. What is left over waits for the next micro-batch.
        for number in range(count):
            if micro.last and number == count - 1 and self.ranks.several and not self.ranks.sharded:
                self.gradients.expect()
            self.train_rows(cut(self.rows, slice(most)), micro.minibatch_size)
            self.rows = cut(self.rows, slice(most, None))
        if not self.rows.places:
            self.rows = None
        self.train_nothing(passes - count)
        self.tally.send()

    def chosen(self, kept: Tensor, slots: tuple[int, ...]) -> Tensor:
        """Returns which chunk steps of the trajectories in these slots are trained on [n, T]: those
        that the loss has kept, or of them --chunk-share.

        A draw is named by seed, version and the trajectory's place in the batch of all nodes: the
        same in every epoch, so that what the first one has computed serves the others."""
        share = self.config.actor.chunk_share
        if share == 1.0:
            return kept
        admission = Admission.of(self.config)
        seed = self.config.train.seed
        places = (admission.world(slot % admission.batch) for slot in slots)
        return drawn(kept, [(seed, place, self.version, START) for place in places], share)

    def rows_of(
        self, data: dict[str, Tensor], targets: Targets, chosen: Tensor, slots: tuple[int, ...]
    ) -> Rows:
        """Returns the chosen chunk steps [n, T] of the trajectories, on the device."""
        index = chosen.flatten().nonzero()[:, 0]
        segment = self.config.env.segment
        return Rows(
            [(slots[i // segment], i % segment) for i in index.tolist()],
            {name: self.picked(data[name], index) for name in self.step_fields},
            self.picked(targets.advantages, index),
            None if targets.returns is None else self.picked(targets.returns, index),
        )

    def picked(self, values: Tensor, index: Tensor) -> Tensor:
        """Returns values [n, T or T + 1, …] of m chunk steps [m, …], on the device.

        index: in ascending order, which of the n·T they are [m], on the host."""
        steps = values[:, : self.config.env.segment].flatten(0, 1)
        if len(index) < len(steps):  # of all, nothing need be copied
            index = index if steps.is_cpu else transfers.send(index, self.device)
            steps = steps.index_select(0, index)
        return transfers.send(steps, self.device)

    def train_rows(self, rows: Rows, trajectories: int) -> None:
        """Runs one forward and backward pass.

        trajectories: of the whole minibatch on all nodes. Their chunk steps, trained on or not,
        divide the loss, so that it depends neither on how the minibatch is cut nor on outcomes. So
        does --chunk-share, the probability with which each of them was drawn: the gradient's mean
        over draws is that of all (Horvitz and Thompson 1952)."""
        # What the slots hold of the rows, and what the policy says of them now.
        stored = rows.stored
        if self.prefixes:
            stored |= self.prefixes.of(rows.places, partial(self.model.look_once, stored))
        if self.ranks.sharded:
            self.sample = {name: x[:1].clone() for name, x in stored.items()}
        out = self.model.evaluate(stored)
        contract.check_evaluated(out, stored["logprob"])
        granularity = self.config.algorithm.granularity
        new = units(out["logprob"], granularity)
        old = units(stored["logprob"], granularity)
        staleness = (self.version - stored["version"]).to(torch.float32)
        proximal = self.proximal_logprob(stored, out["logprob"], new, old, staleness, rows.places)

        # The loss.
        advantages = self.algorithm.scale(rows.advantages)
        samples = Samples(new, old, proximal, advantages, out["value"], rows.returns, stored)
        loss, numbers = self.algorithm.loss(samples)
        due = trajectories * self.config.env.segment * self.config.actor.chunk_share
        (loss / due).backward()
        self.tally_samples(samples, staleness, numbers, out.get("entropy"))

    def train_nothing(self, passes: int) -> None:
        """Makes passes of no weight, while other ranks that share the weights have rows left."""
        for _ in range(passes):
            # In the first epoch compute what later epochs reuse, as the other ranks do.
            first = self.tally.first_epoch
            if self.prefixes and first:
                row = {name: self.sample[name] for name in self.step_fields}
                self.sample |= self.model.look_once(row)
            out = self.model.evaluate(self.sample)
            if self.proximal and first:
                self.proximal.under_first_weights(self.sample, out["logprob"])

            # The loss compares the weights with themselves: its ratio is 1, so it is finite.
            new = units(out["logprob"], self.config.algorithm.granularity)
            old = new.detach()
            value = out["value"]
            returns = value.detach() if self.algorithm.critic else None
            nothing = torch.zeros_like(self.sample["reward"])
            samples = Samples(new, old, old, nothing, value, returns, self.sample)
            (0.0 * self.algorithm.loss(samples)[0]).backward()

    def proximal_logprob(self, stored, logprob, new, old, staleness, places) -> Tensor:
        """Returns the proximal log-probs [m, U] of decoupled PPO (AReaL, arXiv 2505.24298).

        stored: slot fields [m, …]; logprob [m, C, A]: of the policy that is trained; new, old
        [m, U]: of the policy that is trained and of the one that acted; staleness [m], versions;
        places: slot and row of each chunk step."""
        if self.config.algorithm.proximal == "behaviour":
            return old
        if self.proximal is None:
            stale = interpolated_proximal(new, old, staleness)
            first = old if self.updates else new.detach()
        else:
            exact = self.proximal.of(stored, logprob, places)
            stale = first = units(exact, self.config.algorithm.granularity)
        # In bfloat16 inference and training round differently, although their weights are the same.
        # So training's own log-prob is the proximal one, where it is known under the weights that
        # acted: the behaviour weight has the difference, and the ratio has none.
        fresh = first if self.config.train.precision == "bfloat16" else old
        return torch.where(staleness[:, None] > 0, stale, fresh)

    def tally_trajectories(
        self, data: dict, played: Tensor, targets: Targets, chosen: Tensor
    ) -> None:
        """Counts what is a fact of the trajectories, whatever the loss makes of them, and how many
        of their chunk steps are trained on."""
        add = self.tally.add
        add("reward_sum", (data["reward"] * played).sum(), "part", per="batch")
        add("advantage_square", targets.advantages.square().sum(), "part", per="batch")
        add("filtered", (played & ~targets.kept).sum(), per="batch")
        add("undrawn", (targets.kept & ~chosen).sum(), "part", per="batch")
        add("trained_once", chosen.sum(), per="batch")
        add("trained", chosen.sum())
        ended = (data["terminated"] | data["truncated"]) & played
        won = data["success"] & played
        for task in data["task"].unique().tolist():
            mine = data["task"] == task
            add(f"trajectories_{task}", mine.sum(), "part", per="batch")
            add(f"episodes_{task}", ended[mine].sum(), "part", per="batch")
            add(f"successes_{task}", won[mine].sum(), "part", per="batch")

    def tally_samples(self, samples: Samples, staleness, numbers: dict, entropy) -> None:
        """Counts what the loss said, how far the policy has moved, and how good the critic was."""
        add = self.tally.add
        for name, value in numbers.items():
            if value.dim() == 0:
                add(name, value, "mean")
            else:
                for i, part in enumerate(value):
                    add(f"{name}_{i}", part, "part")
        if entropy is not None:
            add("entropy_or_noise", entropy.detach() * len(staleness), "mean")
        add("staleness_mean", staleness.sum(), "mean")
        add("staleness_max", staleness.max(), "max")
        distance = by_staleness(samples.new, samples.old, staleness)
        if self.config.algorithm.kl_stop:
            add("kl_of_minibatch", distance["approx_kl"], "part")
        self.kl_samples += len(staleness)
        add("approx_kl", distance.pop("approx_kl"), "mean")
        add("ratio_max", distance.pop("ratio_max"), "max")
        for name, value in distance.items():
            add(name, value, "part")
        if samples.returns is not None:
            error = samples.returns - samples.stored["value"]
            add("returns", samples.returns.sum(), "part", per="batch")
            add("returns_square", samples.returns.square().sum(), "part", per="batch")
            add("error", error.sum(), "part", per="batch")
            add("error_square", error.square().sum(), "part", per="batch")

    def step(self) -> None:
        """Ends a minibatch: clips the gradients, which must be summed over ranks, and steps."""
        # While --critic-warmup lasts the policy rests: without gradients the optimizer skips it,
        # weight decay included.
        actor = self.config.actor
        resting = self.policy if self.version < self.config.algorithm.critic_warmup else []
        hidden = [parameter.grad for parameter in resting]
        for parameter in resting:
            parameter.grad = None

        # Measure the gradients, and clip them.
        self.tally.add("grad_norm_policy", self.norm_of(self.policy), "max")
        self.tally.add("grad_norm_value", self.norm_of(self.critic), "max")
        length = self.norm_of(self.parameters)
        torch.nn.utils.clip_grads_with_norm_(self.parameters, actor.grad_clip, length)
        norm = float(length)
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the gradient of version {self.version} is {norm}: lower --lr"
            )
        self.tally.add("grad_norm", norm, "max")

        # Set the learning rates, and step.
        factor = schedule(self.version, self.config)
        self.optimizer.param_groups[0]["lr"] = actor.lr * factor
        self.optimizer.param_groups[1]["lr"] = actor.value_lr * factor
        if norm > 0.0:  # else every group was filtered, and weight decay alone teaches nothing
            if self.proximal:
                self.proximal.keep_weights()
            # A batch of one step alone is never left unfinished.
            if not self.updates and actor.steps > 1 and self.ranks.saves:
                self.before_updates = self.on_host()
            self.optimizer.step()
            self.updates += 1

        # Give the resting weights their gradient buffers back, and clear all of them.
        for parameter, gradient in zip(resting, hidden, strict=True):
            parameter.grad = gradient
        self.optimizer.zero_grad(set_to_none=False)

    def norm_of(self, parameters: list[Tensor]) -> Tensor:
        """Returns the norm [] of their gradients."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        return self.ranks.whole(torch.nn.utils.get_total_norm(gradients))

    def on_host(self) -> tuple[dict[str, Tensor], dict]:
        """Copies what this rank holds of weights and optimizer: 12 bytes for each trained weight
        (float32)."""
        part = self.ranks.part
        state = self.optimizer.state_dict()
        moments = state["state"]
        tensors = {name: part(p.detach()) for name, p in self.trainable.items()}
        tensors |= {(i, name): part(x) for i, one in moments.items() for name, x in one.items()}
        copied = transfers.copy_to_host(tensors, self.device)
        state["state"] = {i: {name: copied[i, name] for name in one} for i, one in moments.items()}
        return {name: copied[name] for name in self.trainable}, state

    def moved_too_far(self) -> bool:
        """Whether the minibatch's KL from the policy that acted is above --kl-stop, on all
        ranks."""
        limit = self.config.algorithm.kl_stop
        samples = self.kl_samples
        self.kl_samples = 0
        if not limit:
            return False
        self.tally.resolve()
        total, samples = self.ranks.sum([self.tally.values.pop("kl_of_minibatch", 0.0), samples])
        return total > limit * samples

    def finish_batch(self) -> dict:
        """Ends version v and begins v + 1. Returns its part of a line of metrics.jsonl.

        Ranks meet here: all are through with the batch's slots, which publishing frees."""
        self.tally.add("skipped", sum(self.steps[slot] for slot in self.spared))
        if self.gradients:
            for name, amount in self.gradients.totals.items():
                self.tally.add(name, amount, "min")
            self.gradients.totals.clear()
        self.tally.resolve()
        tally = self.ranks.combine(self.tally)
        self.version += 1
        self.algorithm.finish_batch(tally.values, first=self.version == 1)
        for kept in filter(None, (self.proximal, self.prefixes)):
            kept.begin_batch()
        line = tally.line(self.version, self.config, self.spec.tasks)
        line["lr"] = self.config.actor.lr * schedule(self.version - 1, self.config)
        self.begin_batch()
        return line

    def weights_that_act(self) -> Mapping[str, Tensor]:
        """Returns those of this version; with --extra-staleness the oldest that are kept. Raises
        FloatingPointError where those of this version are broken."""
        self.check_finite(self.trainable)
        if not self.config.actor.extra_staleness:
            return self.ranks.gathered(self.trainable)
        copied = {name: p.detach().clone() for name, p in self.trainable.items()}
        self.newest_weights.append(copied)
        return self.ranks.gathered(self.newest_weights[0])

    def check_finite(self, weights: dict[str, Tensor]) -> None:
        """Raises FloatingPointError where weights that are to be published or saved are broken."""
        parts = {name: self.ranks.part(tensor) for name, tensor in weights.items()}
        if name := checkpoint.not_finite(parts):
            found = f"the weights of version {self.version} are not finite: tensor {name!r}"
            raise FloatingPointError(f"{found} holds NaN or infinity; lower --lr")

    def should_save(self) -> bool:
        train = self.config.train
        return self.version % train.checkpoint_every == 0 or self.version == train.iterations

    def snapshot(self, lines: list[dict]) -> Snapshot | None:
        """Returns what a checkpoint of `version` holds, without the updates of the running batch,
        on the host. Frozen weights do not change: they are not copied. Ranks that share the weights
        gather them on the first one's host, and the others get None. Raises FloatingPointError
        where a weight is not finite.

        lines: the newest of metrics.jsonl, which may not have been written when a run is killed."""
        trained, optimizer = self.before_updates or self.on_host()
        self.check_finite(dict(self.model.named_parameters()) | self.idle | trained)
        now = self.model.state_dict()
        weights = self.ranks.on_first(now | trained, now) | self.idle
        memory = {}
        for number, one in optimizer["state"].items():
            like = dict.fromkeys(one, self.numbered[number])
            memory[number] = self.ranks.on_first(one, like)
        if not self.ranks.first:
            return None
        state = {
            "version": self.version,
            "seed": self.config.train.seed,  # it names all randomness: no generator has a state
            "settings": {
                "env": self.config.train.env,
                "tasks": list(self.config.train.tasks),
                "train_vlm": self.config.actor.train_vlm,
                "oft_train": self.config.actor.oft_train,
                "lora_rank": self.config.actor.lora_rank,
                "lora_alpha": self.config.actor.lora_alpha,
                "lora_targets": list(self.config.actor.lora_targets),
                "noise": self.config.rollout.noise,
                "train_states": self.config.env.train_states,
                "eval_states": self.config.env.eval_states,
            },
            "scale": self.algorithm.state(),  # the key is of when losses kept nothing else
            "lines": lines,
        }
        return Snapshot(self.model.header, weights, optimizer | {"state": memory}, state)

    def load(self, resume: dict) -> None:
        """Continues from a checkpoint of this run. Raises UserError if optimizer.pt is
        unreadable."""
        self.version = resume["version"]
        self.algorithm.load(resume["scale"])
        saved = Path(self.config.train.checkpoint) / "optimizer.pt"
        state = self.ranks.read_optimizer(saved, self.numbered)
        groups = self.optimizer.state_dict()["param_groups"]  # a flag given on resuming counts
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


def idle_weights(config: Config, spec, model) -> dict[str, Tensor]:
    """Returns the weights that training has no use for, to be saved with the others: a frozen VLM
    stays in the host's memory."""
    if not model.idle():
        return {}
    whole = models.build(config, spec, weights="idle").state_dict()
    return {name: tensor for name, tensor in whole.items() if name.startswith(model.idle())}


def schedule(version: int, config: Config) -> float:
    """Returns the factor of the learning rates while batch `version` is trained: warm-up, 1, then
    with `anneal` a fall to 0 in the second half.

    A fall over the whole run (CleanRL's anneal_lr) ended 5 points lower after as many iterations.
    """
    factor = min(1.0, (version + 1) / (config.actor.warmup + 1))
    if config.actor.anneal:
        factor *= min(1.0, 2.0 * (1.0 - version / config.train.iterations))
    return factor
