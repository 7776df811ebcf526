"""Prints the tables of docs/recipes.md: every value of every recipe, beside its source's.

python -m benchmarks.recipes_table            the tables
python -m benchmarks.recipes_table --write    into the page, between its marks
"""

import sys
from typing import Any

import recipes
from checks import flag_of
from config import ROOT
from errors import exit_on_user_error

PAGE = ROOT / "docs" / "recipes.md"
MARKS = ("<!-- python -m benchmarks.recipes_table --write -->", "<!-- end of the tables -->")
# Our settings, and the keys of RLinf's files; "" where there is none.
KEYS = {
    "lr": "actor.optim.lr",
    "value_lr": "actor.optim.value_lr",
    "weight_decay": "actor.optim.weight_decay",
    "grad_clip": "actor.optim.clip_grad",
    "critic_warmup": "actor.optim.critic_warmup_steps",
    "warmup": "actor.optim.lr_warmup_steps: none",
    "anneal": "actor.optim.lr_scheduler: constant",
    "iterations": "runner.max_epochs",
    "update_epochs": "algorithm.update_epoch",
    "gamma": "algorithm.gamma",
    "gae_lambda": "algorithm.gae_lambda",
    "clip_low": "algorithm.clip_ratio_low",
    "clip_high": "algorithm.clip_ratio_high",
    "dual_clip": "algorithm.clip_ratio_c, which the code of asynchronous PPO alone reads",
    "value_clip": "algorithm.value_clip",
    "value_weight": "in the code: actor loss + critic loss",
    "huber": "algorithm.huber_delta",
    "group_size": "algorithm.group_size",
    "group_low": "algorithm.rewards_lower_bound / reward_coef",
    "group_high": "algorithm.rewards_upper_bound / reward_coef",
    "behaviour_weight_max": "algorithm.behave_weight_threshold (asynchronous; else ours)",
    "advantage_memory": "ours",
    "granularity": "algorithm.logprob_type",
    "denoise_steps": "actor.model.num_steps, denoising_steps",
    "noise_level": "actor.model.{openpi,rl_head_config}.noise_level",
    "temperature": "rollout.sampling_params.temperature_train",
    "prefix_dtype": "ours",
    "center_crop": "in the code: it does not crop, though the files say center_crop",
    "stop_token": "in the code",
}


def row(*cells: Any) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def table(head: tuple, rows: list[tuple]) -> list[str]:
    return [row(*head), "|" + "---|" * len(head), *(row(*cells) for cells in rows), ""]


def common_values() -> list[str]:
    """What is common to a kind of configuration, and to a family."""
    lines = []
    for groups in (recipes.KINDS, recipes.FAMILIES):
        names = dict.fromkeys(name for values in groups.values() for name in values)
        rows = [
            (f"`{flag_of(name)}`", *(v.get(name, "") for v in groups.values()), KEYS[name])
            for name in names
        ]
        lines += table(("", *(f"`{group}`" for group in groups), "RLinf's"), rows)
    return lines


def recipe_row(name: str, recipe: recipes.Recipe) -> tuple:
    """A recipe's own values. Those that its source has in another way have that in brackets."""
    settings = recipe.settings()
    shown = {"model", "algorithm", "env", "tasks", "envs", "chunk", "batch", "minibatch"}
    shown |= {"micro_batch", "update_epochs", "lr", "value_lr", "grad_clip", "sde_steps"}
    shown |= {"denoise_steps", "noise_level"}
    kind = "async_ppo" if "async" in name else recipe.algorithm
    common = recipes.common(kind, recipe.model)
    rest = [
        f"`{flag_of(key)} {value}`" + (f" ({recipe.theirs[key]})" if key in recipe.theirs else "")
        for key, value in settings.items()
        if key not in shown and common.get(key) != value
    ]
    return (
        f"`{name}`",
        recipe.source.replace(f"RLinf {name}.yaml", "RLinf"),
        " ".join(filter(None, (recipe.checkpoint, recipe.adapter))),
        f"{recipe.model} {recipe.algorithm}",
        " ".join(recipe.tasks),
        recipe.envs,
        f"{recipe.batch} ({recipe.rollout_epochs} epochs)",
        f"{recipe.steps} / {recipe.chunk}",
        f"{recipe.minibatch} ({recipe.global_batch})",
        recipe.micro_batch,
        settings["update_epochs"],
        " ".join(f"{settings[key]:g}" for key in ("lr", "value_lr") if key in settings),
        f"{settings['grad_clip']:g}",
        " ".join(f"{settings.get(key, '')}" for key in ("denoise_steps", "noise_level")),
        " ".join(rest),
        " ".join(recipe.notes),
    )


HEAD = (
    "`--recipe`",
    "source",
    "`--checkpoint` `--adapter`",
    "`--model` `--algorithm`",
    "`--tasks`",
    "`--envs`",
    "`--batch`",
    "control steps / `--chunk`",
    "`--minibatch` (chunk steps)",
    "`--micro-batch`",
    "`--update-epochs`",
    "`--lr` `--value-lr`",
    "`--grad-clip`",
    "`--denoise-steps` `--noise-level`",
    "further",
    "differs",
)


def tables() -> str:
    """The tables of docs/recipes.md."""
    rows = [recipe_row(name, recipe) for name, recipe in recipes.RECIPES.items()]
    return "\n".join([*common_values(), *table(HEAD, rows)])


def between(page: str) -> tuple[str, str, str]:
    """The page before, between and after its marks."""
    before, start, rest = page.partition(MARKS[0])
    inside, end, after = rest.partition(MARKS[1])
    return before + start, inside.strip("\n"), end + after


if __name__ == "__main__":
    with exit_on_user_error():
        if "--write" in sys.argv:
            before, _, after = between(PAGE.read_text())
            PAGE.write_text(f"{before}\n\n{tables()}\n{after}")
        else:
            print(tables())
