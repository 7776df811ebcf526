"""What all lanes of an env worker share: its simulators, the slots, and the queues."""

import math
import time
from collections import deque

import numpy as np
import torch

import envs
import models
from channel import WAKE, Channels, Record, fence, synchronize
from config import Config
from envs.lanes import Lane, make_lane
from envs.states import read_states
from metrics import Meter
from models.checkpoint import Header
from scheduler import Admission, Trajectories

SOFTWARE = ("llvmpipe", "softpipe", "swrast", "swiftshader", "osmesa")  # GL without a GPU
# Where a chunk step usually takes less time than this (seconds), the requests of several lanes are
# sent together.
GATHER_S = 1e-3


class Shard:
    """What all lanes of one worker share: slots, queues, and how observations are prepared."""

    def __init__(
        self,
        rank: int,
        config: Config,
        header: Header,
        device: str,
        channels: Channels,
        meter: Meter,
    ):
        if config.env.lanes and device != "cpu":
            torch.cuda.set_device(device)
        self.rank = rank
        self.config = config
        self.device = device
        self.meter = meter
        self.simulator = envs.load(config.train.env)
        spec = self.simulator.spec(config.train.tasks, config.env.image_size)
        self.spec = spec.seen_by(header)
        self.preparation = models.preparation(config.train.model, header, config.train.tokenizer)
        self.admission = Admission.of(config)
        self.trajectories = Trajectories.of(config)
        self.plays_episodes = self.trajectories.are_episodes  # GRPO; PPO plays segments
        self.segment = config.env.segment  # T, chunk steps
        self.width = config.env.width  # envs of a training lane

        # Slots. Where a vectorised simulator draws on the GPU, its pictures stay there.
        self.pool = channels.pool
        self.arrays = channels.pool.arrays
        self.fields = {name: self.arrays.get(name, self.pool[name]) for name in self.pool.spec}
        self.pictures_stay = "image" in self.pool.gpu
        picture = (self.spec.views, self.spec.image_size, self.spec.image_size, 3)
        self.blank = np.broadcast_to(np.uint8(0), picture)  # stands for one that stays on the GPU
        self.observed: tuple[str, ...] = ()  # the fields of an observation

        # Queues. Records carry the generations, so that nobody takes a dead worker's for another's.
        self.plane = channels.plane  # tells the published version
        self.seen_version: int | None = None  # the last one that parked lanes were asked about
        self.lanes = channels.lanes
        self.requests = channels.requests
        self.finished = channels.finished
        self.replies = channels.replies[rank]
        self.replies.close_writer()
        self.generation = meter.restarts()  # how often this worker was replaced
        self.lanes.generation[rank] = self.generation
        self.asks = self.lanes.rollout_generation.tolist()  # which generation of rollout workers
        self.awaited: dict[Record, int] = {}  # requests without an answer, and who is to answer
        self.answers: deque[Record] = deque()  # read, and not yet acted on
        self.outbox: dict[int, list[Record]] = {}  # requests to be sent, by rollout worker
        self.sent = 0.0  # monotonic seconds: when the outbox was last emptied
        self.chunk_s = 1.0  # running mean: seconds of a chunk step
        self.parked: list = []  # lanes that wait for a version

    def training_lanes(self) -> dict[int, Lane]:
        env = self.config.env
        return self.make_lanes(0, env.envs, env.width, env.train_states)

    def evaluation_lanes(self) -> dict[int, Lane]:
        """Makes lanes whose envs are numbered after all training envs."""
        env = self.config.env
        count = env.eval_envs if env.evaluates else 0
        return self.make_lanes(env.envs, count, env.eval_width, env.eval_states)

    def make_lanes(self, first: int, count: int, width: int, states: str) -> dict[int, Lane]:
        """Makes every n-th of the lanes that `count` envs from number `first` on are divided into.
        states: initial states that their episodes begin at."""
        made = {}
        for index in range(self.rank, count // width, self.config.env.env_workers):
            numbers = range(first + index * width, first + (index + 1) * width)
            made[index] = make_lane(
                self.simulator,
                self.spec,
                self.config,
                index,
                numbers,
                self.device,
                self.pictures_stay,
                read_states(states),
            )
            self.meter.alive()  # so that those of a slow simulator may take long
        return made

    def lane_of(self, record: Record) -> int:
        return self.arrays["env"].item(record.slot) // self.width

    def parked_before_this_version(self) -> list:
        """Takes the lanes that wait for a version, once for every version."""
        version = self.plane.version
        if version == self.seen_version:
            return []
        self.seen_version = version
        parked = self.parked
        self.parked = []
        return parked

    def observe(self, lane: Lane, slots: slice, row: int) -> None:
        """Draws every env of a lane, and writes what the model needs into a row of its slots."""
        with self.meter.work("render"):
            pictures = lane.observe()
            if self.pictures_stay:
                self.pool["image"][slots, row] = pictures
                synchronize(self.pool.device)  # before anybody is told that they are there
        for i, slot in enumerate(range(slots.start, slots.stop)):
            state = lane.states[i]
            if not all(map(math.isfinite, state.tolist())):  # half of the time that numpy takes
                raise FloatingPointError(f"a state of {lane.describe()} is not a number: {state}")
            prompt = lane.prompt or self.spec.prompts[lane.tasks[i]]
            picture = self.blank if self.pictures_stay else pictures[i]
            fields = self.preparation.observe(picture, state, prompt)
            for name, value in fields.items():
                if name != "image" or not self.pictures_stay:
                    self.arrays[name][slot, row] = value
        self.observed = tuple(fields)

    def name_renderer(self, lane: Lane) -> None:
        """Says what draws, and warns where it does so slowly beside GPUs."""
        name = lane.player.renderer()
        if not name:
            return
        slow = self.device != "cpu" and any(word in name.lower() for word in SOFTWARE)
        instead = (
            ", in software beside GPUs, which takes up to some hundred milliseconds a picture: "
            "install the driver's GL (libnvidia-gl), in a container with "
            "NVIDIA_DRIVER_CAPABILITIES=all"
        )
        print(
            f"{'warning: ' * slow}{self.meter.name} draws with {name}{instead * slow}", flush=True
        )

    def carry_over(self, before: slice, slots: slice) -> None:
        """Copies row T of a trajectory's slots to row 0 of the next one's."""
        for name in self.observed:
            self.fields[name][slots, 0] = self.fields[name][before, self.segment]
        if self.pictures_stay:
            synchronize(self.pool.device)

    def label(self, lane: Lane, slots: slice, trajectories: int | list[int]) -> None:
        """Writes into a lane's slots which env, trajectory and task they hold."""
        self.arrays["env"][slots] = lane.envs
        self.arrays["trajectory"][slots] = trajectories
        self.arrays["task"][slots] = lane.tasks

    def planned_actions(self, lane: Lane, slots: slice, row: int) -> list[np.ndarray]:
        """Returns what each env of a lane is to execute [C, A]."""
        # A simulator that writes into what it is given must not change what is trained on.
        actions = self.arrays["actions"][slots, row].copy()
        return [
            self.preparation.actions(a, state)
            for a, state in zip(actions, lane.states, strict=True)
        ]

    def request(self, lane: Lane, slots: slice, kind: int, t: int) -> None:
        """Puts a question for the lane's rollout worker into the outbox. The lane's first slot
        stands for the whole lane."""
        self.ask(lane.index % len(self.requests), slots.start, t, kind)

    def ask(self, worker: int, slot: int, t: int, kind: int) -> None:
        self.arrays["asked"][slot] = time.monotonic()
        record = Record(slot, t, kind, self.rank, self.generation + self.asks[worker])
        self.awaited[record] = worker
        self.outbox.setdefault(worker, []).append(record)

    def ask_again(self) -> None:
        """Asks anew, of rollout workers that were replaced, what the dead ones have not answered.

        What a dead one may have answered after all counts no more, though it be in the pipe: its
        row is written again, perhaps with other weights. So nothing is played but what stays."""
        before = self.asks
        self.asks = self.lanes.rollout_generation.tolist()
        for record, worker in list(self.awaited.items()) if self.asks != before else ():
            if self.asks[worker] != before[worker]:
                del self.awaited[record]
                self.ask(worker, record.slot, record.t, record.kind)

    def wake_rollout(self, lane: Lane) -> None:
        """Lets the lane's rollout worker see that the lane table has changed."""
        record = Record(0, 0, WAKE, self.rank, self.generation)
        self.outbox.setdefault(lane.index % len(self.requests), []).append(record)

    def send_requests(self) -> None:
        """Empties the outbox, unless more requests will follow within a moment."""
        self.ask_again()
        now = time.monotonic()
        if self.answers and self.chunk_s < GATHER_S and now - self.sent < GATHER_S:
            return
        for worker, records in self.outbox.items():
            self.requests[worker].put(records)
        self.outbox.clear()
        self.sent = now

    def next_answer(self, waiting_for: str) -> Record | None:
        """Waits up to a second. Leaves out what nobody waits for: an answer that comes twice, or
        that was meant for a worker that this one replaces, or comes from one that was replaced."""
        if not self.answers:
            with self.meter.wait(waiting_for):
                records = self.replies.get(1.0)
            for record in records:
                if record in self.awaited:
                    del self.awaited[record]
                    self.answers.append(record)
        return self.answers.popleft() if self.answers else None

    def finish(self, slots: slice, trajectory: int, lengths: int | list[int]) -> None:
        """Says that the trajectories in a lane's slots are complete, of so many chunk steps each.

        The mark in the lane's first slot is what counts; the record only wakes the actor."""
        self.arrays["length"][slots] = lengths
        fence()
        self.arrays["done"][slots.start] = trajectory + 1
        owner = self.admission.owner(slots.start, len(self.finished))
        self.finished[owner].put([Record(slots.start, 0, WAKE, self.rank, self.generation)])
