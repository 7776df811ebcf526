"""Every setting, one dataclass per stage; presets; runs and their config.json by name.

`python train.py --help` shows them. Left out: configuring by files or environment variables.
"""

import copy
import json
import math
import os
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import BeforeValidator, Field

from checks import (
    AboveZero,
    Bound,
    Count,
    Fraction,
    FromZero,
    Length,
    Limit,
    Natural,
    Positive,
    Share,
    read_json,
)
from errors import require

ROOT = Path(__file__).parent
ASSETS = ROOT / "assets"
Family = Literal["pi0", "pi05", "gr00t", "oft"]  # what --model takes; files in models/
Preset = Literal[
    "sync-colocated", "sync-disaggregated", "train-async", "rollout-async", "full", "full-colocated"
]


class Only(tuple[str, ...]):
    """Who knows a setting, written beside its field; others refuse it. Names of model families or
    losses, or what a loss must have: "critic" or "groups". A new family or loss adds its name."""


FLOW = Only(("pi0", "pi05", "gr00t"))
PI = Only(("pi0", "pi05"))
OFT = Only(("oft",))
LOSS_HAS = {"critic": "a critic", "groups": "groups of trajectories"}
CRITIC = Only(("critic",))
GROUPS = Only(("groups",))


def prefix_place(place: Any) -> Any:
    """Reads --cache-prefix of a config.json that was written when it was yes or no."""
    return {True: "auto", False: "off"}.get(place, place)


@dataclass(kw_only=True, slots=True)
class RunConfig:
    model: Literal[Family, "emulated"] = "pi05"
    """policy family; `emulated` sleeps for calibrated times, to measure the pipeline alone"""
    env: str = "metaworld"
    """simulator: metaworld, libero, maniskill, robocasa, or a new one (envs/__init__.py);
    `emulated`, `vectorised` and those of benchmarks/emulated sleep as the policy `emulated` does"""
    tasks: tuple[str, ...] = ()
    """tasks of the simulator; none means its default task set"""
    suite: str = ""
    """a suite of the simulator (libero_10, …): all of its tasks, beside --tasks"""
    algorithm: Literal["ppo", "grpo"] = "ppo"
    """decoupled PPO (PPO at staleness 0), or GRPO: no critic, trajectories compared in groups"""
    preset: Preset = "full"
    """row of RL-VLA³'s Table 1, or its second version's full-colocated: placement, max-staleness,
    batch-max, batch-wait-ms and stream"""
    recipe: str = ""
    """published settings as defaults, by name (docs/recipes.md); empty means none"""
    ratio: str = "3:1"
    """R:A: R parts of the machine for env and rollout workers, A for actor workers. Parts are GPUs,
    or without them processes and threads. auto chooses by measured costs, again as they change"""
    ratio_from: str = ""
    """R:A that --ratio auto begins with; empty means 3:1 where it fits. config.json holds the one
    that a run uses last"""
    workers_given: Annotated[tuple[int, int, int], tyro.conf.Suppress] = (0, 0, 0)
    """no flag: worker counts given beside --ratio auto, for a resumed run; 0 where it decides"""
    nodes: Annotated[Positive, tyro.conf.Suppress] = 1
    """no flag: machines that train together; torchrun says how many"""
    node: Annotated[Natural, tyro.conf.Suppress] = 0
    """no flag: which of them this is"""
    placement: Literal["colocated", "disaggregated", "hybrid"] = "disaggregated"
    """colocated shares devices in turn, disaggregated splits them by --ratio, hybrid also separates
    env from rollout"""
    iterations: Positive = 60
    """optimizer iterations: batches trained; a resumed run counts from its start"""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 1
    """seed of episodes, noise and minibatches"""
    run: str = ""
    """name of the run folder under runs/, or a path with a slash; empty means date and time"""
    resume: str = ""
    """run folder (name or path) to continue from its newest checkpoint; its saved settings apply"""
    resume_or_start: str = ""
    """--resume where this run has a checkpoint, else --run: for a job that may be queued again"""
    checkpoint: Path | None = None
    """weights to start from, ours or another project's: a .safetensors file or a folder. None means
    those shipped for the simulator, or random ones where none are shipped"""
    adapter: Path | None = None
    """a folder of PEFT's, whose low-rank adapter is put on the checkpoint, and trained on"""
    tokenizer: Path | None = None
    """SentencePiece file (published GR00T: Qwen's vocabulary); none means the one that belongs to
    the checkpoint"""
    statistics: str = ""
    """which of a checkpoint's statistics: OFT's unnorm key, GR00T's embodiment tag, π's folder"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """what networks compute in, in rollouts and actors alike. With bfloat16 the weights that learn,
    gradients, optimizer, norms, softmax, log-probs, heads and losses stay float32, whose products
    on a GPU are TF32. auto: bfloat16 on GPUs, float32 on a CPU; config.json holds the choice"""
    checkpoint_every: Positive = 20
    """iterations between checkpoints; there is always one at the end"""
    keep: Natural = 0
    """newest checkpoints that stay; 0 keeps all"""
    wandb: Literal["online", "offline", "off"] = "off"
    """mirror metrics to Weights & Biases"""
    trace: bool = True
    """record a span per unit of work and per wait, for trace.json and swimlane.png"""
    film: bool = True
    """film a held-out episode of each task, of those that the first node plays a dozen, with the
    first and the newest policy, for videos/"""
    watch: bool = False
    """write report.html also while the run goes on, after an iteration, every 10 s or so; a browser
    that shows it follows"""
    memory_report: bool = False
    """print what every process takes (memory.py), and the slots in detail, then exit"""
    timeout_s: Annotated[float, Field(gt=0, le=10**6)] = 120.0
    """seconds without a sign of life after which a worker counts as hung. An env or rollout worker
    is then replaced; an actor worker ends the run"""

    @property
    def parts(self) -> str:
        """R:A in use."""
        return (self.ratio_from or "3:1") if self.ratio == "auto" else self.ratio


@dataclass(kw_only=True, slots=True)
class EnvConfig:
    envs: Positive = 24
    """simulators of a node; each keeps its task if the number of tasks divides those of all nodes,
    else they alternate"""
    env_workers: Natural = 0
    """processes that step them; 0: beside GPUs all cores but two for each GPU, otherwise (and for a
    vectorised simulator) by --ratio"""
    lanes: Natural = 0
    """lanes per env worker of a vectorised simulator, whose envs step together. 0 means 2: one
    steps while the other waits"""
    image_size: Annotated[int, Field(ge=0, le=4096)] = 0
    """width and height of the pictures in pixels; 0 means what the checkpoint's model takes (of
    another project's: its data's own size in this simulator, which it resizes)"""
    cameras: Natural = 0
    """cameras whose pictures the policy sees, the simulator's first ones; 0 means as many as the
    checkpoint was trained with"""
    render_quality: Literal["fast", "full"] = "fast"
    """full draws the simulator's own picture; fast leaves out shadows, smooth edges and details too
    small to see (LIBERO)"""
    segment: Natural = 0
    """T, chunk steps of a trajectory; 0 means one horizon"""
    restarts: Natural = 5
    """how often in an hour (or twice the time that so many hangs take to be seen, where that is
    longer) each env and each rollout worker is replaced, 1, 2, 4 … seconds after it failed, before
    the run ends; 0 means never"""
    eval_envs: Natural = 4
    """lanes of a node that only evaluate, on seeds never trained on, and hold up nobody before the
    end"""
    eval_episodes: Natural = 24
    """episodes of one evaluation, spread evenly over tasks, and over all nodes"""
    eval_every: Natural = 10
    """iterations between evaluations, of which the last version always gets one; 0 means never"""
    train_states: str = ""
    """which of LIBERO's initial states (50 of each task) training begins at, such as 0-39 or
    0-9,20-49; empty means those that --eval-states leaves, or without it all"""
    eval_states: str = ""
    """which ones evaluation begins at; empty means those that --train-states leaves, or without it
    all"""

    @property
    def evaluates(self) -> bool:
        return min(self.eval_envs, self.eval_every, self.eval_episodes) > 0

    @property
    def width(self) -> int:
        """Envs of a lane."""
        return self.envs // (self.env_workers * self.lanes) if self.lanes else 1

    @property
    def eval_width(self) -> int:
        """Envs of an evaluation lane. A vectorised simulator has one in each worker, or if they do
        not divide evenly one in the first."""
        if not self.lanes:
            return 1
        if self.eval_envs % self.env_workers:
            return self.eval_envs
        return max(1, self.eval_envs // self.env_workers)


@dataclass(kw_only=True, slots=True)
class RolloutConfig:
    rollout_workers: Natural = 0
    """inference processes; 0 derives it from --ratio"""
    batch_max: Positive | Literal["auto", "all"] = "auto"
    """B_max of eq. 1: infer when this many requests are queued. all is lockstep; auto begins with
    half of the lanes, then measures and chooses (tuning.py)"""
    batch_wait_ms: Limit | Literal["auto"] = "auto"
    """T_max of eq. 1: infer this many milliseconds after the first request was queued (inf: no
    limit). auto begins with half of one inference, then measures and chooses"""
    chunk: Positive = 10
    """C, control steps per inference (π0.5 LIBERO: 10)"""
    tokens: Length | None = None
    """L, prompt length in tokens. None, here and below: as the checkpoint says (shipped: 24)"""
    horizon: Positive | None = None
    """actions that the model predicts at once, where another project's checkpoint does not say"""
    denoise_steps: Annotated[Count | None, FLOW] = None
    """N, flow-matching steps (RL-VLA³ and shipped: 4)"""
    noise_level: Annotated[AboveZero | None, FLOW] = None
    """a of Flow-SDE (RLinf: 0.5, over all denoise steps; shipped: 1)"""
    sde_steps: Annotated[Count | None, FLOW] = None
    """a sample's stochastic denoise step is drawn from this many last (RLinf: all; shipped: 1)"""
    temperature: Annotated[Bound | None, OFT] = None
    """temperature of OFT's action tokens (RLinf on LIBERO: 1.6)"""
    center_crop: Annotated[bool | None, OFT] = None
    """OFT sees the middle 0.9 of a picture (openvla-oft: yes; RLinf: no)"""
    stop_token: Annotated[bool | None, OFT] = None
    """</s> stands after OFT's action tokens (openvla-oft: yes; RLinf: no)"""
    noise: Annotated[Literal["sde", "network"], PI] = "sde"
    """exploration of π0 and π0.5: Flow-SDE, or Flow-Noise, whose standard deviation a small network
    learns (πRL, arXiv 2510.25889)"""
    prefix_dtype: Annotated[Literal["float32", "bfloat16"] | None, FLOW] = None
    """dtype of a VLM that is frozen, but for adapters, and of what slots keep of it (OFT's is the
    checkpoint's); none means as --precision"""
    compile: bool | None = None
    """compile inference with torch.compile, at start-up; on a GPU it also becomes CUDA graphs, for
    batches padded to a few sizes. None means where there is a GPU"""


@dataclass(kw_only=True, slots=True)
class ActorConfig:
    actor_workers: Natural = 0
    """training processes, which average gradients; 0 derives it from --ratio"""
    shard: bool = False
    """each actor worker holds a part of all weights, gradients and optimizer state (FSDP2): for
    models that do not fit one GPU. A run may be resumed with or without it"""
    max_staleness: Natural = 1
    """K: a trajectory of batch b may start once version b − K is published; 0 is synchronous"""
    extra_staleness: Natural = 0
    """versions by which the weights that act are held back, to study what staleness does"""
    stream: bool = True
    """train micro-batches as their trajectories complete, instead of waiting for the whole batch"""
    batch: Positive = 48
    """trajectories of one iteration that a node plays; a multiple of --envs"""
    minibatch: Positive = 24
    """a node's trajectories of one optimizer step, about: a batch is cut into parts as even as can
    be"""
    micro_batch: Positive | Literal["auto"] = "auto"
    """chunk steps of one forward and backward pass of an actor worker, fewer only where a minibatch
    ends (RL-VLA³ on LIBERO: 32 to 128); auto: as many as fit, of 1, 2, 4 … 128; without a
    GPU two trajectories'"""
    chunk_share: Fraction = 1.0
    """share of each trajectory's chunk steps that is trained on, drawn for all epochs of a batch.
    The loss is divided by it, so the gradient's mean is that of all (arXiv 2605.16154: 12 of 64,
    drawn by phases, and not divided)"""
    checkpointing: Literal["auto", "on", "off"] = "auto"
    """keep only the input of each block for the backward pass, which computes the rest again: less
    memory for a third more time; auto: where fewer than 16 chunk steps would fit without"""
    update_epochs: Positive = 2
    """passes over a batch (RL-VLA³, π0.5 on LIBERO: 1)"""
    lr: AboveZero = 1.5e-4
    """AdamW learning rate of the action expert"""
    warmup: Natural = 5
    """iterations in which learning rates rise from 0: Adam's first steps are the least right"""
    value_lr: Annotated[AboveZero, CRITIC] = 1e-3
    """AdamW learning rate of the value head"""
    anneal: bool = True
    """lower learning rates linearly to 0 over the second half of --iterations"""
    weight_decay: FromZero = 0.01
    """AdamW (RLinf: 0.01)"""
    grad_clip: Bound = 1.0
    """largest gradient norm (RLinf: 1.0)"""
    train_vlm: Annotated[bool, FLOW] = False
    """also update the image tower and the prefix, which the published recipe does not"""
    oft_train: Annotated[Literal["lora", "full"] | None, OFT] = None
    """what of OFT is updated; none means what the checkpoint says (another project's: LoRA)"""
    lora_rank: Natural | None = None
    """train low-rank adapters (LoRA) of this rank and the value head, with all else frozen. 0 adds
    those of the checkpoint into its weights; none means as the checkpoint says"""
    lora_alpha: AboveZero | None = None
    """scale of the adapters times their rank; none means as the checkpoint says, else the rank"""
    lora_targets: tuple[str, ...] = ()
    """layers that have adapters, by parts of their names (expert, q_proj, "expert.*.mlp"). None
    means as the checkpoint says, else attention and feed-forward of the action expert (GR00T: its
    queries, keys and values; OFT: all), and with --train-vlm of the VLM too"""
    cache_prefix: Annotated[
        Literal["auto", "slots", "gpu", "off"], BeforeValidator(prefix_place), FLOW
    ] = "auto"
    """where what a frozen VLM made of a frame is kept for training: in the slots, from inference
    on; on the actor's device, from the first epoch of a batch to its last; or nowhere, so that
    every epoch computes it again. auto: in slots of at most half of their memory, else on the
    device where it has room and there are several epochs (docs/memory.md)"""

    @property
    def minibatches(self) -> int:
        """Minibatches of a batch."""
        return max(1, round(self.batch / self.minibatch))

    @property
    def steps(self) -> int:
        """Optimizer steps of a batch."""
        return self.minibatches * self.update_epochs


@dataclass(kw_only=True, slots=True)
class AlgorithmConfig:
    gamma: Fraction = 0.9
    """discount per chunk step (RLinf: 0.99). 0.9 rewards being quick, so every chunk matters"""
    gae_lambda: Annotated[Share, CRITIC] = 0.95
    """λ of GAE"""
    bootstrap_truncated: Annotated[bool, CRITIC] = False
    """the time limit is no failure: the return of an episode that it cuts goes on with the value of
    its last observation (RLinf: on)"""
    granularity: Literal["chunk", "action", "token"] = "chunk"
    """unit of the policy ratio: a whole chunk (π0.5), an action, or a number or token (OFT)"""
    clip_low: Bound = 0.2
    """ε of the clipped policy objective, for falling probabilities; gipo has no clip"""
    clip_high: Bound = 0.2
    """ε for rising ones (RLinf's GRPO of OFT: 0.28); gipo has no clip"""
    dual_clip: FromZero = 0.0
    """c: bounds the objective of negative advantages by c·A (3 where it is used); 0 means off"""
    proximal: Literal["auto", "interpolated", "exact", "behaviour"] = "auto"
    """proximal log-prob of decoupled PPO: interpolated between old and new by staleness; exact, by
    the weights before a batch's first update; or behaviour, of the policy that acted, which is
    plain PPO. auto is exact where samples may be more than 2 versions old"""
    behaviour_weight: Literal[
        "mask", "truncate", "icepop", "sequence", "geometric", "kpop", "m2po", "gipo"
    ] = "mask"
    """correction for what the policy has moved since it acted (policy_loss.py): what happens
    to units whose behaviour weight is out of bounds, or another method"""
    behaviour_weight_max: Bound | None = None
    """largest behaviour weight; none means as published (mask, truncate: AReaL's 5). geometric's
    [0.999, 1.001] is verl's for two engines of the same weights: stale samples need wider bounds"""
    behaviour_weight_min: Share | None = None
    """smallest one of icepop, sequence and geometric; none means as published"""
    behaviour_trust: AboveZero | None = None
    """φ of kpop, τ of m2po or σ of gipo; none means as published (for tokens: 0.1, 0.04; 1)"""
    kl_stop: Limit = 0.0
    """end a batch's epochs when a minibatch's KL from the acting policy is above this; 0: never"""
    critic_warmup: Annotated[Natural, CRITIC] = 0
    """iterations in which only the value head learns"""
    value_clip: Annotated[Bound, CRITIC] = 0.2
    """largest change of a value estimate per update before its loss is clipped"""
    value_weight: Annotated[FromZero, CRITIC] = 1.0
    """weight of the value loss"""
    huber: Annotated[AboveZero, CRITIC] = 10.0
    """δ of the value loss (RLinf: 10)"""
    group_size: Annotated[int, Field(ge=2, le=10**9), GROUPS] = 8
    """G of GRPO: envs that begin each trajectory in the same state (RLinf: 8)"""
    group_low: Annotated[Share, GROUPS] = 0.1
    """GRPO: a group whose success rate lies below this is not trained on (RLinf: 0.1)"""
    group_high: Annotated[Share, GROUPS] = 0.9
    """GRPO: nor one above this (RLinf: 0.9)"""
    advantage_memory: Annotated[float, Field(ge=0, lt=1)] = 0.8
    """decay of the running mean square, over earlier batches, that scales advantages"""


@dataclass(kw_only=True, slots=True)
class Config:
    """RL post-training of vision-language-action models that never waits.

    Without flags: a small π0.5 learns Meta-World tasks from camera images by asynchronous PPO, on
    this machine."""

    train: RunConfig = field(default_factory=RunConfig)
    env: EnvConfig = field(default_factory=EnvConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)

    @property
    def most_drawn(self) -> int:
        """Chunk steps of a trajectory that are trained on at most, of all T of it."""
        return math.ceil(self.actor.chunk_share * self.env.segment)

    @property
    def exact_proximal(self) -> bool:
        """Whether another forward pass gives the proximal log-prob.

        Of five runs held back by 4 versions, three with the interpolated one ended below 80 %, and
        none with the exact one (benchmarks/results/equivalence.md)."""
        stale = self.actor.max_staleness + self.actor.extra_staleness > 2
        stale &= self.algorithm.behaviour_weight != "gipo"  # it has no proximal policy
        return self.algorithm.proximal == "exact" or self.algorithm.proximal == "auto" and stale


# Each row changes one thing of the row above it (RL-VLA³, Table 1), but the last, which is of its
# second version.
PRESET_SETTINGS = ("placement", "max_staleness", "batch_max", "batch_wait_ms", "stream")
PRESETS = {
    "sync-colocated": ("colocated", 0, "all", math.inf, False),
    "sync-disaggregated": ("disaggregated", 0, "all", math.inf, False),
    "train-async": ("disaggregated", 1, "all", math.inf, False),
    "rollout-async": ("disaggregated", 1, "auto", "auto", False),
    "full": ("disaggregated", 1, "auto", "auto", True),
    "full-colocated": ("colocated", 1, "auto", "auto", True),
}

# Flags carry no name of a stage, so a setting's name says which stage it belongs to.
STAGE_OF = {
    setting.name: stage.name
    for stage in fields(Config)
    for setting in fields(stage.default_factory)
}

WORKERS = ("env_workers", "rollout_workers", "actor_workers")
# Each rollout and actor worker gets a descriptor of each, with some twenty more (`channel.Writer`).
MOST_WORKERS = 220


def setting(config: Config, name: str) -> Any:
    """Returns a setting by its name alone: setting(config, "envs") is config.env.envs."""
    return getattr(getattr(config, STAGE_OF[name]), name)


def completed(config: Config, **settings: Any) -> Config:
    """Returns a copy in which these settings have these values: completed(config, envs=8)."""
    copied = copy.deepcopy(config)
    for name, value in settings.items():
        setattr(getattr(copied, STAGE_OF[name]), name, value)
    return copied


def from_preset(name: str) -> Config:
    """Returns the defaults under a preset."""
    return under_preset(Config(), name)


def under_preset(config: Config, name: str) -> Config:
    """Returns a copy that has what a preset decides."""
    row = dict(zip(PRESET_SETTINGS, PRESETS[name], strict=True))
    return completed(config, preset=name, **row)


def loss_of(config: Config):
    """Returns the class of the run's loss, checked against its contract (algorithms.py)."""
    from algorithms import checked  # here, for it imports torch, which plan.py does without

    return checked(config.train.algorithm)


def group_of(config: Config) -> int:
    """Returns G where the loss compares the episodes of whole groups (GRPO), else 1."""
    return config.algorithm.group_size if loss_of(config).groups else 1


def embedded_files(model: str, env: str) -> tuple[Path, Path]:
    """Returns where a family's checkpoint for this simulator lies if one is shipped, and its
    vocabulary; OFT's prompts have words of their own."""
    vocabulary = "tokenizer_oft.model" if model == "oft" else "tokenizer.model"
    return ASSETS / f"{model}_{env}.safetensors", ASSETS / vocabulary


def to_json(config: Config) -> str:
    """Returns the settings as standard JSON, which has no infinity: it is written as "inf"."""
    stages = asdict(config)
    for values in stages.values():
        values |= {name: "inf" for name, value in values.items() if value == math.inf}
    return json.dumps(stages, indent=1, default=str, allow_nan=False)


def expanded(settings: Any) -> Any:
    """Returns a copy of flags with the user's home for ~ in paths: a shell leaves "--out=~/x"."""
    values = {flag.name: getattr(settings, flag.name) for flag in fields(settings)}
    paths = {name: path for name, path in values.items() if isinstance(path, Path)}
    return replace(settings, **{name: Path(os.path.expanduser(paths[name])) for name in paths})


def run_path(name: str) -> Path:
    """Returns runs/NAME, or the path itself when the name is one. "NAME/" is what a shell makes of
    a folder's name, and it leaves the ~ of "--run=~/x"."""
    name = os.path.expanduser(name).rstrip("/")
    return Path(name) if "/" in name else ROOT / "runs" / name


def existing_run(name: str) -> Path:
    """Returns the folder of a run that exists. Raises UserError, which names those that do."""
    path = run_path(name)
    have = sorted(folder.name for folder in (ROOT / "runs").glob("[!.]*/")) or ["none"]
    more = f" and {len(have) - 8} more" if len(have) > 8 else ""
    require(path.is_dir(), f"there is no run {path}: runs/ holds {', '.join(have[-8:])}{more}")
    part = f"{path} is one checkpoint of a run: name the run, {path.parent.parent}"
    require(path.parent.name != "checkpoints", part)
    return path


def from_json(path: Path) -> Config:
    """Reads a run's config.json. Raises UserError when it is not one.

    One without "checkpointing" counts a micro-batch in trajectories: it is chosen anew. One without
    "precision" is of a run that computed in float32. One without "behaviour_weight_min" has 5 as
    the largest behaviour weight where nobody gave it."""
    what = f"the settings of the run in {path}"
    config = read_json(path, Config, what)
    if "checkpointing" not in read_json(path).get("actor", {}):
        config.actor.micro_batch = "auto"
    if "precision" not in read_json(path).get("train", {}):
        config.train.precision = "float32"
        if config.rollout.prefix_dtype == "float32":  # as every family had it where nobody gave it
            config.rollout.prefix_dtype = None
    older = "behaviour_weight_min" not in read_json(path).get("algorithm", {})
    if older and config.algorithm.behaviour_weight_max == 5.0:
        config.algorithm.behaviour_weight_max = None
    return config


def parse_ratio(ratio: str, flag: str = "--ratio") -> tuple[int, int]:
    """Turns "3:1" into (3, 1). Raises UserError, which names the flag."""
    left, colon, right = ratio.partition(":")
    nor = ", nor auto" if flag == "--ratio" else ""
    require(
        colon and left.isdecimal() and right.isdecimal() and int(left) > 0 and int(right) > 0,
        f"{flag} {ratio!r} is not R:A with two whole numbers of at least 1, such as 3:1{nor}",
    )
    return int(left), int(right)
