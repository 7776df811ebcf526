"""Imitates demonstrations: makes the checkpoint that reinforcement learning starts from.

    python pretrain.py --pace 1 --out strong.safetensors
    python pretrain.py --overwrite          the shipped assets/pi05_metaworld.safetensors anew, in
                                            about 10 minutes on 2 cores
    python pretrain.py --model gr00t --overwrite        assets/gr00t_metaworld.safetensors

Meta-World's scripted experts act. Gaussian noise on the action that they execute (DART, arXiv
1703.09327) makes the data show how to recover, too. Each stored frame is labelled with the expert's
own next C actions. The demonstrator moves at 0.6 of the expert's speed, so the policy sees well and
runs out of time: it succeeds at 20–50 %, which leaves reinforcement learning, with the prefix
frozen, something to learn. Left out: a validation split, as success in the simulator counts.
"""

import copy
import math
import shutil
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.multiprocessing as mp
import tyro
from pydantic import Field

import envs
import models
from checks import AboveZero, Fraction, FromZero, Natural, Positive, check_ranges
from config import Config, Family, embedded_files, expanded
from envs import metaworld
from errors import exit_on_user_error, require
from gradients import Gradients
from models import checkpoint, tokenize
from processes import keep_freed_memory
from ranks import Meeting, Ranks

CHUNK = Config().rollout.chunk  # actions that a frame is labelled with
IMAGE_SIZE = 64  # pixels, as the small models take them
# A constant, because the order of sums, and so every bit of the checkpoint, depends on it.
PROCESSES = 2
WARMUP = 50  # optimizer steps


@dataclass(kw_only=True)
class PretrainConfig:
    """Imitation from Meta-World's scripted experts."""

    model: Family = "pi05"
    """policy family, at its embedded small size"""
    out: Path | None = None
    """file to write, by default assets/MODEL_metaworld.safetensors; the vocabulary goes beside"""
    overwrite: bool = False
    """replace a checkpoint, or another vocabulary, that is there; the shipped families share one"""
    tasks: tuple[str, ...] = ()
    """Meta-World tasks; none means the default task set and button-press-topdown, since more scenes
    make better features"""
    demos: Positive = 25
    """demonstrations per task"""
    pace: Fraction = 0.6
    """the demonstrator's speed as a fraction of the expert's: careful, as people who teleoperate"""
    frame_every: Positive = 3
    """control steps between stored frames"""
    action_noise: FromZero = 0.5
    """standard deviation of the noise on executed actions, in units of the action range [-1, 1]"""
    steps: Positive = 1200
    """optimizer steps"""
    batch: Annotated[int, Field(ge=1, le=10**6, multiple_of=PROCESSES)] = 64
    """frames per optimizer step, in equal parts for two processes"""
    lr: AboveZero = 1e-3
    """peak learning rate of AdamW; linear warm-up over 50 steps, then cosine to zero"""
    seed: Natural = 0
    """seed of demonstrations, initial weights and batches"""


def demonstrate(
    tasks: tuple[str, ...], task: int, seeds: range, config: PretrainConfig
) -> list[tuple]:
    """Plays demonstrations of tasks[task]. Returns tuples (task, image, state, actions [C, A])."""
    from metaworld.policies import ENV_POLICY_MAP

    warnings.filterwarnings("ignore")
    with envs.starting("metaworld"):
        env = metaworld.Env(tasks, IMAGE_SIZE)
        env.reset(task, seeds[0])
        env.observe()
    expert = ENV_POLICY_MAP[tasks[task] + "-v3"]()
    frames = []
    for seed in seeds:
        env.reset(task, seed)
        rng = np.random.default_rng([config.seed, task, seed])
        frames += [(task, *frame) for frame in play(env, expert, rng, config)]
    env.close()
    return frames


def play(env, expert, rng: np.random.Generator, config: PretrainConfig) -> list[tuple]:
    """Plays one demonstration: (image, state, actions [C, A]) per frame, nothing where it fails."""
    seen = []  # control step, image, state
    actions = []
    finish = None  # the control step that succeeds
    for t in range(3 * metaworld.HORIZON):
        if t % config.frame_every == 0 and finish is None:
            seen.append((t, *env.observe()))
        action = config.pace * np.clip(expert.get_action(env.state), -1.0, 1.0).astype(np.float32)
        action[3] /= config.pace  # the gripper is not a speed
        actions.append(action)
        noise = rng.normal(0.0, config.action_noise, 4) * (finish is None)
        success = env.step(np.clip(action + noise, -1.0, 1.0)).success
        if success and finish is None:
            finish = t
        # Go on past success for C steps, so that the last frames have labels, too.
        if finish is not None and t >= finish + CHUNK:
            break
    if finish is None:  # it teaches nothing
        return []
    labels = np.stack(actions)
    labelled = [frame for frame in seen if frame[0] + CHUNK <= len(labels)]
    return [(image, state, labels[t : t + CHUNK]) for t, image, state in labelled]


def fit(rank: int, model, data: dict, config: PretrainConfig, rendezvous: str) -> None:
    """Trains with AdamW on the family's imitation loss (flow matching, or cross-entropy of action
    tokens), in PROCESSES ranks that average gradients.

    On a CPU one thread in each of two processes is nearly twice as fast as two threads in one.
    model: in shared memory, where rank 0 trains it. data: observation fields [frames, …] and
    "actions" [frames, C, A]."""
    torch.set_num_threads(1)
    keep_freed_memory()
    ranks = Ranks(rank, PROCESSES, "cpu", Meeting(Path(rendezvous)))
    model = model if rank == 0 else copy.deepcopy(model)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.01)
    gradients = Gradients(parameters, ranks)
    # Every rank draws the same batches and takes its own part of them.
    torch.manual_seed(config.seed)
    mine = slice(rank * config.batch // PROCESSES, (rank + 1) * config.batch // PROCESSES)
    started = time.monotonic()
    for step in range(config.steps):
        warmup = min(1.0, (step + 1) / WARMUP)
        cosine = 0.5 * (1.0 + math.cos(math.pi * (step / config.steps)))
        optimizer.param_groups[0]["lr"] = config.lr * warmup * cosine
        rows = torch.randint(len(data["actions"]), (config.batch,))
        draw = {name: x[mine] for name, x in model.imitation_draw(config.batch).items()}
        obs = {name: x[rows[mine]] for name, x in data.items()}
        loss = model.imitate(obs, obs["actions"], draw) / PROCESSES
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        for _ in gradients.sum():
            pass
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if rank == 0 and (step + 1) % 100 == 0:
            mean = PROCESSES * loss.item()
            seconds = f"{time.monotonic() - started:.0f} s"
            print(f"step {step + 1}/{config.steps}  loss {mean:.4f}  {seconds}", flush=True)
    ranks.leave()


def make_model(config: PretrainConfig, spec, vocabulary: Path) -> torch.nn.Module:
    """Makes a vocabulary of all of Meta-World's prompts, and a model that knows it, in shared
    memory. Raises UserError where the model has no room for a prompt."""
    family = models.files(config.model)
    words = [family.wording(task) for task in metaworld.PROMPTS.values()]
    tokenize.train_vocabulary(words, vocabulary)
    torch.manual_seed(config.seed)
    model = family.embedded(config.model, str(vocabulary)).share_memory()
    ends = {"state_low": [0.0] * spec.state_dim, "state_high": [1.0] * spec.state_dim}
    header = checkpoint.Header(config.model, asdict(model.config), ends)
    preparation = family.preparation(header, str(vocabulary))
    blank = np.zeros((spec.views, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for prompt in spec.prompts:
        preparation.observe(blank, np.zeros(spec.state_dim, np.float32), prompt)
    return model


def gather(config: PretrainConfig, spec) -> list[tuple]:
    """Lets the experts act, half of a task's demonstrations in each job, as `demonstrate`."""
    started = time.monotonic()
    seeds = 10_000_000 + 1000 * config.seed  # training and evaluation draw other seeds
    half = math.ceil(config.demos / 2)
    every = range(seeds, seeds + config.demos)
    parts = [every[first : first + half] for first in range(0, config.demos, half)]
    jobs = [(spec.tasks, n, part, config) for n in range(len(spec.tasks)) for part in parts]
    with mp.get_context("spawn").Pool(PROCESSES) as pool:
        frames = sum(pool.starmap(demonstrate, jobs, chunksize=1), [])
    choose = "choose other --tasks, a higher --pace or less --action-noise"
    require(frames, f"no demonstration succeeded: {choose}")
    seconds = f"{time.monotonic() - started:.0f} s"
    print(f"{len(frames)} frames of {config.demos} demonstrations per task in {seconds}")
    return frames


def main(config: PretrainConfig) -> None:
    """Makes a checkpoint and its vocabulary. Raises UserError."""
    check_ranges(config)
    default, shipped = embedded_files(config.model, "metaworld")
    out = config.out or default
    nowhere = f"the folder {out.parent} does not exist: create it or give another --out"
    require(out.parent.is_dir(), nowhere)
    tasks = config.tasks or ("button-press-topdown", *metaworld.DEFAULT_TASKS)
    spec = metaworld.spec(tasks, IMAGE_SIZE)
    with tempfile.TemporaryDirectory() as folder:
        # Find out what would go wrong at the end, then let the experts act.
        vocabulary = Path(folder) / shipped.name
        model = make_model(config, spec, vocabulary)
        beside = out.with_name(shipped.name)
        other = beside.exists() and beside.read_bytes() != vocabulary.read_bytes()
        for file, lost in ((out, out.exists()), (beside, other)):
            there = f"{file} exists already and would become another: give another --out"
            require(config.overwrite or not lost, f"{there}, or --overwrite")
        frames = gather(config, spec)

        # Turn frames into what the model sees, and train.
        states = np.stack([state for _, _, state, _ in frames])
        low, high = (np.quantile(states, share, axis=0).tolist() for share in (0.01, 0.99))
        stats = {"state_low": low, "state_high": high}
        words = tokenize.fingerprint(vocabulary)
        header = checkpoint.Header(config.model, asdict(model.config), stats, words)
        preparation = models.preparation(config.model, header, vocabulary)
        rows = []
        for task, image, state, actions in frames:
            observed = preparation.observe(image, state, spec.prompts[task])
            rows.append(observed | {"actions": actions})
        stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        data = {name: torch.from_numpy(x).share_memory_() for name, x in stacked.items()}
        mp.spawn(fit, (model, data, config, f"{folder}/rendezvous"), PROCESSES)
        shutil.copyfile(vocabulary, beside)
    checkpoint.save(out, header, model.half().state_dict())
    print(f"wrote {out} and {beside}")


if __name__ == "__main__":
    with exit_on_user_error():
        main(expanded(tyro.cli(PretrainConfig)))
