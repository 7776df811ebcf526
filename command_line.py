"""The command line of train.py: flags → settings.

Left out: what the settings mean on this machine (prepare.py).
"""

import sys
from itertools import pairwise
from pathlib import Path

import tyro

import recipes
from config import (
    WORKERS,
    Config,
    RunConfig,
    completed,
    existing_run,
    expanded,
    from_json,
    from_preset,
    parse_ratio,
    run_path,
    under_preset,
)
from errors import UserError, require
from models import checkpoint
from run_folder import RunFolder, checkpoints, newest_version
from start import read_state

BEGINS_FROM = ("--checkpoint", "--adapter")  # what a run that is resumed has behind it


def parse(args: list[str]) -> Config:
    """Turns the command line into settings.

    A preset and a recipe, or what is published for a checkpoint's family, or a resumed run's
    config.json supply the defaults, which flags override. A run that is done ends the program with
    status 0 where it is to be resumed or started."""
    known = [word for word in args if word not in ("-h", "--help")]
    look, _ = tyro.cli(RunConfig, args=known, return_unknown_args=True)
    if name := look.resume_or_start:
        both = f"--resume-or-start {name} says which run: leave out --run and --resume"
        require(not gives(args, "--run", "--resume"), both)
        saved = newest_version(run_path(name))
        args = without(args, "--resume-or-start")
        go_on = [*without(args, *BEGINS_FROM), "--resume", name]
        config = parse([*args, "--run", name] if saved is None else go_on)
        if saved is not None and saved >= config.train.iterations:
            add_missing_lines(run_path(name))
            print(f"run {name} already has {saved} iterations: nothing is left to do")
            sys.exit(0)
        return config
    default = from_preset(look.preset)
    if look.recipe and not look.resume:
        default = recipes.apply(look.recipe, look.preset)
        if gives(args, "--env", "--suite", "--tasks"):
            default = completed(default, tasks=())
        if gives(args, "--oft-train"):
            default = completed(default, lora_rank=None)
    if look.resume:
        saved = existing_run(look.resume) / "config.json"
        both = f"--run and --resume {look.resume} exclude each other"
        require(not gives(args, "--run"), f"{both}: a resumed run goes on in its own folder")
        given = [flag for flag in BEGINS_FROM if gives(args, flag)]
        own = f"run {look.resume} goes on from its own newest checkpoint"
        require(not given, f"{own}: leave out {' and '.join(given)}")
        default = from_json(saved)
        default.train.ratio_from = default.train.parts
        other = gives(args, "--preset") and look.preset != default.train.preset
        if other:
            default = under_preset(default, look.preset)
        if default.train.ratio == "auto" or other or gives(args, "--ratio", "--placement"):
            # Worker counts follow from the ratio, as far as no flag gave them.
            given = default.train.workers_given
            default = completed(default, **dict(zip(WORKERS, given, strict=True)))
    config = flags_over(default, args)
    name = config.train.recipe
    other = f"--recipe {name} is not what run {look.resume} began with: leave it out"
    require(not look.resume or name == default.train.recipe, other)
    if not look.resume and not name and is_published(config):
        config = flags_over(completed(default, **recipes.of_family(config)), args)
    ratio_from = config.train.ratio_from
    if ratio_from not in ("", default.train.ratio_from):
        parse_ratio(ratio_from, "--ratio-from")
        alone = f"--ratio-from {ratio_from} is for --ratio auto: leave out one of them"
        require(config.train.ratio == "auto", alone)
    return config


def flags_over(default: Config, args: list[str]) -> Config:
    """Overrides defaults by flags. Another --behaviour-weight than the default one leaves behind
    the bounds of that, and gipo the dual clip: they mean another thing to it, or nothing."""
    chosen = value_of(args, "--behaviour-weight")
    if chosen not in (None, default.algorithm.behaviour_weight):
        bounds = ("behaviour_weight_min", "behaviour_weight_max", "behaviour_trust")
        default = completed(default, **dict.fromkeys(bounds))
        if chosen == "gipo":
            default = completed(default, dual_clip=0.0)
    return tyro.cli(Config, args=args, default=default, config=(tyro.conf.OmitArgPrefixes,))


def is_published(config: Config) -> bool:
    """Whether the run begins with another project's checkpoint; what is wrong with one is said
    later."""
    train = config.train
    if train.checkpoint is None or train.model not in recipes.FAMILIES:
        return False
    try:
        return checkpoint.published(expanded(train).checkpoint)
    except UserError:
        return False


def add_missing_lines(run: Path) -> None:
    """Completes the metrics.jsonl of a run that is done, where its launcher was killed before the
    last line was written: it waits for the last evaluation."""
    folder = RunFolder(run, resume=True)
    lines = read_state(checkpoints(run)[-1])["lines"]
    if lines != folder.lines():
        folder.go_on_from(lines)


def gives(args: list[str], *flags: str) -> bool:
    """Whether one of these flags is given. "--run=x" and "--ratio_from x" are ways to do so."""
    return any(word.partition("=")[0].replace("_", "-") in flags for word in args)


def without(args: list[str], *flags: str) -> list[str]:
    """Leaves out these flags, each of which takes one value."""
    kept = []
    words = iter(args)
    for word in words:
        if not gives([word], *flags):
            kept.append(word)
        elif "=" not in word:
            next(words, None)
    return kept


def value_of(args: list[str], *flags: str) -> str | None:
    """Returns the value of the last of these flags that is given, as it is written."""
    found = None
    for word, following in pairwise([*args, None]):
        if gives([word], *flags):
            found = word.partition("=")[2] if "=" in word else following
    return found
