"""Evaluation while training goes on: when a round begins, who plays it, and how it ended.

`Evaluations` is the launcher's side: it opens rounds and reads their outcomes. `EvaluationLanes` is
an env worker's side: lanes of their own play without exploration, on seeds never trained on, in
slots of their own behind the training slots. Nobody waits for them before the run ends.

Both sides meet in the shared counters. The launcher writes the number of the running round; env
workers write the outcome of episode e into their column `outcome_e` as 2 · round + success, in one
store. So a replaced worker sees what is left to play, and nothing counts twice.

Of several nodes each plays its share of a round. The first one's launcher decides when a round is
due and hears how it ended; the others' are told, and hand over their shares.
"""

import math
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np

from channel import EVAL, Counters, Record
from config import Config
from envs.lanes import Lane
from films import Camera, filmed_episodes
from scheduler import env_numbers

EVAL_SEEDS = 500_000  # first of the evaluation seeds; demonstrations draw from 10⁷ up


class EvaluationLanes:
    """Plays an env worker's share of every round.

    Episode e runs on evaluation env e % n of the n that all nodes have, always in row 0 of that
    env's own slot."""

    def __init__(self, shard, lanes: dict[int, Lane], films: Path | None = None):
        """shard: the `shard.Shard` that lends slots, queues and meter; lanes: by index; films: the
        folder to leave them in, or None."""
        self.shard = shard
        self.lanes = lanes
        config = shard.config
        self.first = config.env.envs  # number of the first evaluation env
        self.share = first_episodes(config)
        self.step = config.env.eval_envs * config.train.nodes
        self.films = films
        tasks = len(shard.spec.tasks)
        self.filmed = filmed_episodes(config, self.share, tasks) if films and lanes else set()
        self.round = 0
        self.episodes = {index: [0] * len(lane.envs) for index, lane in lanes.items()}
        self.t = dict.fromkeys(lanes, 0)  # chunk steps since all envs of a lane began together
        counters = shard.meter.counters
        self.asked_round = counters.table[:1, counters.index["eval_round"]]

    def begin_round_if_asked(self) -> None:
        if self.round >= self.asked_round[0]:
            return
        self.round = int(self.asked_round[0])
        for index, lane in self.lanes.items():
            self.episodes[index] = [self.share[env - self.first] for env in lane.envs]
            self.go_on(lane, list(range(len(lane.envs))))

    def slots_of(self, lane: Lane) -> slice:
        first = self.shard.admission.slots + lane.envs[0] - self.first
        return slice(first, first + len(lane.envs))

    def on_actions(self, record: Record) -> None:
        """Steps the lane that asked, and notes how episodes ended."""
        shard = self.shard
        width = shard.config.env.eval_width
        lane = self.lanes[(record.slot - shard.admission.slots) // width]
        plans = shard.planned_actions(lane, self.slots_of(lane), 0)
        with shard.meter.work("step"):
            outcome = lane.play(plans)

        ended = []
        for row in outcome.ended():
            episode = self.episodes[lane.index][row]
            if episode < shard.config.env.eval_episodes:  # else the env has played all of its share
                if row in lane.cameras:
                    self.keep_film(lane.cameras.pop(row), outcome.won[row])
                shard.meter.set(f"outcome_{episode}", 2 * self.round + int(outcome.won[row]))
                ended.append(row)
        self.go_on(lane, ended)

    def go_on(self, lane: Lane, rows: list[int]) -> None:
        """Begins what is left of this round in the envs `rows`, if any, and asks for the lane."""
        shard = self.shard
        count = shard.config.env.eval_episodes
        episodes = self.episodes[lane.index]
        for row in rows:
            while episodes[row] < count and self.is_played(episodes[row]):
                episodes[row] += self.step

        # Noise is named by episode and t; episodes that begin together begin at t = 0.
        fresh = [row for row in rows if episodes[row] < count]
        everybody = len(fresh) == len(lane.envs)
        self.t[lane.index] = 0 if everybody else self.t[lane.index] + 1
        begun = [episodes[row] for row in fresh]
        tasks = [episode % len(shard.spec.tasks) for episode in begun]
        with shard.meter.work("reset"):
            lane.reset(fresh, tasks, [EVAL_SEEDS + episode for episode in begun])
        for row, episode in zip(fresh, begun, strict=True):
            if episode in self.filmed:
                lane.cameras[row] = self.camera(lane, row)

        if min(episodes) < count:
            slots = self.slots_of(lane)
            shard.label(lane, slots, episodes)
            shard.observe(lane, slots, 0)
            shard.request(lane, slots, EVAL, self.t[lane.index])

    def camera(self, lane: Lane, row: int) -> Camera:
        """Returns what films the episode that begins in one of the lane's envs."""
        spec = self.shard.spec
        task = lane.tasks[row]
        version = int(self.shard.plane.version)
        return Camera(partial(lane.film, row), spec.tasks[task], version, spec.limit(task))

    def keep_film(self, camera: Camera, won: bool) -> None:
        """Leaves a film before anybody hears that its episode has ended."""
        try:
            camera.leave(self.films, won)
        except Exception as error:  # of the disk or the simulator: it would come again
            self.filmed = set()
            for lane in self.lanes.values():
                lane.cameras.clear()
            name = self.shard.meter.name
            print(f"warning: {name} films no more: {error}", file=sys.stderr, flush=True)

    def is_played(self, episode: int) -> bool:
        """Whether this round has its outcome already, perhaps from a worker that died since."""
        meter = self.shard.meter
        return meter.counters.get(meter.row, f"outcome_{episode}") >= 2 * self.round


def first_episodes(config: Config) -> list[int]:
    """Returns the first episode of each of a node's evaluation envs: its number among those of all
    nodes. Every n-th from there on is its, too, of n evaluation envs on all nodes."""
    first = config.env.envs * config.train.nodes
    return (env_numbers(config)[config.env.envs :] - first).tolist()


class Evaluations:
    """Decides when to evaluate, and reads the result. A node's launcher keeps it, which no fault of
    a simulator touches.

    A round begins when all of the one before has been played, so that rounds never mix: every
    `eval_every`-th version, as far as there is time, and always the last one."""

    def __init__(
        self,
        config: Config,
        tasks: tuple[str, ...],
        version: int,
        counters: Counters,
        lines: Iterable[dict] = (),
    ):
        """lines: metrics of earlier workers whose schedule goes on; a round that they only began is
        played again."""
        self.config = config
        self.tasks = tasks
        self.counters = counters
        self.round = 0
        self.running: int | None = None  # the version that is being evaluated
        self.due = math.inf  # the version that is evaluated next; the first node knows it
        self.episodes: list[int] = []  # this node's share of a round
        self.elsewhere: dict[int, int] = {}  # how other nodes' episodes of this round have ended
        if config.env.evaluates:
            evaluated = [line["eval_version"] for line in lines if "eval_version" in line]
            due = max(evaluated) + config.env.eval_every if evaluated else version
            if config.train.node == 0:
                self.due = min(due, config.train.iterations)
            step = config.env.eval_envs * config.train.nodes
            mine = first_episodes(config)
            self.episodes = [e for e in range(config.env.eval_episodes) if e % step in mine]
        self.news: dict = {}  # the newest finished round

    def begins(self, version: int) -> bool:
        """Whether a round begins now. Notes the result of the one that has just ended."""
        if self.running is not None and not self.is_over():
            return False
        self.running = None
        if version < self.due:
            return False
        train = self.config.train
        next_one = min(version + self.config.env.eval_every, train.iterations)
        again = train.node == 0 and version < train.iterations
        self.due = next_one if again else math.inf
        self.running = version
        self.round += 1
        self.elsewhere = {}
        self.counters.set(0, "eval_round", self.round)
        return True

    def hand_over(self) -> dict[int, int] | None:
        """Returns how this node's share of the running round ended, 1 for success, once all of it
        has been played; then the round is over here."""
        ended = None if self.running is None else self.outcomes()
        if ended is not None:
            self.running = None
        return ended

    def hear(self, outcomes: dict[str, int]) -> None:
        """Takes in what another node has handed over; JSON has made words of its episodes."""
        self.elsewhere |= {int(episode): won for episode, won in outcomes.items()}

    def outcomes(self) -> dict[int, int] | None:
        """Returns how this node's episodes of the running round ended; None while one of them is
        yet to end."""
        columns = [self.counters.index[f"outcome_{episode}"] for episode in self.episodes]
        # Only one worker writes an episode's outcome; the others' rows hold 0.
        written = self.counters.table[:, columns].max(axis=0)
        won = (written - 2 * self.round).astype(int).tolist()  # negative where it is yet to end
        return None if min(won, default=0) < 0 else dict(zip(self.episodes, won, strict=True))

    def is_over(self) -> bool:
        """Whether every episode of the running round has its outcome; if so, it becomes `news`."""
        episodes = self.config.env.eval_episodes
        ended = self.elsewhere | (self.outcomes() or {})
        if len(ended) < episodes:
            return False
        won = np.array([ended[episode] for episode in range(episodes)])
        self.news = {
            "eval_success_rate": float(won.mean()),
            "eval_episodes": episodes,
            "eval_version": self.running,
            "eval_per_task": {
                task: round(float(won[k :: len(self.tasks)].mean()), 4)
                for k, task in enumerate(self.tasks[:episodes])
            },
        }
        return True

    def report(self) -> dict:
        """Returns the newest finished round, once."""
        news = self.news
        self.news = {}
        return news
