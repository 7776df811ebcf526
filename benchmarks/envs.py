"""Control steps per second of a simulator here, against the way its own documentation has it.

    python bench.py envs

The same work for all: episodes of chunks of 10 control steps, of which the policy sees one
observation. Naive is what LIBERO and Meta-World offer their users: LIBERO's `OffScreenRenderEnv`,
which draws both cameras in every step and rebuilds the scene at every reset; Meta-World's gymnasium
env with `render_mode="rgb_array"`, drawn after every step at the same size.

Every row is a process of its own (or several). On one process they take turns, so that what
disturbs one disturbs all; rows hold medians. With several processes all work at once.
`env_steps_per_s` is of whole episodes, resets included; `times_naive_cpu` compares the processor
time of such episodes, which other programs on the machine hardly change. Left out: vectorised
simulators; inference between chunks.
"""

import contextlib
import os
import time
from multiprocessing import connection

import numpy as np
import torch.multiprocessing as mp

CHUNK = 10  # control steps
TASKS = {"libero": "turn_on_the_stove", "metaworld": "handle-press"}
SIZES = {
    "libero": 256,
    "metaworld": 64,
}  # pixels: the published protocol's, and our default model's


class Ours:
    def __init__(self, name: str, size: int, quality: str, count: int):
        import envs

        self.spec = envs.load(name).spec((TASKS[name],), size)
        self.make = lambda: envs.load(name).make(self.spec.tasks, size, quality)
        self.envs = [self.make() for _ in range(count)]
        self.seed = 0
        self.reset()

    def reset(self) -> None:
        """Back to initial states that were met before."""
        self.seed = (self.seed + 1) % 2
        for env in self.envs:
            env.reset(0, self.seed)

    def hard_reset(self) -> None:
        """Everything built anew."""
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
    def __init__(self, name: str, size: int, quality: str, count: int):
        os.environ["MUJOCO_GL"] = "egl"
        from libero.libero.envs import OffScreenRenderEnv

        from envs import libero

        suite = libero.suite_of(TASKS[name])
        self.spec = libero.spec((TASKS[name],), size)
        with np.load(
            libero.FOLDER / "init_files" / suite / f"{TASKS[name]}.pruned_init.npz"
        ) as states:
            self.states = states["states"]
        path = libero.FOLDER / "bddl_files" / suite / f"{TASKS[name]}.bddl"
        self.env = OffScreenRenderEnv(
            bddl_file_name=str(path), camera_heights=size, camera_widths=size
        )
        self.episode = 0
        self.env.seed(0)
        self.reset()

    def reset(self) -> None:
        self.env.reset()
        self.env.set_init_state(self.states[self.episode % 50])
        self.episode += 1
        for _ in range(15):
            self.env.step([0, 0, 0, 0, 0, 0, -1])

    def chunk(self, actions: np.ndarray) -> None:
        for action in actions:
            self.env.step(action)


class NaiveMetaworld:
    def __init__(self, name: str, size: int, quality: str, count: int):
        os.environ["MUJOCO_GL"] = "egl"
        import gymnasium
        import metaworld  # noqa: F401  registers itself

        from envs.metaworld import spec

        self.spec = spec((TASKS[name],), size)
        settings = {
            "render_mode": "rgb_array",
            "camera_name": "corner2",
            "width": size,
            "height": size,
        }
        self.env = gymnasium.make(
            "Meta-World/MT1", env_name=TASKS[name] + "-v3", seed=0, **settings
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
    """A process with one player: does what it is told and answers with the seconds, and those of
    the processor, that it took.

    "memory" is answered with its private MB in use, twice.
    """
    import psutil

    os.environ["LP_NUM_THREADS"] = "0"
    random = np.random.default_rng(0)
    with (
        open(os.devnull, "w") as nothing,
        contextlib.redirect_stdout(nothing),
    ):  # LIBERO talks while it is imported
        player = (NAIVE[name] if naive else Ours)(name, size, quality, count)
    played = 0
    horizon = player.spec.horizon
    dimension = player.spec.action_dim
    pipe.send(horizon)
    while (what := pipe.recv()) != "end":
        if what == "memory":
            info = psutil.Process().memory_info()
            pipe.send(((info.rss - info.shared) / 1e6,) * 2)
            continue
        if played + CHUNK > horizon and what in ("chunk", "steps"):
            player.reset()
            played = 0
        actions = (
            (random.uniform(-1.0, 1.0, (CHUNK, dimension)),) if what in ("chunk", "steps") else ()
        )
        played = played + CHUNK if actions else 0 if what.endswith("reset") else played
        start = time.perf_counter()
        cpu = time.process_time()
        getattr(player, what)(*actions)
        pipe.send((time.perf_counter() - start, time.process_time() - cpu))
    os._exit(0)  # LIBERO's own contexts complain at the interpreter's exit


class Player:
    """This side of `serve`."""

    def __init__(self, *args):
        self.pipe, theirs = mp.Pipe()
        self.process = mp.get_context("spawn").Process(
            target=serve, args=(theirs, *args), daemon=True
        )
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


def in_turns(players: list[Player], what: str, seconds: float) -> np.ndarray:
    """[players, 2]: median milliseconds of each, and of the processor; at least 3 turns, after one
    to warm up, and `seconds`.
    """
    for player in players:
        player.ask(what)
    taken = []
    end = time.monotonic() + seconds * len(players)
    while len(taken) < 3 or time.monotonic() < end:
        taken.append([player.ask(what) for player in players])
    return 1e3 * np.median(np.array(taken), axis=0)


def at_once(players: list[Player], seconds: float) -> np.ndarray:
    """[2]: mean milliseconds of a chunk, and of the processor, while all of them work."""
    end = time.monotonic() + seconds
    taken = []
    for player in players:
        player.pipe.send("chunk")
    while time.monotonic() < end or len(taken) < 3 * len(players):
        for player in waiting(players):
            taken.append(player.pipe.recv())
            player.pipe.send("chunk")
    for player in players:
        player.pipe.recv()
    return 1e3 * np.mean(taken, axis=0)


def waiting(players: list[Player]) -> list[Player]:
    """Those that have answered."""
    ready = connection.wait([player.pipe for player in players])
    return [player for player in players if player.pipe in ready]


def measure(names: tuple[str, ...], seconds: float) -> list[dict]:
    return [row for name in names for row in measure_one(name, seconds)]


def measure_one(name: str, seconds: float) -> list[dict]:
    size = SIZES[name]
    cores = len(os.sched_getaffinity(0))
    rows = []
    counts = sorted({1, 2, cores})

    def row(
        how: str, player: Player, chunk, reset, processes: int = 1, count: int = 1, **more: float
    ) -> dict:
        wall, cpu = reset + player.horizon / CHUNK * chunk  # milliseconds of an episode
        found = {
            "env": name,
            "how": how,
            "image_size": size,
            "processes": processes,
            "envs_per_process": count,
            "step_ms": None,
            "frame_ms": None,
            "chunk_ms": float(chunk[0]),
            "reset_ms": float(reset[0]),
            "env_steps_per_s": 1e3 * processes * count * player.horizon / wall,
            "times_naive": None,
            "cpu_ms_per_step": cpu / count / player.horizon,
            "times_naive_cpu": None,
            "private_mb_per_process": player.ask("memory")[0],
        } | more
        rows.append(found)
        return found

    kinds = [(True, "naive"), (False, "fast")] + [(False, "full")] * (name == "libero")
    players = [Player(naive, name, size, quality, 1) for naive, quality in kinds]
    try:
        for player in players:
            player.ready()
        chunks = in_turns(players, "chunk", seconds)
        resets = in_turns(players, "reset", seconds)
        naive = row("naive", players[0], chunks[0], resets[0])
        steps = in_turns(players[1:], "steps", seconds)
        frames = in_turns(players[1:], "frame", seconds)
        for i, quality in enumerate(["fast", "full"][: len(players) - 1]):
            how = {"step_ms": steps[i, 0] / CHUNK, "frame_ms": float(frames[i, 0])}
            row(f"ours, {quality}", players[1 + i], chunks[1 + i], resets[1 + i], **how)
        row("ours, no frames", players[1], steps[0], resets[1], step_ms=steps[0, 0] / CHUNK)
        hard = in_turns(players[1:2], "hard_reset", 0.0)[0]
        row(
            "ours, hard reset",
            players[1],
            chunks[1],
            hard,
            step_ms=steps[0, 0] / CHUNK,
            frame_ms=float(frames[0, 0]),
        )
    finally:
        for player in players:
            player.close()

    for processes, count in [(n, 1) for n in counts[1:]] + [(1, 2), (1, 4)]:
        players = [Player(False, name, size, "fast", count) for _ in range(processes)]
        try:
            for player in players:
                player.ready().ask("chunk")
            chunk = at_once(players, seconds * processes)
            row(
                "ours, fast",
                players[0],
                chunk,
                in_turns(players[:1], "reset", 0.0)[0],
                processes,
                count,
            )
        finally:
            for player in players:
                player.close()
    for found in rows:
        found["times_naive"] = found["env_steps_per_s"] / naive["env_steps_per_s"]
        found["times_naive_cpu"] = naive["cpu_ms_per_step"] / found["cpu_ms_per_step"]
    return rows
