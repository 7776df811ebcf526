"""Imitation from demonstrations: makes the checkpoint that reinforcement learning starts from.

    python pretrain.py                      the shipped assets/pi05_metaworld.safetensors, about 10
                                            minutes on 2 cores
    python pretrain.py --model gr00t        assets/gr00t_metaworld.safetensors
    python pretrain.py --pace 1 --out strong.safetensors

Meta-World's scripted experts act, with Gaussian noise on the action they execute (DART, arXiv
1703.09327) so the data also shows how to recover; each stored frame is labelled with the expert's
own next C actions. The loss is the family's: flow matching, or cross-entropy of action tokens. The
demonstrator is careful: it moves at 0.6 of the expert's speed, so the policy sees well and runs out
of time. It succeeds at 20–50 %, which leaves reinforcement learning, with the prefix frozen,
something to learn from success alone. Left out: a validation split. Success in the simulator
(`evaluate.py`) is what counts.
"""

import copy
import math
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import tyro

import models
from actor_worker import all_reduce_gradients
from config import Family, RolloutConfig, UserError, embedded_files, exit_on_user_error
from models import checkpoint, tokenize
from processes import keep_freed_memory

# pixels, as the small models take them
CHUNK = RolloutConfig().chunk
IMAGE_SIZE = 64
PROCESSES = (
    2  # a constant, because the order of sums, and so every bit of the checkpoint, depends on it
)


@dataclass(kw_only=True)
class PretrainConfig:
    """Imitation from Meta-World's scripted experts."""

    model: Family = "pi05"
    """policy family, at its embedded small size"""
    out: Path | None = None
    """file to write, by default assets/MODEL_metaworld.safetensors; the vocabulary goes beside
    it
    """
    tasks: tuple[str, ...] = ()
    """Meta-World tasks; none means the default task set and button-press-topdown, since more scenes
    make better features
    """
    demos: int = 25
    """demonstrations per task"""
    pace: float = 0.6
    """speed of the demonstrator, as a fraction of the scripted expert's: careful, as people who
    teleoperate are
    """
    frame_every: int = 3
    """control steps between stored frames"""
    action_noise: float = 0.5
    """standard deviation of the noise on executed actions, in units of the action range [-1, 1]"""
    steps: int = 1200
    """optimizer steps"""
    batch: int = 64
    """frames per optimizer step"""
    lr: float = 1e-3
    """peak learning rate of AdamW; linear warm-up over 50 steps, then cosine to zero"""
    seed: int = 0
    """seed of demonstrations, initial weights and batches"""


def demonstrate(job: tuple[tuple[str, ...], int, int, int, PretrainConfig]) -> list[tuple]:
    """One worker's demonstrations of one task: a list of (task, image, state, actions [C, A])."""
    tasks, task, first_seed, count, config = job
    import warnings

    from metaworld.policies import ENV_POLICY_MAP

    from envs import metaworld

    warnings.filterwarnings("ignore")
    chunk = CHUNK
    env = metaworld.Env(tasks, IMAGE_SIZE)
    expert = ENV_POLICY_MAP[tasks[task] + "-v3"]()
    frames = []
    for seed in range(first_seed, first_seed + count):
        env.reset(task, seed)
        rng = np.random.default_rng([config.seed, task, seed])
        observations = []
        actions = []
        finish = None
        for t in range(
            3 * metaworld.HORIZON
        ):  # past success for C steps, so the last frames have labels too
            if t % config.frame_every == 0 and finish is None:
                observations.append((t, *env.observe()))
            action = config.pace * np.clip(expert.get_action(env.state), -1.0, 1.0).astype(
                np.float32
            )
            action[3] /= config.pace  # the gripper is not a speed
            actions.append(action)
            noise = rng.normal(0.0, config.action_noise, 4) * (finish is None)
            success = env.step(np.clip(action + noise, -1.0, 1.0)).success
            finish = t if success and finish is None else finish
            if finish is not None and t >= finish + chunk:
                break
        if finish is None:
            continue  # a demonstration that fails teaches nothing
        actions = np.stack(actions)
        labelled = [
            (t, image, state) for t, image, state in observations if t + chunk <= len(actions)
        ]
        frames += [(task, image, state, actions[t : t + chunk]) for t, image, state in labelled]
    env.close()
    return frames


def fit(
    rank: int, model, data: dict[str, torch.Tensor], config: PretrainConfig, rendezvous: str
) -> None:
    """AdamW on the family's imitation loss, in PROCESSES ranks that average gradients: on a CPU one
    thread in each of two processes is nearly twice as fast as two threads in one. data: observation
    fields [frames, …] and "actions" [frames, C, A].
    """
    torch.set_num_threads(1)
    keep_freed_memory()
    model = (
        model if rank == 0 else copy.deepcopy(model)
    )  # the caller's, in shared memory, is rank 0's
    torch.manual_seed(
        config.seed
    )  # every rank draws the same batches and takes its own part of them
    dist.init_process_group(
        "gloo", store=dist.FileStore(rendezvous, PROCESSES), rank=rank, world_size=PROCESSES
    )
    parameters = list(model.parameters())
    mine = slice(rank * config.batch // PROCESSES, (rank + 1) * config.batch // PROCESSES)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.01
    )
    started = time.monotonic()
    for step in range(config.steps):
        warmup = min(1.0, (step + 1) / 50)
        progress = step / config.steps
        optimizer.param_groups[0]["lr"] = (
            config.lr * warmup * 0.5 * (1.0 + math.cos(math.pi * progress))
        )
        rows = torch.randint(len(data["actions"]), (config.batch,))
        draw = {name: x[mine] for name, x in model.imitation_draw(config.batch).items()}
        obs = {name: x[rows[mine]] for name, x in data.items()}
        loss = model.imitate(obs, obs["actions"], draw) / PROCESSES
        optimizer.zero_grad()
        loss.backward()
        all_reduce_gradients(parameters, PROCESSES)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if rank == 0 and (step + 1) % 100 == 0:
            seconds = time.monotonic() - started
            print(
                f"step {step + 1}/{config.steps}  loss {PROCESSES * loss.item():.4f}  "
                f"{seconds:.0f} s",
                flush=True,
            )
    dist.destroy_process_group()


def main(config: PretrainConfig) -> None:
    from envs import metaworld

    default, vocabulary = embedded_files(config.model, "metaworld")
    out = config.out or default
    if not out.parent.is_dir():
        raise UserError(f"the folder {out.parent} does not exist: create it or give another --out")
    if config.demos < 1 or config.steps < 1 or config.frame_every < 1:
        raise UserError("--demos, --steps and --frame-every must be at least 1")
    if config.batch < PROCESSES or config.batch % PROCESSES:
        raise UserError(
            f"--batch {config.batch} must be a multiple of {PROCESSES}, the processes that share it"
        )
    if not 0.0 < config.pace <= 1.0:
        raise UserError(
            f"--pace {config.pace} must lie above 0 and be at most 1, the scripted expert's own "
            "speed"
        )
    started = time.monotonic()
    tasks = config.tasks or ("button-press-topdown", *metaworld.DEFAULT_TASKS)
    env_spec = metaworld.spec(tasks, IMAGE_SIZE)
    family = models.files(config.model)
    seeds = 10_000_000 + 1000 * config.seed  # training and evaluation draw other seeds
    half = math.ceil(config.demos / 2)
    jobs = [
        (env_spec.tasks, task, seeds + first, min(half, config.demos - first), config)
        for task in range(len(env_spec.tasks))
        for first in range(0, config.demos, half)
    ]
    with mp.get_context("spawn").Pool(PROCESSES) as pool:
        frames = [frame for part in pool.map(demonstrate, jobs, chunksize=1) for frame in part]
    if not frames:
        raise UserError(
            "no demonstration succeeded: choose other --tasks, a higher --pace or less "
            "--action-noise"
        )
    task, image, state, actions = (np.stack(column) for column in zip(*frames, strict=True))
    low = np.quantile(state, 0.01, axis=0)
    high = np.quantile(state, 0.99, axis=0)
    print(
        f"{len(frames)} frames of {config.demos} demonstrations per task in "
        f"{time.monotonic() - started:.0f} s"
    )

    vocabulary = out.with_name(vocabulary.name)
    tokenize.train_vocabulary(
        [family.wording(task) for task in metaworld.PROMPTS.values()], vocabulary
    )
    torch.manual_seed(config.seed)
    model = family.embedded(config.model, str(vocabulary)).share_memory()  # rank 0 trains this one
    stats = {"state_low": low.tolist(), "state_high": high.tolist()}
    header = checkpoint.Header(config.model, asdict(model.config), stats)
    preparation = family.preparation(header, str(vocabulary))
    rows = [
        preparation.observe(i, s, env_spec.prompts[k])
        for i, s, k in zip(image, state, task, strict=True)
    ]
    data = {name: np.stack([row[name] for row in rows]) for name in rows[0]} | {"actions": actions}
    data = {name: torch.from_numpy(x).share_memory_() for name, x in data.items()}
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(fit, (model, data, config, f"{folder}/rendezvous"), PROCESSES)
    checkpoint.save(out, header, model.half().state_dict())
    print(f"wrote {out} and {vocabulary}")


if __name__ == "__main__":
    with exit_on_user_error():
        main(tyro.cli(PretrainConfig))
