"""Imitation at its smallest: demonstrations in, a checkpoint and its vocabulary out."""

import multiprocessing
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import envs
import experts
import imitation
import pretrain
from config import ROOT, Config, embedded_files
from envs import metaworld
from errors import UserError
from experts import ExpertConfig
from models import build, checkpoint, tokenize
from models.pi import PiConfig
from pretrain import PretrainConfig
from recording import picture_of


def test_demonstrations_are_labelled_with_the_expert_s_own_actions():
    config = ExpertConfig(action_noise=0.0)
    seeds = range(10_000_000, 10_000_001)
    (played,) = experts.demonstrate(("handle-press",), 0, seeds, config)
    assert len(played.pictures) == len(played.states) == len(played.actions) >= 30
    assert played.actions.shape[1] == 4 and np.abs(played.actions).max() <= 1.0
    env = metaworld.Env(("handle-press",), 64)
    env.reset(0, 10_000_000)
    wins = []
    for i, state in enumerate(played.states):  # without noise, replaying visits the same states
        picture, here = env.observe()
        np.testing.assert_allclose(here, state, atol=1e-6)
        assert i > 0 or np.array_equal(picture[0], picture_of(played.pictures[i][0]))
        wins.append(env.step(played.actions[i])[1])
    assert wins.index(True) == len(wins) - 11  # it succeeds, and goes on for a chunk
    env.close()


def test_a_tiny_pretraining_makes_a_checkpoint_that_loads(cli, tmp_path):
    out = tmp_path / "small.safetensors"
    flags = "--tasks handle-press --demos 1 --steps 2 --batch 4"
    status, output = cli("pretrain.py", f"--out {out} {flags}").finish()
    assert status == 0 and "Traceback" not in output, output
    header = checkpoint.read_header(out)
    assert header.vocabulary == tokenize.fingerprint(out.with_name("tokenizer.model"))
    assert header.family == "pi05" and len(header.stats["state_low"]) == 4
    assert all(
        low <= high
        for low, high in zip(header.stats["state_low"], header.stats["state_high"], strict=True)
    )
    config = Config()
    config.train.checkpoint = out
    model = build(config, metaworld.spec((), 64))
    assert (
        all(torch.isfinite(p).all() for p in model.parameters())
        and model.config.width == PiConfig.width
    )
    assert (
        tokenize.load(str(out.with_name("tokenizer.model"))).get_piece_size() == PiConfig.vocabulary
    )


ALONE = ["unshare", "--pid", "--fork", "--kill-child"]
FIRST = """
import multiprocessing, os, imitation
if __name__ == "__main__":
    assert os.getpid() == 1
    args = (0, 1, "no lesson", None, None, None)
    worker = multiprocessing.get_context("spawn").Process(target=imitation.work, args=args)
    worker.start()
    worker.join()
"""


def test_the_first_process_of_a_container_may_learn(tmp_path):
    able = shutil.which("unshare") and not subprocess.run([*ALONE, "true"]).returncode
    if not able:
        pytest.skip("no process may be number 1 here")
    (tmp_path / "first.py").write_text(FIRST)
    command = [*ALONE, sys.executable, str(tmp_path / "first.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    # It has begun, and does not mind its parent's number.
    assert "'str' object has no attribute" in run.stderr, run


def test_a_missing_folder_is_noticed_before_the_work(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        pretrain.main(PretrainConfig(out=tmp_path / "none" / "x.safetensors"))


def test_a_variable_that_is_left_over_is_named(monkeypatch):
    def broken(*_):
        raise RuntimeError("no GL context")

    monkeypatch.setattr(metaworld.Env, "observe", broken)
    monkeypatch.setattr(envs, "LEFT", {"MUJOCO_GL": "glx"})
    with pytest.raises(UserError, match="MUJOCO_GL=glx in the environment: unset MUJOCO_GL"):
        next(experts.demonstrate(("handle-press",), 0, [10_000_000], ExpertConfig()))


@pytest.mark.parametrize("where", ["step", "reset"])
def test_a_demonstration_that_becomes_unstable_costs_no_other_one(monkeypatch, capsys, where):
    """A simulator of its own plays on."""
    real = getattr(metaworld.Env, where)
    made = []

    def breaks(self, *given):
        if self not in made:
            made.append(self)
        if len(made) == 1:
            raise FloatingPointError("the simulation became unstable")
        return real(self, *given)

    monkeypatch.setattr(metaworld.Env, where, breaks)
    config = ExpertConfig(image_size=16)
    seeds = [10_000_000, 10_000_001]
    first, second = experts.demonstrate(("handle-press",), 0, seeds, config)
    assert first is None and second is not None and len(made) == 2
    warned = "warning: handle-press, seed 10000000: the simulation became unstable\n"
    assert capsys.readouterr().err == warned


def test_an_expert_that_hangs_or_says_what_is_wrong_is_named(monkeypatch):
    monkeypatch.setattr(experts, "LIMIT_S", 0.0)
    pipe, end = multiprocessing.Pipe(duplex=False)
    with pytest.raises(UserError, match="the expert of reach hangs: nothing came for 0 s"):
        experts.next_of(pipe, None, "reach")
    end.send(UserError("unset MUJOCO_GL"))
    with pytest.raises(UserError, match="unset MUJOCO_GL"):
        experts.next_of(pipe, None, "reach")


def without_demonstrations(monkeypatch):
    def refuse(*_):
        raise AssertionError("the experts acted")

    monkeypatch.setattr(pretrain, "gather", refuse)


@pytest.mark.parametrize("family", ["pi05", "gr00t", "oft"])
def test_nothing_is_overwritten_unasked(monkeypatch, tmp_path, family):
    without_demonstrations(monkeypatch)
    default, vocabulary = embedded_files(family, "metaworld")
    shipped = default.read_bytes(), vocabulary.read_bytes()
    with pytest.raises(UserError, match=f"{family}_metaworld.safetensors exists already .*--over"):
        pretrain.main(PretrainConfig(model=family))
    words = metaworld.PROMPTS | {"handle-press": "squeeze the purple lever"}
    monkeypatch.setattr(metaworld, "PROMPTS", words)
    with pytest.raises(UserError, match=f"{vocabulary.name} exists already and would become"):
        pretrain.main(PretrainConfig(model=family, out=default.with_name("new.safetensors")))
    assert shipped == (default.read_bytes(), vocabulary.read_bytes())
    new = (tmp_path / "new.safetensors", tmp_path / "new")
    for out, overwrite in (*((out, False) for out in new), (default, True)):
        with pytest.raises(AssertionError, match="the experts acted"):
            pretrain.main(PretrainConfig(model=family, out=out, overwrite=overwrite))
    assert not list(tmp_path.iterdir())


SHIPPED = ROOT / "assets" / "pi05_metaworld.safetensors"


@pytest.mark.parametrize(
    "flags, prompt, gpus, words",
    [
        ({"overwrite": True}, "", 0, "cannot write the checkpoint to .*: Is a directory; give"),
        ({"batch": 64}, "", 3, "--batch 64 does not divide into 3 equal parts"),
        ({}, "", 1, "learning takes .* GB of a GPU, and there are 0.0"),
        (
            {"checkpoint": SHIPPED, "lora_rank": 2, "lora_targets": ("knee",)},
            "",
            0,
            "--lora-targets knee matches no layer",
        ),
        ({"checkpoint": SHIPPED}, "press the handle down " * 10, 0, "the model has room for"),
    ],
)
def test_what_will_go_wrong_is_said_before_the_experts_act(
    monkeypatch, tmp_path, flags, prompt, gpus, words
):
    without_demonstrations(monkeypatch)
    monkeypatch.setattr(imitation.machine, "gpus", lambda: gpus)
    small = SimpleNamespace(total_memory=1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: small)
    if prompt:
        monkeypatch.setattr(metaworld, "PROMPTS", metaworld.PROMPTS | {"handle-press": prompt})
    if "overwrite" in flags:
        (tmp_path / "new" / "model.safetensors").mkdir(parents=True)
    with pytest.raises(UserError, match=words):
        pretrain.main(PretrainConfig(out=tmp_path / "new", tasks=("handle-press",), **flags))
    assert "overwrite" in flags or not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["pi0", "pi05", "gr00t", "oft"])
def test_a_model_knows_as_many_words_as_its_prompts_have(monkeypatch, tmp_path, family):
    more = {"handle-press": "squeeze every purple lever"}
    monkeypatch.setattr(metaworld, "PROMPTS", metaworld.PROMPTS | more)
    spec = metaworld.spec(("handle-press",), 64)
    model = pretrain.make_model(PretrainConfig(model=family), spec, tmp_path / "t.model")
    words = tokenize.load(str(tmp_path / "t.model")).vocab_size()
    assert words > PiConfig.vocabulary and len(model.embed_tokens.weight) >= words
    long = {"handle-press": "press the handle down " * 10}
    monkeypatch.setattr(metaworld, "PROMPTS", metaworld.PROMPTS | long)
    spec = metaworld.spec(("handle-press",), 64)
    with pytest.raises(UserError, match="the model has room for"):
        pretrain.make_model(PretrainConfig(model=family), spec, tmp_path / "long.model")
