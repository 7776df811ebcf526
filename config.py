"""Every setting, one dataclass per stage; presets; what must hold between settings.

    python train.py --help

`--preset` names a row of RL-VLA³'s Table 1 and sets five defaults, which flags override; the
defaults written here are the row `full`. Left out: any second way to configure (no files, no
environment variables).
"""

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).parent
ASSETS = ROOT / "assets"
Family = Literal["pi0", "pi05", "gr00t", "oft"]  # what --model takes; files in models/
Simulator = Literal[
    "metaworld", "libero", "maniskill", "robocasa"
]  # what --env takes; files of these names in envs/


class UserError(Exception):
    """A mistake of the user's. The message is one sentence saying what is wrong and what to do."""


def require(condition: object, sentence: str) -> None:
    """Raises UserError with this sentence unless the condition holds."""
    if not condition:
        raise UserError(sentence)


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turns a UserError into one line on stderr and exit status 2."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


@dataclass(kw_only=True, slots=True)
class RunConfig:
    model: Literal[Family, "emulated"] = "pi05"
    """policy family; `emulated` sleeps for calibrated times, to measure the pipeline alone"""
    env: Literal[Simulator, "emulated", "emulated_gr00t", "vectorised"] = "metaworld"
    """simulator; `emulated`, `emulated_gr00t` and `vectorised` sleep for calibrated times, to
    measure the pipeline alone
    """
    tasks: tuple[str, ...] = ()
    """tasks of the simulator; none means its default task set"""
    suite: str = ""
    """a suite of the simulator (libero_10, …): all of its tasks, beside --tasks"""
    algorithm: Literal["ppo", "grpo"] = "ppo"
    """decoupled PPO, which is PPO when the staleness is 0; or GRPO: no critic, trajectories
    compared within groups
    """
    preset: Literal[
        "sync-colocated", "sync-disaggregated", "train-async", "rollout-async", "full"
    ] = "full"
    """row of RL-VLA³'s Table 1: defaults of placement, max-staleness, batch-max, batch-wait-ms and
    stream
    """
    ratio: str = "3:1"
    """R:A, parts for env + rollout against parts for actors (GPUs; without them worker processes
    and threads); auto measures what stages cost, chooses, and chooses again as costs change
    """
    ratio_from: str = ""
    """R:A that --ratio auto begins with; empty means 3:1 where it fits. config.json has what a run
    came to
    """
    workers_given: tuple[int, int, int] = field(default=(0, 0, 0), init=False)
    """no flag: env, rollout and actor workers that flags gave beside --ratio auto, for a resumed
    run; 0 where it derives them
    """
    placement: Literal["colocated", "disaggregated", "hybrid"] = "disaggregated"
    """colocated shares devices in turn, disaggregated splits them by --ratio, hybrid also separates
    env from rollout
    """
    iterations: int = 60
    """optimizer iterations: batches trained; a resumed run counts from its start"""
    seed: int = 1
    """seed of episodes, noise and minibatches"""
    run: str = ""
    """name of the run folder under runs/, or a path with a slash; empty means date and time"""
    resume: str = ""
    """run folder (name or path) to continue from its newest checkpoint; its saved settings apply"""
    checkpoint: Path | None = None
    """weights to start from, ours or another project's: a .safetensors file or a folder; none means
    the embedded default's
    """
    tokenizer: Path | None = None
    """SentencePiece file (published GR00T: Qwen's vocabulary); none means the embedded default's or
    the checkpoint's
    """
    statistics: str = ""
    """which statistics of a checkpoint folder to use, where it has several: OFT's unnorm key,
    GR00T's embodiment tag, π's folder
    """
    checkpoint_every: int = 20
    """iterations between checkpoints; there is always one at the end"""
    wandb: Literal["online", "offline", "off"] = "off"
    """mirror metrics to Weights & Biases"""
    trace: bool = True
    """record a span per unit of work and per wait, for trace.json and swimlane.png"""
    memory_report: bool = False
    """print the size of each memory pool, then exit"""
    timeout_s: float = 120.0
    """seconds without a sign of life after which a worker counts as hung: an env worker is
    replaced, another one ends the run
    """

    @property
    def parts(self) -> str:
        """R:A in use."""
        return (self.ratio_from or "3:1") if self.ratio == "auto" else self.ratio


@dataclass(kw_only=True, slots=True)
class EnvConfig:
    envs: int = 24
    """simulators that ask for actions; each keeps its task if the number of tasks divides theirs,
    else they take turns
    """
    env_workers: int = 0
    """processes that step them; 0 derives it from --ratio"""
    lanes: int = 0
    """of a vectorised simulator: lanes per env worker, in which envs step together; 0 means 2, so
    that one steps while one waits
    """
    image_size: int = 0
    """pixels of the cameras, square; 0 means as the checkpoint's model takes them (another
    project's: 256, which it resizes)
    """
    render_quality: Literal["fast", "full"] = "fast"
    """full draws the simulator's own picture; fast leaves out shadows, smooth edges and detail too
    small to see (LIBERO)
    """
    segment: int = 0
    """T, chunk steps of a trajectory; 0 means one horizon"""
    restarts: int = 5
    """how often in an hour each env worker is replaced, 1, 2, 4 … seconds after it failed, before
    the run ends; 0 means never
    """
    eval_envs: int = 4
    """lanes that only evaluate, on seeds never trained on; they never hold up the others before the
    run ends
    """
    eval_episodes: int = 24
    """episodes of one evaluation, spread evenly over tasks"""
    eval_every: int = 10
    """iterations between evaluations, of which the last version always gets one; 0 means never"""

    @property
    def evaluates(self) -> bool:
        return min(self.eval_envs, self.eval_every, self.eval_episodes) > 0

    @property
    def width(self) -> int:
        """Envs of a lane."""
        return self.envs // (self.env_workers * self.lanes) if self.lanes else 1

    @property
    def eval_width(self) -> int:
        """Envs of an evaluation lane: of a vectorised simulator, every env worker has one, or else
        the first has them all.
        """
        if not self.lanes:
            return 1
        return (
            self.eval_envs
            if self.eval_envs % self.env_workers
            else max(1, self.eval_envs // self.env_workers)
        )


@dataclass(kw_only=True, slots=True)
class RolloutConfig:
    rollout_workers: int = 0
    """inference processes; 0 derives it from --ratio"""
    batch_max: int | Literal["auto", "all"] = "auto"
    """B_max of eq. 1: infer when so many requests are queued; all is lockstep; auto begins with
    half the lanes served, then measures and chooses (tuning.py)
    """
    batch_wait_ms: float | Literal["auto"] = "auto"
    """T_max of eq. 1 in milliseconds since the first queued request (inf: no limit); auto begins
    with half of one inference, then measures and chooses
    """
    chunk: int = 10
    """C, control steps per inference (π0.5 LIBERO: 10)"""
    tokens: int | None = None
    """L, prompt length in tokens; none, here and below, means as the checkpoint says (embedded:
    24)
    """
    denoise_steps: int | None = None
    """N, flow-matching steps (RL-VLA³ and embedded: 4)"""
    noise_level: float | None = None
    """a of Flow-SDE (RLinf: 0.5, over all denoise steps; embedded: 1)"""
    sde_steps: int | None = None
    """one denoise step per sample is stochastic, drawn from this many last ones (RLinf: all;
    embedded: 1)
    """
    temperature: float | None = None
    """of OFT's action tokens (RLinf on LIBERO: 1.6); none means as the checkpoint says"""
    noise: Literal["sde", "network"] = "sde"
    """of π0 and π0.5: Flow-SDE, or Flow-Noise: a small learned network gives the standard deviation
    (πRL arXiv 2510.25889)
    """
    prefix_dtype: Literal["float32", "bfloat16"] = "float32"
    """of a frozen VLM, and of what slots keep of it (OFT's dtype is the checkpoint's)"""

    compile: bool | None = None
    """torch.compile inference, for batches padded to powers of two: minutes at start-up; none means
    where there is a GPU
    """


@dataclass(kw_only=True, slots=True)
class ActorConfig:
    actor_workers: int = 0
    """training processes, which average gradients; 0 derives it from --ratio"""
    max_staleness: int = 1
    """K: a trajectory of batch b may start once version b − K is published; 0 is synchronous"""
    extra_staleness: int = 0
    """versions by which the weights that act are held back, on purpose: to study what staleness
    does
    """
    stream: bool = True
    """train micro-batches as their trajectories complete, instead of waiting for the whole batch"""
    batch: int = 48
    """trajectories of one iteration; a multiple of --envs"""
    minibatch: int = 24
    """trajectories of one optimizer step"""
    micro_batch: int = 2
    """trajectories of one forward and backward pass"""
    update_epochs: int = 2
    """passes over a batch (RL-VLA³, π0.5 on LIBERO: 1)"""
    lr: float = 1.5e-4
    """AdamW learning rate of the action expert"""
    warmup: int = 5
    """iterations over which learning rates rise from 0: Adam's first steps are as large as its
    later ones, and less right
    """
    value_lr: float = 1e-3
    """AdamW learning rate of the value head"""
    anneal: bool = True
    """lower learning rates linearly to 0 over the second half of --iterations, so that the last
    policy is a settled one
    """
    weight_decay: float = 0.01
    """AdamW (RLinf: 0.01)"""
    grad_clip: float = 1.0
    """largest gradient norm (RLinf: 1.0)"""
    train_vlm: bool = False
    """also update the image tower and the prefix; False is the published recipe and lets slots hold
    their keys and values
    """
    oft_train: Literal["lora", "full"] | None = None
    """what of OFT is updated; none means as the checkpoint says, LoRA for another project's"""
    cache_prefix: bool = True
    """with a frozen VLM: keep its keys and values in the slots; False computes them again in every
    epoch, for want of memory
    """


@dataclass(kw_only=True, slots=True)
class AlgorithmConfig:
    gamma: float = 0.9
    """discount per chunk step (RLinf: 0.99); 0.9 rewards being quick, so every chunk says
    something, not only an episode's end
    """
    gae_lambda: float = 0.95
    """λ of GAE"""
    bootstrap_truncated: bool = False
    """the time limit cuts an episode and does not fail it: its return goes on with the value of its
    last observation (RLinf: on)
    """
    granularity: Literal["chunk", "action", "token"] = "chunk"
    """what the policy ratio is taken of: a whole chunk (π0.5), each action, or each number or token
    (RLinf: OFT)
    """
    clip_low: float = 0.2
    """ε of the clipped policy objective, for falling probabilities"""
    clip_high: float = 0.2
    """ε for rising ones (RLinf's GRPO of OFT: 0.28)"""
    dual_clip: float = 0.0
    """c: bounds the objective of negative advantages by c·A (3 where it is used); 0 means off"""
    proximal: Literal["auto", "interpolated", "exact", "behaviour"] = "auto"
    """decoupled PPO's proximal log-prob: interpolated between old and new by staleness; exact,
    under the weights before a batch's first update; or that of the policy that acted, which is
    plain PPO. auto: exact where samples may be over 2 versions old
    """
    behaviour_weight_max: float = 5.0
    """decoupled PPO: largest behaviour weight (AReaL: 5)"""
    behaviour_weight: Literal["mask", "truncate"] = "mask"
    """what happens to samples above it"""
    kl_stop: float = 0.0
    """no further epochs over a batch once a minibatch's KL from the policy that acted exceeds this;
    0 means never
    """
    critic_warmup: int = 0
    """iterations in which only the value head learns"""
    value_clip: float = 0.2
    """largest change of a value estimate per update before its loss is clipped"""
    value_weight: float = 1.0
    """weight of the value loss"""
    huber: float = 10.0
    """δ of the value loss (RLinf: 10)"""
    group_size: int = 8
    """G of GRPO: lanes that begin each trajectory in the same state (RLinf: 8)"""
    group_low: float = 0.1
    """GRPO: a group whose success rate lies below this is not trained on (RLinf: 0.1)"""
    group_high: float = 0.9
    """GRPO: nor one above this (RLinf: 0.9)"""
    advantage_memory: float = 0.8
    """decay of the running mean square, over earlier batches, that scales advantages"""


@dataclass(kw_only=True, slots=True)
class Config:
    """RL post-training of vision-language-action models that never waits.

    Without flags: a small π0.5 learns Meta-World tasks from camera images by asynchronous PPO, on
    this machine.
    """

    train: RunConfig = field(default_factory=RunConfig)
    env: EnvConfig = field(default_factory=EnvConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)

    @property
    def exact_proximal(self) -> bool:
        """Whether another forward gives the proximal log-prob. Interpolated, three of five runs
        held back by 4 versions came to less than 80 %, and none with it
        (benchmarks/results/equivalence.md).
        """
        stale = self.actor.max_staleness + self.actor.extra_staleness > 2
        return self.algorithm.proximal == "exact" or self.algorithm.proximal == "auto" and stale


# placement, max_staleness, batch_max, batch_wait_ms, stream: each row changes one thing of the row
# above.
PRESETS = {
    "sync-colocated": ("colocated", 0, "all", math.inf, False),
    "sync-disaggregated": ("disaggregated", 0, "all", math.inf, False),
    "train-async": ("disaggregated", 1, "all", math.inf, False),
    "rollout-async": ("disaggregated", 1, "auto", "auto", False),
    "full": ("disaggregated", 1, "auto", "auto", True),
}


def from_preset(name: str) -> Config:
    """The defaults under a preset."""
    config = Config()
    config.train.preset = name
    (
        config.train.placement,
        config.actor.max_staleness,
        config.rollout.batch_max,
        config.rollout.batch_wait_ms,
        config.actor.stream,
    ) = PRESETS[name]
    return config


PI = ("pi0", "pi05")
FLOW = ("pi0", "pi05", "gr00t")
FAMILIES_OF = {  # flags that mean something to some families only
    "noise": PI,
    "prefix_dtype": FLOW,
    "denoise_steps": FLOW,
    "noise_level": FLOW,
    "sde_steps": FLOW,
    "train_vlm": FLOW,
    "cache_prefix": FLOW,
    "temperature": ("oft",),
    "oft_train": ("oft",),
}


def embedded_files(model: str) -> tuple[Path, Path]:
    """Checkpoint and vocabulary of a family's embedded default; OFT's prompts have words of their
    own.
    """
    return ASSETS / f"{model}_metaworld.safetensors", ASSETS / (
        "tokenizer_oft.model" if model == "oft" else "tokenizer.model"
    )


def to_json(config: Config) -> str:
    """Standard JSON: infinity, which it lacks, is written as "inf"."""
    stages = asdict(config)
    for values in stages.values():
        values |= {name: "inf" for name, value in values.items() if value == math.inf}
    return json.dumps(stages, indent=1, default=str, allow_nan=False)


def run_path(name: str) -> Path:
    """runs/NAME, or the path itself when it is one."""
    return Path(name) if "/" in name else ROOT / "runs" / name


def existing_run(name: str) -> Path:
    """The same of a run that exists. Raises UserError, which names those that do."""
    path = run_path(name)
    if not path.is_dir():
        have = sorted(folder.name for folder in (ROOT / "runs").glob("*/")) or ["none"]
        raise UserError(f"there is no run {path}: runs/ holds {', '.join(have[-8:])}")
    return path


def from_json(path: Path) -> Config:
    """A run's config.json. Raises UserError when it is not one."""
    try:
        saved = json.loads(path.read_text())
        config = Config()
        for stage_name, values in saved.items():
            stage = getattr(config, stage_name)
            for name, value in values.items():
                if name in ("tasks", "workers_given"):
                    value = tuple(value)
                elif name in ("checkpoint", "tokenizer") and value is not None:
                    value = Path(value)
                elif name == "batch_wait_ms" and value == "inf":
                    value = math.inf
                getattr(stage, name)  # one that there is
                setattr(stage, name, value)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"cannot read the settings of the run in {path}: {error}") from None
    return config


def parse_ratio(ratio: str, flag: str = "--ratio") -> tuple[int, int]:
    """ "3:1" → (3, 1). Raises UserError, which names the flag."""
    left, colon, right = ratio.partition(":")
    if not (colon and left.isdecimal() and right.isdecimal() and int(left) > 0 and int(right) > 0):
        nor = ", nor auto" if flag == "--ratio" else ""
        raise UserError(
            f"{flag} {ratio!r} is not R:A with two whole numbers of at least 1, such as 3:1{nor}"
        )
    return int(left), int(right)


def validate(config: Config) -> None:
    """What must hold between settings once presets are applied and worker counts known. Raises
    UserError.
    """
    env = config.env
    actor = config.actor
    ranks = config.actor.actor_workers
    positive = {
        "--iterations": config.train.iterations,
        "--envs": env.envs,
        "--batch": actor.batch,
        "--minibatch": actor.minibatch,
        "--micro-batch": actor.micro_batch,
        "--update-epochs": actor.update_epochs,
        "--chunk": config.rollout.chunk,
        "--checkpoint-every": config.train.checkpoint_every,
        "--timeout-s": config.train.timeout_s,
    }
    for flag, value in positive.items():
        if value <= 0:
            raise UserError(f"{flag} {value} must be at least 1")
    default = Config()
    for name, families in FAMILIES_OF.items():
        stage = "rollout" if hasattr(config.rollout, name) else "actor"
        changed = getattr(getattr(config, stage), name) != getattr(getattr(default, stage), name)
        if changed and config.train.model not in (*families, "emulated"):
            raise UserError(
                f"--{name.replace('_', '-')} means something to {', '.join(families)}, not to "
                f"{config.train.model}"
            )
    for flag, value in (
        ("--tokens", config.rollout.tokens),
        ("--denoise-steps", config.rollout.denoise_steps),
    ):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value} must be at least 1")
    if config.actor.train_vlm and config.rollout.prefix_dtype != "float32":
        raise UserError(
            "--prefix-dtype bfloat16 is for a frozen VLM: leave out --train-vlm, or give "
            "--prefix-dtype float32"
        )
    if config.rollout.temperature is not None and not config.rollout.temperature > 0:
        raise UserError(f"--temperature {config.rollout.temperature} must be more than 0")
    if config.train.seed < 0:
        raise UserError(f"--seed {config.train.seed} must be 0 or more")
    for flag, value in (
        ("--max-staleness", actor.max_staleness),
        ("--extra-staleness", actor.extra_staleness),
    ):
        if value < 0:
            raise UserError(f"{flag} {value} must be 0 or more")
    if actor.extra_staleness and env.evaluates:
        raise UserError(
            "--extra-staleness makes evaluations meet old weights: add --eval-every 0, and use "
            "evaluate.py afterwards"
        )
    if config.rollout.batch_max not in ("auto", "all") and config.rollout.batch_max < 1:
        raise UserError(f"--batch-max {config.rollout.batch_max} must be at least 1")
    if config.rollout.batch_wait_ms != "auto" and not config.rollout.batch_wait_ms >= 0:
        raise UserError(f"--batch-wait-ms {config.rollout.batch_wait_ms} must be 0 or more")
    grouped = config.train.algorithm == "grpo"
    size = config.algorithm.group_size if grouped else 1
    if grouped and size < 2:
        raise UserError(
            f"--group-size {size} must be at least 2: GRPO compares trajectories with each other"
        )
    for flag, given in (
        ("--bootstrap-truncated", config.algorithm.bootstrap_truncated),
        (f"--critic-warmup {config.algorithm.critic_warmup}", config.algorithm.critic_warmup),
    ):
        if grouped and given:
            raise UserError(
                f"{flag} needs a critic, and GRPO has none: leave it out, or give --algorithm ppo"
            )
    if not 0.0 <= config.algorithm.group_low <= config.algorithm.group_high <= 1.0:
        raise UserError(
            "--group-low and --group-high must be success rates, and the first not above the second"
        )
    for flag, value in (
        ("--clip-low", config.algorithm.clip_low),
        ("--clip-high", config.algorithm.clip_high),
    ):
        if not value > 0:
            raise UserError(f"{flag} {value} must be more than 0")
    if config.algorithm.dual_clip and config.algorithm.dual_clip <= 1:
        raise UserError(
            f"--dual-clip {config.algorithm.dual_clip} must be more than 1, or 0 for off"
        )
    for flag, value, good in (
        ("--lr", actor.lr, actor.lr > 0),
        ("--value-lr", actor.value_lr, actor.value_lr > 0),
        ("--grad-clip", actor.grad_clip, actor.grad_clip > 0),
        ("--weight-decay", actor.weight_decay, actor.weight_decay >= 0),
        ("--gamma", config.algorithm.gamma, 0 < config.algorithm.gamma <= 1),
        ("--gae-lambda", config.algorithm.gae_lambda, 0 <= config.algorithm.gae_lambda <= 1),
        (
            "--noise-level",
            config.rollout.noise_level,
            config.rollout.noise_level is None or config.rollout.noise_level > 0,
        ),
    ):
        if not good:
            raise UserError(
                f"{flag} {value} is out of range: see `python train.py --help` for what it means"
            )
    if env.lanes < 0 or env.lanes and env.envs % (env.env_workers * env.lanes):
        raise UserError(
            f"--envs {env.envs} cannot be split evenly into {env.lanes} lanes of each of "
            f"{env.env_workers} env workers"
        )
    if grouped and max(size, env.width) % min(size, env.width):
        raise UserError(
            f"--group-size {size} and the {env.width} envs of a lane must divide one another"
        )
    whole = ranks * max(size, env.width)
    together = f"{size} envs of a group" if size > env.width else f"{env.width} envs of a lane"
    for flag, total, parts, what in (
        ("--envs", env.envs, size, "--group-size"),
        ("--batch", actor.batch, env.envs, "--envs"),
        ("--batch", actor.batch, actor.minibatch, "--minibatch"),
        (
            "--minibatch",
            actor.minibatch,
            ranks * actor.micro_batch,
            f"--micro-batch × {ranks} actor workers",
        ),
        ("--minibatch", actor.minibatch, size, "--group-size"),
        (
            "--minibatch",
            actor.minibatch,
            whole if ranks > 1 else 1,
            f"{together} × {ranks} actor workers",
        ),
    ):
        if total % parts:
            raise UserError(
                f"{flag} {total} is not divisible by {what} ({parts}): choose {flag} as a multiple "
                "of it"
            )
    if env.env_workers > env.envs:
        raise UserError(
            f"{env.env_workers} env workers have only {env.envs} envs: give --envs at least "
            f"{env.env_workers}"
        )
    if config.rollout.rollout_workers > env.envs // env.width:
        raise UserError(
            f"{config.rollout.rollout_workers} rollout workers have only {env.envs // env.width} "
            "lanes: raise --envs"
        )
    if (
        min(
            env.image_size,
            env.segment,
            env.restarts,
            env.eval_every,
            env.eval_envs,
            env.eval_episodes,
        )
        < 0
    ):
        raise UserError(
            "--image-size, --segment, --restarts, --eval-every, --eval-envs and --eval-episodes "
            "must be 0 or more"
        )
    workers = env.env_workers + config.rollout.rollout_workers + ranks
    if workers > 120:  # two file descriptors each, and the fork server takes 256 at once
        raise UserError(
            f"{workers} workers are more than one machine can start (120): lower --env-workers"
        )
