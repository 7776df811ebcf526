"""Published settings by one word: `train.py --recipe NAME --checkpoint FOLDER`.

A recipe lies below the flags, which override it, and beside --preset, --ratio and --placement,
which say what is asynchronous and where. docs/recipes.md has every value beside its source's, what
differs, and why. Left out: whatever needs a checkpoint, a simulator or a GPU, so that a plan can be
made without.

Sources: RLinf (https://github.com/RLinf/RLinf), examples/embodiment/config/NAME.yaml with what it
includes from env/ and model/, at commit a3816b596478dcd8a5c69a6ec1468c9519f77b5b; RL-VLA³, its
table of setups and its second version.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any

from checks import flag_of
from config import STAGE_OF, Config, Family, completed, from_preset, setting
from errors import require

# What RLinf's configurations have in common. Learning rates are constant from the first step.
RATES = {"iterations": 1000, "warmup": 0, "anneal": False, "weight_decay": 0.01, "grad_clip": 1.0}
SHARED = RATES | {"gamma": 0.99, "clip_low": 0.2, "clip_high": 0.2}
SHARED |= {"advantage_memory": 0.8}  # ours: there is none in RLinf's
CRITIC = {"value_lr": 1e-4, "critic_warmup": 0, "gae_lambda": 0.95}
CRITIC |= {"value_clip": 0.2, "value_weight": 1.0, "huber": 10.0}
KINDS = {
    "ppo": SHARED | CRITIC,
    "grpo": SHARED | {"group_size": 8, "group_low": 0.1, "group_high": 0.9},
    "async_ppo": SHARED | CRITIC | {"behaviour_weight_max": 2.0, "dual_clip": 3.0},
}
# What those of a family do, unless a row below says otherwise.
PI = {"lr": 5e-6, "update_epochs": 4, "granularity": "chunk"}
PI |= {"denoise_steps": 4, "noise_level": 0.5, "prefix_dtype": "bfloat16"}
OFT = {"lr": 2e-5, "update_epochs": 1, "clip_high": 0.28, "granularity": "token"}
OFT |= {"temperature": 1.6, "center_crop": False, "stop_token": False}
GR00T = PI | {"lr": 2e-5, "value_lr": 2e-5, "update_epochs": 1}
FAMILIES = {"pi0": PI, "pi05": PI, "gr00t": GR00T, "oft": OFT}
NAMES = {"pi0": "openpi", "pi05": "openpi_pi05", "gr00t": "gr00t", "oft": "openvlaoft"}  # RLinf's


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Published settings: sizes in their authors' units, the others in ours."""

    source: str
    checkpoint: str  # on Hugging Face
    adapter: str = ""  # there, too
    model: Family
    algorithm: str
    env: str
    tasks: tuple[str, ...]
    envs: int = 64
    rollout_epochs: int = 8  # trajectories of an env in a batch
    steps: int  # control steps of an episode
    chunk: int = 5
    global_batch: int = 2048  # chunk steps of an optimizer step, over all GPUs
    micro_batch: int = 128  # chunk steps of one forward and backward of a GPU
    more: dict[str, Any]  # by names of our settings
    theirs: dict[str, str] = field(default_factory=dict)  # what the source says where ours differs
    notes: str = ""  # what else differs: letters in docs/recipes.md

    @property
    def batch(self) -> int:
        """Trajectories of an iteration."""
        return self.envs * self.rollout_epochs

    @property
    def minibatch(self) -> int:
        """Trajectories of an optimizer step: as many whole episodes as its source's chunk steps
        make, up to rounding. One that ends early counts in full there, too: the rest is masked."""
        return round(self.global_batch / -(-self.steps // self.chunk))

    def settings(self) -> dict[str, Any]:
        """Lists what the recipe says, by names of settings."""
        sizes = ("envs", "chunk", "batch", "minibatch", "micro_batch")
        named = ("model", "algorithm", "env", "tasks", *sizes)
        return {name: getattr(self, name) for name in named} | self.more


def common(kind: str, model: Family) -> dict[str, Any]:
    """Returns what RLinf's configurations of a family have in common, without a critic's settings
    where there is none."""
    both = KINDS.get(kind, SHARED) | FAMILIES[model]
    critic = "gae_lambda" in both
    return {name: value for name, value in both.items() if critic or name not in CRITIC}


def rlinf(where: str, kind: str, model: Family, **values: Any) -> tuple[str, Recipe]:
    """Makes the recipe that has the name of RLinf's configuration. values: fields of Recipe, and
    settings of ours that differ from what is common."""
    name = f"{where}_{kind}_{NAMES[model]}"
    own = {flag.name for flag in fields(Recipe)}
    more = common(kind, model)
    more |= {key: value for key, value in values.items() if key not in own}
    if "denoise_steps" in more:
        more["sde_steps"] = more["denoise_steps"]  # each of them may be the stochastic one
    return name, Recipe(
        source=f"RLinf {name}.yaml",
        model=model,
        algorithm=kind.removeprefix("async_"),
        more=more,
        **{key: value for key, value in values.items() if key in own},
    )


def libero(suite: str, kind: str, model: Family, **values: Any) -> tuple[str, Recipe]:
    """Makes RLinf's recipe of a suite of LIBERO."""
    long = suite == "10"
    checkpoint = {
        "pi0": f"RLinf/RLinf-Pi0-LIBERO-{'Long' if long else 'Spatial-Object-Goal'}-SFT",
        "pi05": "RLinf/RLinf-Pi05-LIBERO-SFT",
        "gr00t": f"RLinf/RLinf-Gr00t-SFT-{suite.capitalize()}",
        "oft": f"Haozhan72/Openvla-oft-SFT-libero{'' if long else '-'}{suite}-traj1",
    }[model]
    same = {"checkpoint": checkpoint, "env": "libero", "tasks": (f"libero_{suite}",)}
    same |= {"render_quality": "full"}
    if model == "oft":
        same |= {"steps": 512, "rollout_epochs": 16, "chunk": 8, "lora_rank": 0}
        same |= {"global_batch": 16384, "micro_batch": 32, "notes": "bcd"}
    else:
        same |= {"steps": {"goal": 320, "10": 480}.get(suite, 240), "chunk": 10 if long else 5}
        same |= {"global_batch": 1024 if model == "gr00t" else 2048}
    return rlinf(f"libero_{suite}", kind, model, **same | values)


SHORT = ("spatial", "object", "goal")  # suites
LORA = "RLinf/RLinf-OpenVLAOFT-LIBERO-{}-Base-Lora"
SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
ONE_VERSION = {"envs": 128, "rollout_epochs": 1}
TWO_VERSIONS = ONE_VERSION | {"behaviour_weight_max": 5.0, "notes": "e"}
WARMUP = {"critic_warmup": 5, "theirs": {"critic_warmup": "30 optimizer steps"}}
OBJECT = TWO_VERSIONS | WARMUP | {"noise_level": 0.3}
# Put-on-plate. Rewards, values, discount and λ of OFT's PPO are RLinf's per action; per chunk of 8
# it is their 8th power.
PLATE = {"env": "maniskill", "tasks": ("PutOnPlateInScene25Main-v3",), "steps": 80}
PLATE_PI = PLATE | {"envs": 320, "rollout_epochs": 1, "global_batch": 5120, "micro_batch": 32}
PLATE_PI |= {"lr": 7.91e-6, "value_lr": 1.55e-4, "bootstrap_truncated": True, "noise": "network"}
PLATE_PI05 = PLATE_PI | {"checkpoint": "RLinf/RLinf-Pi05-ManiSkill-25Main-SFT"}
PLATE_PI0 = PLATE_PI | {"checkpoint": "RLinf/RLinf-Pi0-ManiSkill-25Main-SFT"}
PLATE_PI0 |= {"granularity": "token"}
PLATE_ASYNC = PLATE_PI0 | {"clip_low": 0.15, "clip_high": 0.15}
PLATE_OFT = PLATE | {"checkpoint": "RLinf/RLinf-OpenVLAOFT-ManiSkill-Base-Main", "chunk": 8}
PLATE_OFT |= {"global_batch": 640, "micro_batch": 40, "lr": 1e-4, "grad_clip": 10.0}
PLATE_OFT |= {"lora_rank": 32, "temperature": 1.0}
PLATE_OFT |= {"adapter": "RLinf/RLinf-OpenVLAOFT-ManiSkill-Base-Lora"}
PER_ACTION = {"gamma": "0.99 per action", "gae_lambda": "0.95 per action"}
PLATE_PPO = PLATE_OFT | {"envs": 128, "rollout_epochs": 2, "value_lr": 3e-3, "theirs": PER_ACTION}
PLATE_PPO |= {"gamma": 0.923, "gae_lambda": 0.663, "bootstrap_truncated": True}
PLATE_PPO_ASYNC = PLATE_PPO | {"critic_warmup": 5}
PLATE_PPO_ASYNC |= {"theirs": PER_ACTION | {"critic_warmup": "20 optimizer steps"}}
PLATE_GRPO = PLATE_OFT | {"envs": 256, "rollout_epochs": 1, "group_low": 0.0, "group_high": 1.0}
PLATE_GRPO |= {"lanes": 4}  # so small that each actor worker has one in every minibatch
# RLinf cuts an episode of every task of Meta-World after 100 control steps, as this segment does.
MT50 = {"env": "metaworld", "tasks": ("MT50",), "steps": 100, "segment": 20, "denoise_steps": 5}
MT50 |= {"notes": "n"}
MT50_PI0 = MT50 | {"checkpoint": "RLinf/RLinf-Pi0-MetaWorld-SFT", "lr": 1e-5}
MT50_PI05 = MT50 | {"checkpoint": "RLinf/RLinf-Pi05-MetaWorld-SFT", "notes": "an"}
DRAWER = {"env": "robocasa", "tasks": ("CloseDrawer",), "steps": 300, "denoise_steps": 5}
DRAWER |= {"checkpoint": "RLinf/RLinf-Pi0-RoboCasa"}

RECIPES: dict[str, Recipe] = dict(
    (
        *(libero(suite, "ppo", "pi0") for suite in SHORT),
        libero("10", "ppo", "pi0", grad_clip=2.0),
        libero("spatial", "ppo", "pi05", update_epochs=1, denoise_steps=3),
        libero("object", "ppo", "pi05", update_epochs=1, denoise_steps=5, noise_level=0.3),
        libero("goal", "ppo", "pi05", denoise_steps=5, noise_level=0.3),
        libero("10", "ppo", "pi05", denoise_steps=5, notes="a"),
        libero("spatial", "ppo", "gr00t", update_epochs=4, lr=5e-6, value_lr=1e-4),
        *(libero(suite, "ppo", "gr00t") for suite in ("object", "goal")),
        libero("10", "ppo", "gr00t", grad_clip=2.0),
        *(libero(suite, "grpo", "pi0", update_epochs=2) for suite in SHORT),
        libero("10", "grpo", "pi0", update_epochs=2, grad_clip=2.0),
        libero("spatial", "grpo", "pi05", update_epochs=1, denoise_steps=3),
        libero("object", "grpo", "pi05", update_epochs=1, denoise_steps=5, noise_level=0.3),
        libero("goal", "grpo", "pi05", update_epochs=1, denoise_steps=5, noise_level=0.3),
        libero("10", "grpo", "pi05"),
        *(libero(suite, "grpo", "oft") for suite in (*SHORT, "10")),
        libero("90", "grpo", "oft", checkpoint=LORA.format(90), rollout_epochs=64),
        libero("130", "grpo", "oft", checkpoint=LORA.format(130), rollout_epochs=64, tasks=SUITES),
        libero("spatial", "async_ppo", "pi0", **TWO_VERSIONS | {"rollout_epochs": 2}),
        libero("spatial", "async_ppo", "pi05", **ONE_VERSION, update_epochs=2, denoise_steps=3),
        libero("object", "async_ppo", "pi05", **OBJECT, update_epochs=2, denoise_steps=5),
        libero("goal", "async_ppo", "gr00t", rollout_epochs=1),
        rlinf("maniskill", "ppo", "pi0", **PLATE_PI0, notes="fghi"),
        rlinf("maniskill", "ppo", "pi05", **PLATE_PI05, update_epochs=5, notes="fghi"),
        rlinf("maniskill", "ppo", "oft", **PLATE_PPO, notes="bghj"),
        rlinf("maniskill", "grpo", "oft", **PLATE_GRPO, notes="bhj"),
        rlinf("maniskill", "async_ppo", "pi0", **PLATE_ASYNC, update_epochs=1, notes="fhik"),
        rlinf("maniskill", "async_ppo", "pi05", **PLATE_PI05, update_epochs=2, notes="fhik"),
        rlinf("maniskill", "async_ppo", "oft", **PLATE_PPO_ASYNC, notes="bhjk"),
        rlinf("metaworld_50", "ppo", "pi0", **MT50_PI0),
        rlinf("metaworld_50", "ppo", "pi05", **MT50_PI05),
        rlinf("robocasa_closedrawer", "ppo", "pi0", **DRAWER),
    )
)

# RL-VLA³'s setups. Columns: whose settings it takes where the paper says none; envs of a node, and
# at 3:1; rollout and update epochs; micro-batch and global batch in chunk steps.
SETUPS = {
    "a": ("libero_10_ppo_openpi", 128, 192, 4, 4, 128, 2048),
    "b": ("libero_10_grpo_openvlaoft", 128, 192, 4, 4, 32, 16384),
    "c": ("libero_10_ppo_openpi_pi05", 64, 192, 8, 1, 128, 2048),
    "d": ("libero_10_ppo_gr00t", 64, 192, 8, 1, 128, 1024),
    "e": ("maniskill_ppo_openpi", 256, 768, 4, 4, 64, 4096),
    "f": ("maniskill_ppo_openvlaoft", 256, 768, 4, 4, 32, 2048),
}
# Of its second version: envs of a node, and rollout epochs, which it does not say: those that come
# nearest to a batch of 512.
SECOND = {
    "libero_gr00t": ("libero_10_ppo_gr00t", 384, 1),
    "metaworld_pi05": ("metaworld_50_ppo_openpi_pi05", 512, 1),
    "robocasa_pi0": ("robocasa_closedrawer_ppo_openpi", 160, 3),
}
for name, (base, envs, envs_3to1, epochs, update, micro_batch, global_batch) in SETUPS.items():
    inherited = RECIPES[base]
    more = inherited.more | {"update_epochs": update}
    if inherited.model != "oft":
        more |= {"denoise_steps": 4, "sde_steps": 4}
    setup = replace(
        inherited,
        source=f"RL-VLA³ {name.upper()}, RLinf {base}.yaml",
        envs=envs,
        rollout_epochs=epochs,
        micro_batch=micro_batch,
        global_batch=global_batch,
        more=more,
        notes=inherited.notes + "l",
    )
    RECIPES[f"rl_vla3_{name}"] = setup
    RECIPES[f"rl_vla3_{name}_3to1"] = replace(setup, envs=envs_3to1)
for name, (base, envs, epochs) in SECOND.items():
    RECIPES[f"rl_vla3_v2_{name}"] = replace(
        RECIPES[base],
        source=f"RL-VLA³ version 2, RLinf {base}.yaml",
        envs=envs,
        rollout_epochs=epochs,
        notes=RECIPES[base].notes + "m",
    )


def apply(name: str, preset: str = "full") -> Config:
    """Returns the defaults under a recipe and a preset. Raises UserError."""
    return completed(from_preset(preset), recipe=name, **find(name).settings())


def find(name: str) -> Recipe:
    """Looks a recipe up. Raises UserError, which lists them all."""
    require(name in RECIPES, f"there is no recipe {name!r}: choose one of {', '.join(RECIPES)}")
    return RECIPES[name]


def check(config: Config) -> None:
    """Raises UserError where a run is not what its recipe is for, or lacks its checkpoint."""
    train = config.train
    if not train.recipe:
        return
    recipe = find(train.recipe)
    for name in ("model", "algorithm"):
        own, given = getattr(recipe, name), getattr(train, name)
        other = f"--recipe {train.recipe} is for --{name} {own}, not {given}"
        require(own == given, f"{other}: leave out --{name}, or choose another recipe")
    begins = f"--recipe {train.recipe} begins with https://huggingface.co/{recipe.checkpoint}"
    also = f", and that of {recipe.adapter} as --adapter" if recipe.adapter else ""
    have = train.checkpoint or train.resume
    require(have, f"{begins}: download it, and give its folder as --checkpoint{also}")


def of_family(config: Config) -> dict[str, Any]:
    """Returns how RLinf trains models of the family, without what is the model's own, and without
    sizes of batches, which depend on the task."""
    said = common(config.train.algorithm, config.train.model).items()
    return {name: value for name, value in said if STAGE_OF[name] != "rollout"}


def beside(config: Config) -> str:
    """Says in a line what RL-VLA³'s table has for as many nodes of 8 GPUs, beside what this run
    has; "" where the recipe is not of that table."""
    name = config.train.recipe
    letter = name.removeprefix("rl_vla3_").removesuffix("_3to1")
    if letter not in SETUPS:
        return ""
    setup = RECIPES[name]
    nodes = config.train.nodes
    theirs = f"{nodes * setup.envs} envs and a global batch of {nodes * setup.global_batch}"
    here = nodes * config.actor.minibatch * config.env.segment
    ours = f"{nodes * config.env.envs} envs and {here}"
    return (
        f"RL-VLA³ has for setup {letter.upper()} on {8 * nodes} GPUs {theirs} chunk steps; "
        f"this run has {ours}\n"
    )


def note(config: Config) -> str:
    """Says in a line which settings are as RLinf trains models of the family, unlike the defaults;
    "" where none are."""
    usual = Config()
    changed = [
        f"{flag_of(name)} {value}"
        for name, value in of_family(config).items()
        if setting(config, name) == value != setting(usual, name)
    ]
    start = f"no --recipe is given, so settings of RLinf's for {config.train.model} apply"
    own = f"--envs {config.env.envs} --batch {config.actor.batch} are not among them"
    return f"{start}: {' '.join(changed)}; {own}\n" if changed else ""
