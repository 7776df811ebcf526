"""Measures control steps per second of a simulator here, against the way its own documentation has
it.

    python bench.py envs
    python bench.py envs --env metaworld

The work is the same for all: episodes of chunks of 10 control steps, of which the policy sees one
observation. Naive is what LIBERO and Meta-World offer their users. LIBERO's `OffScreenRenderEnv`
draws both cameras in every step and rebuilds the scene at every reset. Meta-World's gymnasium env
with `render_mode="rgb_array"` is drawn after every step, at the same size.

Every row is a process of its own, or several. On one process they take turns, so that what disturbs
one disturbs all; rows hold medians. With several processes all work at once. `env_steps_per_s` is
of whole episodes, resets included. `times_naive_cpu` compares the processor time of such episodes,
which other programs on the machine hardly change. Left out: vectorised simulators; inference
between chunks.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from multiprocessing import connection

import numpy as np
import psutil
import torch.multiprocessing as mp

CHUNK = 10  # control steps
TASKS = {"libero": "turn_on_the_stove", "metaworld": "handle-press"}
SIZES = {"libero": 256, "metaworld": 64}  # pixels: the published protocol's, our default model's


class Ours:
    """`count` envs of ours, one after another."""

    def __init__(self, name: str, size: int, quality: str, count: int):
        import envs

        self.simulator = envs.load(name)
        self.spec = self.simulator.spec((TASKS[name],), size)
        self.quality = quality
        self.envs = [self.make() for _ in range(count)]
        self.seed = 0
        self.reset()

    def make(self):
        return self.simulator.make(self.spec, self.quality)

    def reset(self) -> None:
        """Goes back to initial states that were met before."""
        self.seed = (self.seed + 1) % 2
        for env in self.envs:
            env.reset(0, self.seed)

    def hard_reset(self) -> None:
        """Builds everything anew."""
        for env in self.envs:
            env.close()
        self.envs = [self.make() for _ in self.envs]
        self.reset()

    def steps(self, actions: np.ndarray) -> None:
        for env in self.envs:
            for action in actions:
                env.step(action)

    def frame(self) -> None:
        for env in self.envs:
            env.observe()

    def chunk(self, actions: np.ndarray) -> None:
        self.steps(actions)
        self.frame()


class NaiveLibero:
    """LIBERO's own env."""

    def __init__(self, name: str, size: int, quality: str, count: int):
        os.environ["MUJOCO_GL"] = "egl"
        from libero.libero.envs import OffScreenRenderEnv

        from envs import libero, libero_suites

        task = libero_suites.find(TASKS[name])
        self.spec = libero.spec((task.name,), size)
        self.states = libero_suites.initial_states(task.states)
        cameras = {"camera_heights": size, "camera_widths": size}
        self.env = OffScreenRenderEnv(bddl_file_name=str(task.file), **cameras)
        self.episode = 0
        self.env.seed(0)
        self.reset()

    def reset(self) -> None:
        self.env.reset()
        self.env.set_init_state(self.states[self.episode % 50])
        self.episode += 1
        for _ in range(15):  # steps of no-op, as ours (envs/libero.py)
            self.env.step([0, 0, 0, 0, 0, 0, -1])

    def chunk(self, actions: np.ndarray) -> None:
        for action in actions:
            self.env.step(action)


class NaiveMetaworld:
    """Meta-World's own env."""

    def __init__(self, name: str, size: int, quality: str, count: int):
        os.environ["MUJOCO_GL"] = "egl"
        import gymnasium
        import metaworld  # noqa: F401  registers itself

        from envs.metaworld import spec

        self.spec = spec((TASKS[name],), size)
        self.env = gymnasium.make(
            "Meta-World/MT1",
            env_name=TASKS[name] + "-v3",
            seed=0,
            render_mode="rgb_array",
            camera_name="corner2",
            width=size,
            height=size,
        )
        self.reset()

    def reset(self) -> None:
        self.env.reset()

    def chunk(self, actions: np.ndarray) -> None:
        for action in actions:
            self.env.step(action)
            self.env.render()


NAIVE = {"libero": NaiveLibero, "metaworld": NaiveMetaworld}


def serve(pipe, naive: bool, name: str, size: int, quality: str, count: int) -> None:
    """Runs a process with one player: does what it is told, and answers with how long it took.

    The answer is (seconds, processor seconds); to "memory" it is the private MB in use, twice."""
    os.environ["LP_NUM_THREADS"] = "0"
    # LIBERO talks while it is imported.
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        kind = NAIVE[name] if naive else Ours
        player = kind(name, size, quality, count)
    random = np.random.default_rng(0)
    horizon = player.spec.horizon
    shape = (CHUNK, player.spec.action_dim)
    played = 0  # control steps of the running episodes
    pipe.send(horizon)
    while (what := pipe.recv()) != "end":
        if what == "memory":
            pipe.send((private_mb(), private_mb()))
            continue
        arguments = ()
        if what in ("chunk", "steps"):
            if played + CHUNK > horizon:
                player.reset()
                played = 0
            arguments = (random.uniform(-1.0, 1.0, shape),)
            played += CHUNK
        elif what.endswith("reset"):
            played = 0
        start = time.perf_counter()
        cpu = time.process_time()
        getattr(player, what)(*arguments)
        pipe.send((time.perf_counter() - start, time.process_time() - cpu))
    os._exit(0)  # LIBERO's own contexts complain at the interpreter's exit


def private_mb() -> float:
    info = psutil.Process().memory_info()
    return (info.rss - info.shared) / 1e6


class Player:
    """A process that runs `serve`."""

    def __init__(self, *args):
        self.pipe, theirs = mp.Pipe()
        spawn = mp.get_context("spawn")
        self.process = spawn.Process(target=serve, args=(theirs, *args), daemon=True)
        self.process.start()
        theirs.close()

    def ready(self) -> "Player":
        self.horizon = self.pipe.recv()
        return self

    def ask(self, what: str) -> tuple[float, float]:
        self.pipe.send(what)
        return self.pipe.recv()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send("end")
        self.process.join(5.0)
        self.process.kill()


@contextlib.contextmanager
def started(*kinds: tuple) -> Iterator[list[Player]]:
    """Starts a player for each tuple of `serve`'s arguments, and ends them all."""
    players = [Player(*kind) for kind in kinds]
    try:
        for player in players:
            player.ready()
        yield players
    finally:
        for player in players:
            player.close()


def in_turns(players: list[Player], what: str, seconds: float) -> np.ndarray:
    """Measures the median milliseconds of each, and of the processor [players, 2].

    At least 3 turns and for `seconds` each, after one turn that warms up."""
    for player in players:
        player.ask(what)
    taken = []
    end = time.monotonic() + seconds * len(players)
    while len(taken) < 3 or time.monotonic() < end:
        taken.append([player.ask(what) for player in players])
    return 1e3 * np.median(np.array(taken), axis=0)


def at_once(players: list[Player], seconds: float) -> np.ndarray:
    """Measures mean milliseconds of a chunk, and of the processor, while all of them work [2]."""
    end = time.monotonic() + seconds
    taken = []
    for player in players:
        player.pipe.send("chunk")
    while time.monotonic() < end or len(taken) < 3 * len(players):
        for player in answered(players):
            taken.append(player.pipe.recv())
            player.pipe.send("chunk")
    for player in players:
        player.pipe.recv()
    return 1e3 * np.mean(taken, axis=0)


def answered(players: list[Player]) -> list[Player]:
    """Waits until some have answered. Returns those."""
    ready = connection.wait([player.pipe for player in players])
    return [player for player in players if player.pipe in ready]


def row_of(
    how: str,
    player: Player,
    chunk: np.ndarray,
    reset: np.ndarray,
    processes: int = 1,
    count: int = 1,
    step_ms: float | None = None,
    frame_ms: float | None = None,
) -> dict:
    """Makes one row. chunk, reset: milliseconds, and of the processor [2]; count: envs of each."""
    wall, cpu = reset + player.horizon / CHUNK * chunk  # milliseconds of an episode
    return {
        "how": how,
        "processes": processes,
        "envs_per_process": count,
        "step_ms": step_ms,
        "frame_ms": frame_ms,
        "chunk_ms": float(chunk[0]),
        "reset_ms": float(reset[0]),
        "env_steps_per_s": 1e3 * processes * count * player.horizon / wall,
        "times_naive": None,
        "cpu_ms_per_step": cpu / count / player.horizon,
        "times_naive_cpu": None,
        "private_mb_per_process": player.ask("memory")[0],
    }


def measure(names: tuple[str, ...], seconds: float) -> list[dict]:
    """Measures simulators. seconds: on each median."""
    return [row for name in names for row in measure_one(name, seconds)]


def measure_one(name: str, seconds: float) -> list[dict]:
    """Measures one simulator: naive and ours in turns, then more processes or envs of ours."""
    size = SIZES[name]
    rows = on_one_process(name, size, seconds)
    cores = len(os.sched_getaffinity(0))
    for processes in sorted({1, 2, cores})[1:]:
        rows.append(on_several(name, size, seconds, processes, 1))
    for count in (2, 4):
        rows.append(on_several(name, size, seconds, 1, count))
    naive = rows[0]
    for row in rows:
        row["times_naive"] = row["env_steps_per_s"] / naive["env_steps_per_s"]
        row["times_naive_cpu"] = naive["cpu_ms_per_step"] / row["cpu_ms_per_step"]
    return [{"env": name, "how": row.pop("how"), "image_size": size} | row for row in rows]


def on_one_process(name: str, size: int, seconds: float) -> list[dict]:
    """Measures naive and ours in turns. The first row is naive."""
    qualities = ["fast", "full"] if name == "libero" else ["fast"]
    kinds = [(True, name, size, "naive", 1)]
    kinds += [(False, name, size, quality, 1) for quality in qualities]
    with started(*kinds) as players:
        naive, fast, *_ = players
        chunks = in_turns(players, "chunk", seconds)
        resets = in_turns(players, "reset", seconds)
        rows = [row_of("naive", naive, chunks[0], resets[0])]
        steps = in_turns(players[1:], "steps", seconds)
        frames = in_turns(players[1:], "frame", seconds)
        times = [
            {"step_ms": step / CHUNK, "frame_ms": float(frame)}
            for step, frame in zip(steps[:, 0], frames[:, 0], strict=True)
        ]
        for i, quality in enumerate(qualities):
            how = f"ours, {quality}"
            rows.append(row_of(how, players[1 + i], chunks[1 + i], resets[1 + i], **times[i]))
        step_ms = times[0]["step_ms"]
        rows.append(row_of("ours, no frames", fast, steps[0], resets[1], step_ms=step_ms))
        hard = in_turns([fast], "hard_reset", 0.0)[0]
        rows.append(row_of("ours, hard reset", fast, chunks[1], hard, **times[0]))
    return rows


def on_several(name: str, size: int, seconds: float, processes: int, count: int) -> dict:
    """Measures ours with several processes that work at once, or several envs in one."""
    with started(*[(False, name, size, "fast", count)] * processes) as players:
        for player in players:
            player.ask("chunk")
        chunk = at_once(players, seconds * processes)
        reset = in_turns(players[:1], "reset", 0.0)[0]
        return row_of("ours, fast", players[0], chunk, reset, processes, count)
