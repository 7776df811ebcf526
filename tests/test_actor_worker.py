"""Marks of finished trajectories, accounts of lost chunk steps, and the actor's whole loop."""

import copy
import errno
import json
import os
import threading
import time
from multiprocessing import Pipe, get_context
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import actor_worker
import metrics
import models
import saving
from actor_worker import Inbox, group_outcomes, publish, run
from channel import WAKE, Channels, Counters, IndexQueue, Record, SlotPool
from config import Config, RunConfig
from envs import EnvSpec
from errors import UserError
from follow import Follower
from metrics import Ledger
from models import checkpoint
from nodes import Nodes
from ranks import Meeting, Ranks
from report import flatten
from run_folder import RunFolder, lines_until
from scheduler import Admission
from streamer import MicroBatch, Streamer
from tally import Tally
from transfers import Carrier
from weights import WeightPlane

SEGMENT = 3
SPEC = EnvSpec(("push", "reach"), ("push it", "reach it"), 1, 16, 4, 4, 60)
FIELDS = {
    "task": ((), torch.int32),
    "length": ((), torch.int32),
    "done": ((), torch.int64),
    "collected": ((), torch.int64),
    "reward": ((SEGMENT,), torch.float64),
    "value": ((SEGMENT + 1,), torch.float64),
    "success": ((SEGMENT,), torch.bool),
    "terminated": ((SEGMENT,), torch.bool),
    "truncated": ((SEGMENT,), torch.bool),
    "logprob": ((SEGMENT, 1, 2), torch.float64),
    "version": ((SEGMENT,), torch.int32),
    "seen": ((SEGMENT, 6), torch.float64),
}


def settings(width: int = 1, group: int = 0, ranks: int = 1) -> Config:
    """Eight envs; a batch is two trajectories of each, and slots hold two batches."""
    config = Config()
    config.env.envs = 8
    config.env.env_workers = 2
    config.env.lanes = 8 // (2 * width) if width > 1 else 0
    config.env.segment = SEGMENT
    config.rollout.rollout_workers = 1
    config.actor.actor_workers = ranks
    config.actor.batch = 16
    config.actor.minibatch = 8
    config.actor.micro_batch = 2 * config.env.segment
    config.actor.update_epochs = 1
    config.train.iterations = 2
    if group:
        config.train.algorithm = "grpo"
        config.algorithm.group_size = group
    return config


def twin(queue: IndexQueue) -> IndexQueue:
    """The queue as another process has it."""
    other = IndexQueue.__new__(IndexQueue)
    other.reader = os.dup(queue.reader)
    other.writer = os.dup(queue.writer)
    return other


class World:
    """The channels, an inbox of every rank, and what env workers do."""

    def __init__(self, spec: EnvSpec = SPEC, **which):
        self.config = settings(**which)
        self.admission = Admission.of(self.config)
        pool = SlotPool(FIELDS, self.admission.slots)
        plane = WeightPlane({"w": ((1,), torch.float32)})
        self.channels = Channels.create(self.config, pool, plane, Counters(1, ("a",)))
        self.arrays = pool.arrays
        self.queues = [twin(queue) for queue in self.channels.finished]
        self.spec = spec
        self.inboxes = []

    def start(self, rank: int = 0) -> Inbox:
        streamer = Streamer.of(self.config, rank, 0)
        fields = ("reward", "length")
        carrier = Carrier(self.channels.pool, (), SEGMENT, "cpu")
        inbox = Inbox(rank, self.config, self.spec, self.channels, streamer, fields, carrier)
        self.inboxes.append(inbox)
        return inbox

    def step(self, env: int, trajectory: int, steps: int = SEGMENT) -> slice:
        """Plays chunk steps of a trajectory of the lane that begins with this env."""
        first = self.admission.slot(env, trajectory)
        slots = slice(first, first + self.admission.width)
        self.arrays["collected"][slots] += steps
        return slots

    def mark(self, env: int, trajectory: int, lengths: int | list[int] = SEGMENT) -> Record:
        """Marks it as done, as `shard.Shard.finish` does, and does not wake anybody."""
        first = self.admission.slot(env, trajectory)
        self.arrays["length"][first : first + self.admission.width] = lengths
        self.arrays["done"][first] = trajectory + 1
        return Record(first, 0, WAKE, 0, 0)

    def wake(self, record: Record) -> None:
        owner = self.admission.owner(record.slot, len(self.queues))
        self.queues[owner].put([record])

    def finish(self, env: int, trajectory: int, steps=SEGMENT, lengths=SEGMENT) -> None:
        self.step(env, trajectory, steps)
        self.wake(self.mark(env, trajectory, lengths))


def lost(inbox: Inbox) -> dict[str, float]:
    tally = Tally()
    inbox.settle(tally)
    return tally.values


def arrived(inbox: Inbox) -> list[int]:
    return sorted(inbox.streamer.finished)


# ---------------------------------------------------------------- marks and wakes


def test_a_mark_counts_and_a_record_only_wakes():
    world = World()
    inbox = world.start()
    world.wake(Record(3, 0, WAKE, 0, 0))
    inbox.receive(0.0)
    assert arrived(inbox) == []  # a record, and no mark
    world.step(3, 0)
    world.wake(world.mark(3, 0))
    inbox.receive(0.0)
    assert arrived(inbox) == [3]


def test_a_wake_that_is_lost_is_made_up_for_at_the_next_look():
    world = World()
    inbox = world.start()
    world.step(3, 0)
    world.mark(3, 0)  # its worker is killed before it wakes anybody
    inbox.receive(0.0)
    assert arrived(inbox) == []  # nobody was woken: it costs nothing to find that out
    inbox.receive(0.05)  # but who has waited looks anyway
    assert arrived(inbox) == [3]
    world.step(4, 0)
    world.mark(4, 0)
    world.finish(6, 1)
    inbox.receive(0.0)  # and so does whom another lane has woken
    assert arrived(inbox) == [3, 4, 14]


def test_a_wake_that_comes_twice_changes_nothing():
    world = World()
    inbox = world.start()
    world.finish(3, 0)
    inbox.receive(0.0)
    for _ in range(2):  # by its worker's successor
        world.wake(Record(3, 0, WAKE, 0, 1))
        inbox.receive(0.0)
    assert arrived(inbox) == [3] and lost(inbox) == {"restart": 0, "after_end": 0}


def test_what_was_finished_before_this_rank_was_ready_is_not_lost():
    """The first rank publishes as soon as it is ready, and quick lanes finish before others are."""
    world = World(ranks=2)
    world.start(0)
    world.finish(1, 0, steps=SEGMENT + 2)
    late = world.start(1)
    late.receive(0.0)
    assert arrived(late) == [1] and lost(late)["restart"] == 2


def test_slots_come_round_again():
    """Batches 0 and 2 share slots: the later trajectory's mark is higher."""
    world = World()
    inbox = world.start()
    for batch in range(4):
        for trajectory in (2 * batch, 2 * batch + 1):
            for env in range(8):
                world.finish(env, trajectory)
        inbox.receive(0.0)
        first = batch % 2 * 16
        assert arrived(inbox) == list(range(first, first + 16))
        while inbox.streamer.next() is not None:
            pass
        assert inbox.streamer.finish_batch() == batch + 1
    assert lost(inbox) == {"restart": 0, "after_end": 0}


@pytest.mark.parametrize("which", [{}, {"width": 2}, {"group": 4}, {"width": 2, "group": 4}])
def test_every_rank_takes_its_own_lanes_and_groups_and_no_others(which):
    world = World(ranks=2, **which)
    inboxes = [world.start(rank) for rank in range(2)]
    for env in range(0, 8, world.admission.width):
        for trajectory in (0, 1):
            world.finish(env, trajectory)
    for inbox in inboxes:
        inbox.receive(0.0)
    found = [arrived(inbox) for inbox in inboxes]
    assert sorted(found[0] + found[1]) == list(range(16))
    whole = world.admission.whole
    assert [slot // whole % 2 for slot in found[0]] == [0] * 8
    assert [slot // whole % 2 for slot in found[1]] == [1] * 8


# ---------------------------------------------------------------- accounts


def test_chunk_steps_lost_with_a_worker_are_accounted_for_lane_by_lane():
    world = World()
    inbox = world.start()
    world.step(3, 0, 2)  # its worker dies after two chunk steps, and its successor begins anew
    world.step(3, 0, 1)  # and that one too
    world.step(4, 0, 2)  # this one has not come back yet: nothing is known of it
    world.finish(3, 0)
    world.finish(5, 0)
    inbox.receive(0.0)
    assert lost(inbox) == {"restart": 3, "after_end": 0}
    assert lost(inbox) == {"restart": 0, "after_end": 0}  # each of them once
    world.finish(4, 0)
    inbox.receive(0.0)
    assert lost(inbox) == {"restart": 2, "after_end": 0}


def test_chunk_steps_after_an_episode_s_end_are_accounted_for():
    """The envs of a lane step together until the last episode has ended."""
    world = World(width=2, group=4)
    inbox = world.start()
    world.step(2, 0, 1)  # two envs step once, and their worker dies
    world.finish(2, 0, steps=3, lengths=[1, 3])
    world.finish(4, 0, steps=2, lengths=[2, 2])
    inbox.receive(0.0)
    assert lost(inbox) == {"restart": 2, "after_end": 2}
    world.finish(2, 1, steps=2, lengths=[2, 1])
    inbox.receive(0.0)
    assert lost(inbox) == {"restart": 0, "after_end": 1}


def test_accounts_go_on_when_a_slot_is_used_again():
    world = World()
    inbox = world.start()
    for trajectory, steps in ((0, 1), (4, 0), (8, 2)):
        world.step(0, trajectory, steps)
        world.finish(0, trajectory)
        inbox.streamer.finished.clear()  # as if it had been trained
        inbox.receive(0.0)
        assert lost(inbox) == {"restart": steps, "after_end": 0}


# ---------------------------------------------------------------- reading


def test_groups_are_read_with_how_every_member_ended():
    world = World(group=4)
    inbox = world.start()
    world.arrays["length"][:] = SEGMENT
    world.arrays["reward"][:] = np.arange(32)[:, None]
    world.arrays["success"][[1, 6], [2, 0]] = True
    data = inbox.read(MicroBatch((1, 3, 6), 0, 0, False, 8))
    assert data["reward"][:, 0].tolist() == [1.0, 3.0, 6.0]
    first, second = [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]
    assert data["outcomes"].tolist() == [first, first, second]
    assert data["member"].tolist() == [1, 3, 2]
    assert set(World().start().read(MicroBatch((1,), 0, 0, False, 8))) == {
        "reward",
        "length",
    }


def test_outcomes_are_of_the_episode_alone():
    """What an earlier trajectory left in the rows after the end does not count; an episode that
    failed is no success."""
    pool = SlotPool(FIELDS, 4)
    pool["length"].copy_(torch.tensor([1, 3, 2, 3]))
    pool["success"][0, 1] = True  # after the end
    pool["success"][1, 2] = pool["terminated"][1, 2] = True
    pool["terminated"][2, 1] = True  # failed
    pool["reward"].copy_(torch.tensor([[1.0, 5, 5], [1, 2, 4], [0.5, -2, 9], [0, 0, 0]]))
    slots = np.array([0, 3])
    assert group_outcomes(pool, slots, 4, "success").tolist() == [[0.0, 1.0, 0.0, 0.0]] * 2
    assert group_outcomes(pool, slots, 2, "success").tolist() == [[0.0, 1.0], [0.0, 0.0]]
    assert group_outcomes(pool, slots, 4, "reward").tolist() == [[1.0, 7.0, -1.5, 0.0]] * 2


# ---------------------------------------------------------------- the whole loop


class Toy(nn.Module):
    """Log-probs (of one action of 2 numbers) and value are linear in what was seen."""

    header = checkpoint.Header("toy", {}, {})

    def __init__(self):
        super().__init__()
        self.policy = nn.Linear(6, 2).double()
        self.head = nn.Linear(6, 1).double()

    def training_fields(self):
        return ("seen",)

    def evaluate(self, batch):
        policy = self.policy(batch["seen"])[:, None]
        return {"logprob": policy, "value": self.head(batch["seen"])[:, 0]}

    def trainable(self):
        return dict(self.named_parameters())

    def critic(self):
        return dict(self.head.named_parameters(prefix="head"))

    def idle(self):
        return ()


class Actor:
    """Runs the first rank in this process, over trajectories that are all there already."""

    device = "cpu"

    def __init__(self, tmp_path, config: Config, model: Toy):
        self.folder = tmp_path
        self.meeting = Meeting(tmp_path / ".spans" / "rendezvous-0")
        (tmp_path / "checkpoints").mkdir()
        self.config = config
        self.model = model
        admission = Admission.of(config)
        self.pool = SlotPool(FIELDS, admission.slots)
        weights = {name: (tuple(p.shape), p.dtype) for name, p in model.trainable().items()}
        plane = WeightPlane(weights)
        counters = Counters(config.actor.actor_workers, metrics.columns(1))
        self.channels = Channels.create(config, self.pool, plane, counters)
        self.alive = twin(self.channels.finished[0])  # an env worker could still write
        for name in ("reward", "value", "seen", "logprob"):
            self.pool[name].copy_(torch.randn(self.pool[name].shape, dtype=torch.float64))
        self.pool["length"].fill_(SEGMENT)
        self.pool["collected"].fill_(SEGMENT)
        self.pool["truncated"][:, -1] = True
        for trajectory in range(admission.slots // config.env.envs):
            for env in range(0, config.env.envs, admission.width):
                slot = admission.slot(env, trajectory)
                self.pool["done"][slot] = trajectory + 1
                self.pool["version"][slot] = max(0, admission.batch_of(trajectory) - 1)

    def run(self) -> list[dict]:
        """What it reported to the launcher."""
        reports, report = Pipe(duplex=False)
        self.run_rank(0, report)
        return received(reports)

    def run_rank(self, rank: int, report) -> None:
        meter = metrics.Meter(f"actor-{rank}", rank, self.channels.counters, None)
        with patch.object(models, "build", return_value=self.model):
            run(
                rank,
                self.config,
                SPEC,
                self.device,
                self.channels,
                self.folder,
                self.meeting,
                None,
                report,
                meter,
            )

    def counter(self, column: str) -> float:
        return self.channels.counters.get(0, column)

    def published(self) -> dict[str, torch.Tensor]:
        """The newest weights, which must be those of the last version."""
        plane = self.channels.plane
        block = torch.zeros(plane.bytes, dtype=torch.uint8)
        assert plane.version == plane.fetch(block) == self.config.train.iterations
        return plane.tensors(block)


class Published:
    """A learner that has published a version."""

    def __init__(self, version: int):
        self.version = version

    def snapshot(self, lines):
        return saving.Snapshot(None, {}, {}, {"version": self.version})


def a_saver(folder, **train) -> saving.Saver:
    meter = metrics.Meter("actor-0", 0, Counters(1, metrics.columns(0)), None)
    return saving.Saver(folder, RunConfig(**train), Ledger([], 1), meter)


def received(reports) -> list[dict]:
    found = []
    while reports.poll():
        found.append(reports.recv())
    return found


def test_the_loop_trains_publishes_saves_and_reports_every_batch(tmp_path):
    config = settings()
    config.train.checkpoint_every = 1
    config.actor.update_epochs = 2
    model = Toy()
    actor = Actor(tmp_path, config, model)
    actor.pool["collected"][5] += 4  # once its worker was replaced
    first, second, end = actor.run()
    assert end == {"done": 2} and [line["version"] for line in (first, second)] == [1, 2]
    for line in (first, second):
        assert line["trained"] == 2 * 16 * SEGMENT
        assert line["episodes"] == 16 and line["success_rate"] == 0.0
        assert line["samples_per_s"] > 0 and line["entropy_or_noise"] is None
    assert first["queue_depths"] == {"finished": 16} and second["queue_depths"] == {"finished": 0}
    assert first["staleness_hist"] == {"0": 2 * 16 * SEGMENT}
    assert second["staleness_hist"] == {"1": 2 * 16 * SEGMENT}
    by = {"restart": 4, "filtered": 0, "undrawn": 0, "after_end": 0, "resume": 0}
    assert [line["discarded_by"] for line in (first, second)] == [by, by]
    assert [line["trained_once"] for line in (first, second)] == [16 * SEGMENT, 2 * 16 * SEGMENT]

    for name, tensor in actor.published().items():
        assert torch.equal(tensor, model.trainable()[name])
    for queue in (*actor.channels.requests, *actor.channels.replies):
        assert queue.get(0) == [Record(0, 0, WAKE, 0, 0)] * 3  # of versions 0, 1 and 2
    saved = sorted((tmp_path / "checkpoints").iterdir())
    assert [path.name for path in saved] == ["000001", "000002"]
    assert json.loads((saved[1] / "state.json").read_text())["version"] == 2
    counters = actor.channels.counters
    assert counters.get(0, "ready") == 1 and counters.get(0, "work_s") > 0


@pytest.mark.parametrize(
    "algorithm, kl_stop, uneven, shard",
    [
        ("ppo", 0.0, False, False),
        ("ppo", 1e-9, False, False),
        ("grpo", 0.0, False, False),
        ("ppo", 0.0, True, False),
        ("ppo", 1e-9, False, True),
        ("grpo", 0.0, False, True),
        ("ppo", 0.0, True, True),
    ],
)
def test_two_ranks_come_to_the_weights_and_numbers_of_one(
    tmp_path, algorithm, kl_stop, uneven, shard
):
    """The groups of GRPO's first rank all succeed in batch 0: it has no gradient, and no number of
    a sample. Later epochs are shuffled by rank, so a minibatch that is trained again is whole.

    uneven: minibatches of 6, 5 and 5 trajectories, which two ranks cannot share evenly, in passes
    of three chunk steps."""
    found = []
    for ranks in (1, 2):
        torch.manual_seed(1)
        config = settings(ranks=ranks, group=4 if algorithm == "grpo" else 0)
        config.actor.update_epochs = 2
        config.actor.minibatch = 8 if kl_stop else 16
        config.actor.lr = 0.05
        config.algorithm.kl_stop = kl_stop
        config.actor.shard = shard and ranks > 1
        if uneven:
            config.actor.update_epochs = 1
            config.actor.minibatch = 5
            config.actor.micro_batch = 3
        folder = tmp_path / str(ranks)
        (folder / ".spans").mkdir(parents=True)
        actor = Actor(folder, config, Toy())
        actor.pool["success"][0::8, -1] = True
        actor.pool["success"][4::8, -1] = actor.pool["success"][5::8, -1] = True
        if algorithm == "grpo":
            actor.pool["success"][0:4, -1] = actor.pool["success"][8:12, -1] = True
        reports, report = Pipe(duplex=False)
        begun = [w.detach().clone() for w in actor.model.parameters()]
        processes = [
            get_context("fork").Process(target=actor.run_rank, args=(rank, report))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
        found.append((received(reports), actor.published()))
    (lines, weights), (others, of_two) = found
    for name, weight in weights.items():
        torch.testing.assert_close(of_two[name], weight, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(weights["policy.weight"], begun[0], atol=1e-3)
    assert len(lines) == len(others) == 3
    for one, two in zip(lines[:2], others[:2], strict=True):
        for line in (one, two):
            del line["samples_per_s"], line["queue_depths"], line["time"]
        for name in ("reduce_bytes", "reduce_s", "reduce_wait_s"):
            two.pop(name, None)  # --shard has none
        assert flatten(two) == pytest.approx(flatten(one), rel=1e-6, abs=1e-12)
        assert (one["skipped"] > 0) == (kl_stop > 0)
    if algorithm == "grpo":
        assert [line["filtered"] for line in lines[:2]] == [8 * SEGMENT, 0]


def test_kl_stop_spares_the_other_epochs(tmp_path):
    config = settings()
    config.actor.update_epochs = 3
    config.algorithm.kl_stop = 1e-9
    actor = Actor(tmp_path, config, Toy())
    for line in actor.run()[:2]:
        assert line["trained"] == 16 * SEGMENT and line["skipped"] == 2 * 16 * SEGMENT


def test_asked_to_stop_it_saves_what_it_has_and_waits_to_be_ended(tmp_path):
    actor = Actor(tmp_path, settings(), Toy())
    actor.channels.counters.set(0, "stop", 1)
    assert run_until_saved(actor) == [{"saved": str(tmp_path / "checkpoints" / "000000")}]
    assert (tmp_path / "checkpoints" / "000000" / "model.safetensors").is_file()


def test_checkpoints_are_written_from_a_copy_with_signs_of_life_and_the_newest_are_kept(tmp_path):
    config = settings()
    config.train.checkpoint_every = 1
    config.train.keep = 1
    actor = Actor(tmp_path, config, Toy())
    write = saving.write
    work = []

    def slowly(snapshot, folder):
        if snapshot.state["version"] == 1:
            published.wait(30)  # training has gone on meanwhile
        else:
            work.append(actor.channels.counters.get(0, "work_s"))
            time.sleep(2.5)
            work.append(actor.channels.counters.get(0, "work_s"))
        write(snapshot, folder)

    published = threading.Event()
    weights = []

    class Watched(actor_worker.Learner):
        def weights_that_act(self):
            weights.append(self.model.policy.weight.detach().clone())
            if self.version == 2:
                published.set()
            return super().weights_that_act()

    with (
        patch.object(saving, "write", slowly),
        patch.object(actor_worker, "Learner", Watched),
        patch.object(saving.shutil, "rmtree", wraps=saving.shutil.rmtree) as removed,
    ):
        assert actor.run()[-1] == {"done": 2}
    assert published.is_set() and work[1] - work[0] > 0.9
    assert tmp_path / "checkpoints" / "000001" in [call.args[0] for call in removed.mock_calls]
    (newest,) = (tmp_path / "checkpoints").iterdir()
    assert newest.name == "000002"
    assert torch.equal(load_file(newest / "model.safetensors")["policy.weight"], weights[2])


def test_only_checkpoints_are_removed_for_newer_ones_and_one_that_stays_ends_nothing(tmp_path):
    folder = tmp_path / "checkpoints"
    names = ("000001", "000001-best", "000002", "1", "999999", "1000000")
    for name in names:
        (folder / name).mkdir(parents=True)
    saver = a_saver(folder, keep=1)
    removed = []

    def busy(path, ignore_errors=False):
        removed.append(path.name)
        if not ignore_errors:
            raise OSError("device or resource busy")

    with (
        patch.object(saving, "write"),
        patch.object(saving.shutil, "rmtree", busy),
    ):
        saver.run(None)
    assert removed == ["000001", "000002", "999999"]


def test_a_disk_that_hangs_is_named_once(tmp_path, capsys):
    saver = a_saver(tmp_path / "checkpoints", timeout_s=0.5)
    with patch.object(saving, "write", lambda *_: time.sleep(2.5)):
        saver.begin(Published(1))
        saver.finish()
    said = capsys.readouterr().err
    assert said.count("a checkpoint is still being written after 0 s: is ") == 1, said


@pytest.mark.parametrize("written, saved", [(0, 1), (0, 2), (1, 2), (1, 1), (2, 2), (2, 1)])
def test_a_launcher_that_dies_between_save_and_line_loses_no_line(tmp_path, written, saved):
    """It has written so many lines when it dies, and so many versions are saved."""
    config = settings()
    config.train.checkpoint_every = 1
    actor = Actor(tmp_path, config, Toy())
    actor.pool["collected"][5] += 4  # once its worker was replaced
    lines = []

    class Launcher:
        def send(self, line):
            lines.append(line)
            if len(lines) <= written:
                folder.append(line | {"cpu_fraction": 0.5})
                actor.channels.counters.set(0, "written", line["version"])

    folder = RunFolder(tmp_path, resume=True)
    actor.run_rank(0, Launcher())
    state = json.loads((tmp_path / "checkpoints" / f"{saved:06d}" / "state.json").read_text())
    kept = lines_until(tmp_path, saved, state["lines"])
    assert [line["version"] for line in kept] == list(range(1, saved + 1))
    for line, sent in zip(kept, lines, strict=False):
        assert {name: line[name] for name in sent} == json.loads(json.dumps(sent))
        assert ("cpu_fraction" in line) == (line["version"] <= written)

    # What was collected beyond the batch that is saved is played again.
    beyond = kept[-1]["collected"] - saved * 16 * SEGMENT - 4
    after = {"trained": 48, "skipped": 0, "trained_once": 48, "iteration": saved + 1}
    after |= {"discarded_by": {"restart": 0, "filtered": 0, "after_end": 0}}
    total = Ledger(kept, epochs=1).add(after | {"collected": 48})
    assert total["trained_once"] == (saved + 1) * 16 * SEGMENT
    assert total["discarded_by"] == {
        "restart": 4,
        "filtered": 0,
        "undrawn": 0,
        "after_end": 0,
        "resume": beyond,
    }
    assert total["collected"] == total["trained_once"] + total["discarded"]


def test_a_snapshot_does_not_change_with_training(tmp_path):
    actor = Actor(tmp_path, settings(), Toy())
    with patch.object(models, "build", return_value=actor.model):
        learner = actor_worker.Learner(
            actor.config, SPEC, "cpu", Ranks(0, 1, "cpu", Meeting(tmp_path)), None
        )
    snapshot = learner.snapshot([])
    before = snapshot.weights["policy.weight"].clone()
    with torch.no_grad():
        actor.model.policy.weight += 1.0
    assert torch.equal(snapshot.weights["policy.weight"], before)


def test_a_checkpoint_that_cannot_be_written_ends_the_actor(tmp_path):
    actor = Actor(tmp_path, settings(), Toy())
    full = patch.object(saving, "write", side_effect=OSError("disk full"))
    with full, pytest.raises(UserError, match="cannot write .*/000002: .*disk full"):
        actor.run()


@pytest.mark.parametrize("error", [FloatingPointError, SystemExit])
def test_what_is_being_written_is_written_whatever_ends_the_actor(tmp_path, error):
    """The launcher's word to leave, too, also if it comes while an error waits for the save."""
    config = settings()
    config.train.checkpoint_every = 1
    actor = Actor(tmp_path, config, Toy())
    write = saving.write
    waits = [SystemExit, None]

    def slowly(*arguments):
        time.sleep(1.5)
        write(*arguments)

    def interrupted(*arguments):
        if waits and (word := waits.pop(0)):
            raise word
        join(*arguments)

    class Failing(actor_worker.Learner):
        def step(self):
            if self.version == 1:
                raise error("it fails")
            super().step()

    join = threading.Thread.join
    with (
        patch.object(saving, "write", slowly),
        patch.object(threading.Thread, "join", interrupted),
        patch.object(actor_worker, "Learner", Failing),
        pytest.raises(error, match="it fails"),
    ):
        actor.run()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000001"]
    assert not waits and actor.channels.counters.get(0, "saving") == 0


def test_a_save_that_fails_does_not_hide_what_ends_the_actor(tmp_path, capsys):
    with (
        patch.object(saving, "write", side_effect=OSError("disk full")),
        pytest.raises(FloatingPointError),
        a_saver(tmp_path / "checkpoints") as saver,
    ):
        saver.begin(Published(7))
        raise FloatingPointError
    assert "000007: OSError('disk full')" in capsys.readouterr().err


class Ended(Exception):
    """In place of `wait_to_be_ended`, which waits for ever."""


def run_until_saved(actor: Actor, learner=actor_worker.Learner) -> list[dict]:
    """Runs the first rank until it has saved and waits for its end. Returns its reports."""
    reports, report = Pipe(duplex=False)
    with (
        patch.object(actor_worker, "Learner", learner),
        patch.object(actor_worker, "wait_to_be_ended", side_effect=Ended),
        pytest.raises(Ended),
    ):
        actor.run_rank(0, report)
    return received(reports)


class FullOnce:
    """A disk that is full at its first checkpoint."""

    def __init__(self):
        self.write = saving.write
        self.calls = 0

    def __call__(self, *arguments):
        self.calls += 1
        if self.calls == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.write(*arguments)


def test_a_failed_save_is_noticed_at_once_and_what_was_published_is_saved(tmp_path):
    config = settings()
    config.train.iterations = 40
    config.train.checkpoint_every = 1
    actor = Actor(tmp_path, config, Toy())
    with patch.object(saving, "write", FullOnce()):
        *lines, news = run_until_saved(actor)
    assert len(lines) == 1
    saved = tmp_path / "checkpoints" / "000001"
    trouble = f"cannot write {saved}: No space left on device"
    assert news == {"saved": str(saved), "trouble": trouble}
    assert (saved / "model.safetensors").is_file()

    # The launcher says both in one sentence.
    follower = SimpleNamespace(trouble="", advice="continue with …", nodes=Nodes())
    end = Follower.hear(follower, news)
    assert (end.message, end.status) == (f"error: {trouble}; saved {saved}; continue with …", 1)


def test_the_last_checkpoint_is_tried_again(tmp_path):
    actor = Actor(tmp_path, settings(), Toy())
    with patch.object(saving, "write", FullOnce()):
        news = actor.run()[-1]
    saved = tmp_path / "checkpoints" / "000002"
    assert (saved / "model.safetensors").is_file()
    assert news == {"done": 2, "trouble": f"cannot write {saved}: No space left on device"}


def test_a_version_that_is_being_saved_is_not_saved_again(tmp_path):
    config = settings()
    config.train.checkpoint_every = 1
    actor = Actor(tmp_path, config, Toy())
    snapshots = []

    class Stopping(actor_worker.Learner):
        def snapshot(self, lines):
            snapshots.append(self.version)
            actor.channels.counters.set(0, "stop", 2)
            return super().snapshot(lines)

    news = run_until_saved(actor, Stopping)
    assert news[-1] == {"saved": str(tmp_path / "checkpoints" / "000001")} and snapshots == [1]


@pytest.mark.parametrize("stop, version", [(1, 0), (2, 0), (2, 1)])
def test_an_interrupt_saves_what_was_published_and_a_new_ratio_waits_for_the_batch(
    tmp_path, stop, version
):
    """Asked while the first of two minibatches of a batch is stepped."""
    before = {}

    class Stopping(actor_worker.Learner):
        def step(self):
            if self.version == version and not self.updates:
                actor.channels.counters.set(0, "stop", stop)
                before["state"] = copy.deepcopy(self.optimizer.state_dict()["state"])
                before["weights"] = copy.deepcopy(self.model.state_dict())
            super().step()

    actor = Actor(tmp_path, settings(), Toy())
    news = run_until_saved(actor, Stopping)
    saved = tmp_path / "checkpoints" / f"{version + 2 - stop:06d}"
    weights = load_file(saved / "model.safetensors")
    state = torch.load(saved / "optimizer.pt", weights_only=True)["state"]
    same = all(torch.equal(weights[name], before["weights"][name]) for name in weights)
    if stop == 1:
        assert len(news) == 2 and news[1] == {"saved": str(saved)}
        assert not same and state[0]["step"] == 2
        return
    assert news[version:] == [{"saved": str(saved), "dropped": 1}]
    assert same and state.keys() == before["state"].keys() and len(state) == 4 * version
    for number, one in state.items():
        assert one.keys() == {"step", "exp_avg", "exp_avg_sq"}
        for name, tensor in one.items():
            assert torch.equal(tensor, before["state"][number][name])


@pytest.mark.parametrize("shard", [False, True])
def test_a_rank_that_waits_for_others_saves_when_it_is_told_to(tmp_path, shard):
    """The trajectories of the second rank's lanes never come."""
    (tmp_path / ".spans").mkdir()
    config = settings(ranks=2)
    config.actor.shard = shard
    actor = Actor(tmp_path, config, Toy())
    admission = Admission.of(actor.config)
    for slot in range(admission.slots):
        if admission.owner(slot, 2) == 1:
            actor.pool["done"][slot] = 0
    actor.channels.counters.set(0, "stop", 0)
    reports, report = Pipe(duplex=False)
    processes = [
        get_context("fork").Process(target=actor.run_rank, args=(rank, report), daemon=True)
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    try:
        gradient = 1 + metrics.CAUSES.index("gradient")
        deadline = time.monotonic() + 60
        while actor.counter("waiting") != gradient:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        alive = actor.counter("time")
        time.sleep(0.3)
        assert actor.counter("time") > alive
        actor.channels.counters.set(0, "stop", 2)
        assert reports.poll(10.0)
        assert reports.recv() == {"saved": str(tmp_path / "checkpoints" / "000000")}
    finally:
        for process in processes:
            process.kill()
            process.join()


def test_only_the_first_rank_publishes(tmp_path):
    class Stub:
        def __init__(self, first):
            self.ranks = type("Ranks", (), {"leads": first, "publishes": first})
            self.version = 0
            self.device = "cpu"

        def weights_that_act(self):
            return {"w": torch.full((1,), 7.0)}

    world = World()
    meter = metrics.Meter("actor-1", 0, Counters(1, metrics.columns(1)), None)
    publish(Stub(first=False), world.channels, meter)
    assert world.channels.plane.version == -1 and not world.channels.requests[0].get(0)
    publish(Stub(first=True), world.channels, meter)
    assert world.channels.plane.version == 0
    for queue in (*world.channels.requests, *world.channels.replies):
        assert queue.get(0) == [Record(0, 0, WAKE, 0, 0)]
