"""Imitates demonstrations: makes the checkpoint that reinforcement learning starts from.

    python pretrain.py --out NEW            a small model for Meta-World, in about 10 minutes on 2
                                            cores: the recipe of assets/pi05_metaworld.safetensors
    python pretrain.py --collect demos      Meta-World's scripted experts play, no more
    python pretrain.py --dataset demos --out NEW
    python pretrain.py --dataset FOLDER --env libero --suite libero_10 --model pi05 \
        --checkpoint FOLDER --tokenizer paligemma_tokenizer.model --lora-rank 32 --out NEW
    python train.py --checkpoint NEW --env libero --suite libero_10

A dataset is in LeRobot's format (demonstrations.py); docs/demonstrations.md says what of it goes
where. Without one, Meta-World's scripted experts act (experts.py), and what they did is written and
read as a dataset. The shipped assets were made by an older version of this file, so a new run does
not repeat them (docs/demonstrations.md compares the two). imitation.py does the learning. Left out:
a validation split, because success in the simulator is what counts; datasets of a robot that no
simulator here has.
"""

import contextlib
import glob
import os
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from pydantic import Field

import envs
import evaluate
import imitation
import machine
import models
from checks import AboveZero, Length, Natural, Positive, check_ranges, check_writable, flag_of
from config import Config, Family, completed, embedded_files, expanded
from demonstrations import Demonstrations
from envs import EnvSpec
from errors import exit_on_user_error, require
from experts import CHUNK, IMAGE_SIZE, TASKS, ExpertConfig, gather
from files import locked
from imitation import PROCESSES, Lesson
from models import checkpoint, contract, tokenize, untrained

# Flags that say how weights to start from are learned.
STARTED = ("tokenizer", "keep_statistics", "train_vlm", "lora_rank", "lora_alpha", "lora_targets")
NEW_LR = 1e-3
FULL_SIZE_LR = 2.5e-5  # openpi's; policies and tools name ten times that for adapters (LeRobot)


@dataclass(kw_only=True)
class PretrainConfig(ExpertConfig):
    """Imitation of demonstrations: a dataset's, or of Meta-World's scripted experts."""

    model: Family = "pi05"
    """policy family; a new one has its embedded small size"""
    out: Path | None = None
    """folder, or file that ends in .safetensors, to write; the vocabulary goes beside. Without
    --dataset and --checkpoint by default assets/MODEL_metaworld.safetensors"""
    overwrite: bool = False
    """replace a checkpoint, or another vocabulary, that is there, once all steps are done; the
    shipped families share one"""
    dataset: Path | None = None
    """a folder in LeRobot's format (v2.0, v2.1, v3.0) to learn from, instead of letting experts
    act. Its actions are those that the simulator executes"""
    collect: Path | None = None
    """only let the experts act, and write what they did as such a folder, which must be new"""
    env: str = "metaworld"
    """simulator in which a dataset's policy is to act"""
    tasks: tuple[str, ...] = ()
    """tasks: of a dataset, those whose episodes are learned from, by the simulator's names (none:
    all). Of the experts; none means the default task set and button-press-topdown, since more
    scenes make better features"""
    suite: str = ""
    """a suite of the simulator (libero_10, …): all of its tasks, beside --tasks"""
    cameras: tuple[str, ...] = ()
    """a dataset's features that are the policy's views, in the simulator's order; none means all
    in the dataset's order, where the policy has as many views"""
    state: str = ""
    """a dataset's feature that is the robot's state; none means observation.state or state"""
    action: str = ""
    """a dataset's feature that is the action; none means action or actions"""
    checkpoint: Path | None = None
    """weights to start from, ours or another project's; none means a new small model"""
    tokenizer: Path | None = None
    """SentencePiece file (published GR00T: Qwen's vocabulary); none means the checkpoint's own"""
    statistics: str = ""
    """which of a checkpoint's statistics: OFT's unnorm key, GR00T's embodiment tag, π's folder"""
    keep_statistics: bool = False
    """go on with the checkpoint's statistics, which scale state and action, instead of those of
    what is learned from: for more of the data that it was trained on"""
    chunk: Positive | None = None
    """actions that the robot executes per inference (10), of another project's checkpoint; ours say
    it themselves"""
    horizon: Length | None = None
    """actions that the model predicts at once, where another project's checkpoint does not say"""
    tokens: Length | None = None
    """prompt length in tokens; none means as the checkpoint says"""
    train_vlm: bool = False
    """also learn the weights of image tower and prefix of a checkpoint; a new model learns all"""
    lora_rank: Natural | None = None
    """learn low-rank adapters (LoRA) of this rank alone. 0 adds those of the checkpoint into its
    weights; none means as the checkpoint says"""
    lora_alpha: AboveZero | None = None
    """scale of the adapters times their rank; none means as the checkpoint says, else the rank"""
    lora_targets: tuple[str, ...] = ()
    """layers that have adapters, by parts of their names; none means as in train.py"""
    precision: Literal["float32", "bfloat16"] | None = None
    """what the network computes in; none means bfloat16 on a GPU"""
    checkpointing: Literal["auto", "on", "off"] = "auto"
    """keep only the input of each block for the backward pass; auto: for a published model"""
    frame_every: Positive | None = None
    """control steps from a frame that is learned from to the next; none means 3 of the experts',
    and every one of a dataset's"""
    steps: Positive = 1200
    """optimizer steps"""
    batch: Annotated[int, Field(ge=1, le=10**6, multiple_of=PROCESSES)] = 64
    """frames per optimizer step, in equal parts for two processes, or for one on each GPU"""
    micro_batch: Natural = 0
    """frames of one forward and backward pass of a process; 0 means its whole part of a batch"""
    lr: AboveZero | None = None
    """peak learning rate of AdamW; linear warm-up over 50 steps, then cosine to zero. None means
    1e-3 for a new model, 2.5e-5 from a checkpoint, ten times that for adapters"""
    save_every: Natural = 1000
    """optimizer steps between saves, to a file of their own (….partial.safetensors); 0 means only
    at the end, or when it is interrupted"""


def instructions(config: PretrainConfig, spec: EnvSpec) -> tuple[str, ...]:
    """Returns what the simulator asks for: all that it knows, or that of the tasks chosen."""
    if config.env != "metaworld":
        return spec.prompts
    return envs.load("metaworld", installed=False).spec(("MT50",), 0).prompts


def make_model(config: PretrainConfig, spec: EnvSpec, vocabulary: Path) -> torch.nn.Module:
    """Makes a vocabulary of all of Meta-World's prompts, and a model that knows it. Raises
    UserError where the model has no room for a prompt."""
    family = models.files(config.model)
    words = [family.wording(prompt) for prompt in instructions(config, spec)]
    tokenize.train_vocabulary(words, vocabulary)
    torch.manual_seed(config.seed)
    model = family.embedded(config.model, str(vocabulary))
    ends = {"state_low": [0.0] * spec.state_dim, "state_high": [1.0] * spec.state_dim}
    model.header = checkpoint.Header(
        config.model, asdict(model.config), ends, tokenize.fingerprint(vocabulary)
    )
    preparation = family.preparation(model.header, str(vocabulary))
    contract.check_prompts(preparation, spec)
    return model


def find_start(
    config: PretrainConfig, spec: EnvSpec, prompts: tuple[str, ...], folder: Path
) -> tuple[Path, str]:
    """Returns the weights to start from and their vocabulary: those of --checkpoint, or of a new
    model, made in `folder`, whose words are `prompts`."""
    _, shipped = embedded_files(config.model, config.env)
    if config.checkpoint:
        path = config.checkpoint
        return path, checkpoint.vocabulary(config.tokenizer, path, config.model, shipped)
    vocabulary = folder / shipped.name
    if config.env == "metaworld" and set(prompts) <= set(instructions(config, spec)):
        model = make_model(config, spec, vocabulary)
        checkpoint.save(folder / "new.safetensors", model.header, model.state_dict())
        return folder / "new.safetensors", str(vocabulary)
    views = len(config.cameras) or spec.views
    new = spec._replace(prompts=prompts, image_size=IMAGE_SIZE, views=views)
    sizes = (config.chunk or CHUNK, config.tokens or 0)
    weights, words = untrained.start(folder, config.model, new, new.state_range, *sizes)
    return weights, str(words)


def settings_of(config: PretrainConfig, path: Path, tokenizer: str) -> Config:
    """Returns the settings of the model to begin with, as train.py has them."""
    names = ("model", "chunk", "horizon", "tokens", "statistics", "env", "precision")
    given = {name: getattr(config, name) for name in names}
    asked = evaluate.EvaluateConfig(checkpoint=path, cameras=len(config.cameras), **given)
    actor = {"train_vlm": config.train_vlm or not config.checkpoint, "cache_prefix": "off"}
    actor |= {name: getattr(config, name) for name in ("lora_rank", "lora_alpha", "lora_targets")}
    words = Path(tokenizer) if tokenizer else None
    return completed(evaluate.settings_of(asked), seed=config.seed, tokenizer=words, **actor)


def choose_cameras(config: PretrainConfig, data: Demonstrations, views: int) -> tuple[str, ...]:
    """Returns the dataset's features that are the model's views."""
    for name in config.cameras:
        has = f"{data.folder} has no camera {name!r}: it has {', '.join(data.cameras)}"
        require(name in data.cameras, has)
    chosen = config.cameras or data.cameras
    says = f"the policy has {views} views and the dataset {len(chosen)} cameras"
    how = f"name those to use with --cameras, of {', '.join(data.cameras)}"
    require(len(chosen) == views, f"{says}: {how}")
    return chosen


def read_dataset(config: PretrainConfig, spec: EnvSpec) -> Demonstrations:
    """Opens --dataset and checks that it is of the simulator. Raises UserError."""
    data = Demonstrations(config.dataset, config.state, config.action)
    for what, found, wanted in (
        (data.state, data.shapes[0], spec.state_dim),
        (data.action, data.shapes[1], spec.action_dim),
    ):
        says = f"{what} of {data.folder} has {found[0]} numbers and --env {config.env} {wanted}"
        require(found == [wanted], f"{says}: give the --env that it is of, or another feature")
    tasks = dict.fromkeys(episode.task for episode in data.episodes)
    if config.tasks or config.suite:
        none = f"no episode of {data.folder} is of {', '.join(map(repr, spec.prompts))}"
        data.episodes = [episode for episode in data.episodes if episode.task in spec.prompts]
        require(data.episodes, f"{none}: it has {', '.join(map(repr, tasks))}")
        tasks = dict.fromkeys(episode.task for episode in data.episodes)
    frames = sum(len(episode.times) for episode in data.episodes)
    print(f"{data.folder}: {len(data.episodes)} episodes, {frames} frames, {len(tasks)} tasks")
    if spec.rate and spec.rate != data.fps:
        said = f"{data.fps:g} frames per second and {config.env} takes {spec.rate:g} control steps"
        print(f"note: it has {said}: each frame counts as one control step")
    asked = instructions(config, spec)
    if strange := [task for task in tasks if task not in asked]:
        said = f"{', '.join(map(repr, strange[:5]))}{' …' if len(strange) > 5 else ''}"
        whose = config.env if asked != spec.prompts else f"the tasks {', '.join(spec.tasks[:5])}"
        print(f"note: {said}: no instruction of {whose}")
    return data


def lesson_of(config: PretrainConfig, settings: Config, spec: EnvSpec, files: tuple) -> Lesson:
    """Puts together what learns and how, still without demonstrations. Raises UserError where it
    does not fit the simulator or the machine.

    files: weights to write, the vocabulary, and where that goes."""
    _, header, _ = models.held(settings, spec)
    count = machine.gpus() or PROCESSES
    odd = f"--batch {config.batch} does not divide into {count} equal parts, one for each GPU"
    require(config.batch % count == 0, odd)
    rank = header.shape.get("lora_rank") if config.lora_rank is None else config.lora_rank
    rate = FULL_SIZE_LR * (10 if rank else 1) if config.checkpoint else NEW_LR
    recomputes = {"auto": header.published, "on": True, "off": False}[config.checkpointing]
    lesson = Lesson(
        settings=settings,
        spec=spec,
        header=header,
        data=None,
        cameras=(),
        every=config.frame_every or (1 if config.dataset else 3),
        steps=config.steps,
        batch=config.batch,
        micro_batch=config.micro_batch or config.batch // count,
        checkpointing=recomputes,
        lr=config.lr or rate,
        seed=config.seed,
        out=files[0],
        vocabulary=files[1:],
        save_every=config.save_every,
        half=not config.checkpoint,
    )
    contract.check(lesson.preparation(), f"the preparation of {config.model!r}", contract.IMITATES)
    models.build(settings, spec, "meta", "none")  # which sees that model and simulator fit
    imitation.check_memory(lesson)
    return lesson


def from_demonstrations(config: PretrainConfig, lesson: Lesson, data: Demonstrations) -> Lesson:
    """Adds what is learned from, and its statistics. Raises UserError where it does not fit."""
    cameras = choose_cameras(config, data, lesson.header.shape["views"])
    lesson = replace(lesson, data=data, cameras=cameras)
    if not config.keep_statistics:
        stats = imitation.counted(data, lesson.preparation(), lesson.horizon)
        checkpoint.check_stats(config.model, stats, f"the statistics of {data.folder}")
        lesson = replace(lesson, header=lesson.header._replace(stats=stats))
    imitation.check_first_frames(lesson)
    return lesson


def files_of(config: PretrainConfig) -> tuple[Path, Path]:
    """Returns the files to write: weights and vocabulary. Raises UserError."""
    default, shipped = embedded_files(config.model, "metaworld")
    own = config.dataset is None and config.checkpoint is None
    require(config.out or own, "say with --out where to write the checkpoint: a folder or a file")
    out = config.out or default
    nowhere = f"the folder {out.parent} does not exist: create it or give another --out"
    require(out.parent.is_dir(), nowhere)
    if out.suffix != ".safetensors":
        return out / "model.safetensors", out / "tokenizer.model"
    return out, out.with_name(shipped.name) if own else out.with_suffix(".model")


@contextlib.contextmanager
def reserved(out: Path) -> Iterator[None]:
    """Lets this program alone write a checkpoint to `out`. Removes what one that was killed amidst
    a save has left. Raises UserError where another one writes there, or nobody can."""
    made = not out.parent.exists()
    check_writable(out, "the checkpoint", "--out")
    lock = out.with_name(f".{out.name}.lock")
    lock.touch()
    held = locked(lock, f"another pretrain.py is writing {out}: give another --out, or wait")
    try:
        # Not what is left of a vocabulary that several share: another program may be writing it.
        for file in (out, *imitation.unfinished_of(out)):
            for left in out.parent.glob(f".{glob.escape(file.name)}.*.partial"):
                left.unlink()
        yield
    finally:
        lock.unlink()
        os.close(held)
        if made:
            with contextlib.suppress(OSError):  # something was written
                out.parent.rmdir()


def check_free(config: PretrainConfig, out: Path, beside: Path, vocabulary: Path) -> None:
    """Raises UserError where a file is there that would become another, unless --overwrite."""
    both = beside.exists() and vocabulary.is_file()
    other = both and beside.read_bytes() != vocabulary.read_bytes()
    partial = imitation.partial_of(out)
    begun = partial.exists() and partial != config.checkpoint
    for file, lost in ((out, out.exists()), (beside, other), (partial, begun)):
        there = f"{file} exists already and would become another: give another --out"
        require(config.overwrite or not lost, f"{there}, or --overwrite")


def check_flags(config: PretrainConfig) -> None:
    """Raises UserError where flags contradict one another, or one would do nothing."""
    both = "--collect writes a dataset and --dataset reads one: leave out one of them"
    require(not (config.collect and config.dataset), both)
    plays = ("collect", "env", "tasks", "suite")
    learns = [name for name in PretrainConfig.__annotations__ if name not in plays]
    started = config.checkpoint is not None
    theirs = started and checkpoint.published(config.checkpoint)
    sized = theirs or not started and config.env != "metaworld"
    plain = PretrainConfig()
    for names, used, where in (
        (learns, not config.collect, "learning: leave out --collect"),
        (("video", "image_size"), config.collect, "what experts leave: give --collect"),
        (("cameras", "state", "action"), config.dataset, "a dataset: give --dataset"),
        (("demos", "pace", "action_noise"), not config.dataset, "experts: leave out --dataset"),
        (STARTED, started, "weights to start from: give --checkpoint"),
        (("horizon", "statistics"), theirs, "another project's weights: give --checkpoint"),
        (("chunk", "tokens"), sized, "another project's weights, or new ones of another --env"),
    ):
        idle = [flag_of(n) for n in names if getattr(config, n) != getattr(plain, n)]
        require(used or not idle, f"{', '.join(idle)}: only for {where}, or leave them out")
    only = f"--env {config.env} has no scripted experts: give --dataset FOLDER"
    require(config.dataset or config.env == "metaworld", only)


def main(config: PretrainConfig) -> None:
    """Makes a checkpoint and its vocabulary, or a dataset. Raises UserError."""
    check_ranges(config)
    check_flags(config)
    named = tuple(filter(None, (config.suite, *config.tasks)))
    tasks = named or (() if config.dataset else TASKS)
    spec = envs.load(config.env, installed=False).spec(tasks, config.image_size)
    if config.collect:
        gather(config, spec, config.collect)
        return
    out, beside = files_of(config)
    with tempfile.TemporaryDirectory() as name, reserved(out):
        # Find out what would go wrong at the end, then let the experts act.
        folder = Path(name)
        data = read_dataset(config, spec) if config.dataset else None
        prompts = dict.fromkeys(episode.task for episode in data.episodes) if data else spec.prompts
        path, words = find_start(config, spec, tuple(prompts), folder)
        settings = settings_of(config, path, words)
        spec = spec._replace(image_size=checkpoint.frame_size(path, spec.picture))
        vocabulary = Path(words or "none")
        check_free(config, out, beside, vocabulary)
        lesson = lesson_of(config, settings, spec, (out, vocabulary, beside))
        if data is None:
            contract.check_prompts(lesson.preparation(), spec.seen_by(lesson.header))
            config = replace(config, image_size=spec.image_size)
            gather(config, spec, folder / "demonstrations")
            data = Demonstrations(folder / "demonstrations")

        # Learn from what they did.
        lesson = from_demonstrations(config, lesson, data)
        done = imitation.learn(lesson)
    if not done:
        print(f"interrupted: --checkpoint {imitation.partial_of(out)} goes on from these weights")
        raise SystemExit(130)
    print(f"wrote {out}{f' and {beside}' if beside.exists() else ''}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends it as Ctrl-C does
    with exit_on_user_error():
        main(expanded(tyro.cli(PretrainConfig)))
