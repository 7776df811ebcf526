"""Inference through torch.compile gives what it gives without, and a run with it trains."""

import json
from functools import partial

import pytest
import torch
from conftest import SMALL, observations, tiny_pi

import models
from benchmarks.measuring import random_model
from errors import UserError
from models import compiled

FAMILIES = [name for name in models.MODELS if name != "emulated"]


@pytest.fixture(autouse=True)
def caches(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    yield
    torch.compiler.reset()


def test_few_batch_sizes_occur():
    assert [compiled.bucket(n) for n in (1, 8, 9, 16, 17, 100)] == [8, 8, 16, 16, 32, 128]
    for most in (1, 8, 9, 64, 65):
        assert compiled.buckets(most) == sorted({compiled.bucket(n) for n in range(1, most + 1)})


def test_padding_repeats_the_last_row():
    padded = compiled.pad(
        {"a": torch.arange(6).view(3, 2), "b": torch.tensor([True, False, True])}, 5
    )
    assert padded["a"].tolist() == [[0, 1], [2, 3], [4, 5], [4, 5], [4, 5]]
    assert padded["b"].tolist() == [True, False, True, True, True]


def compare(model, obs) -> None:
    """Eager against compiled, of a batch that is no power of two, before and after the weights are
    swapped for others."""
    n = len(obs["tokens"])
    noise = compiled.random_noise(model, n, "cpu")
    swapped = {
        name: p.detach() + 0.05 * torch.randn_like(p) for name, p in model.named_parameters()
    }
    before = {name: p.detach() for name, p in model.named_parameters()}
    wanted = []
    for weights in (before, swapped):
        for name, parameter in model.named_parameters():
            parameter.data = weights[name]
        wanted.append(model.act(obs, noise))
    assert any(
        (wanted[0][name] - wanted[1][name]).abs().max() > 1e-3 for name in ("actions", "value")
    )
    signs = []
    compiled.compile_for(model, n, "cpu", lambda: signs.append(1))
    assert len(signs) == len(compiled.buckets(n))
    for weights, want in zip((before, swapped), wanted, strict=True):
        for name, parameter in model.named_parameters():
            parameter.data = weights[name]
        # What comes later than the start-up, of tensors made as `rollout_worker.serve` makes them.
        with torch.compiler.set_stance("fail_on_recompile"), torch.inference_mode():
            out = model.act(
                compiled.pad(obs, compiled.bucket(n)), compiled.pad(noise, compiled.bucket(n))
            )
        for name, tensor in want.items():
            torch.testing.assert_close(out[name][:n], tensor, atol=1e-4, rtol=1e-4)


def test_compiled_inference_is_the_same(monkeypatch):
    # Captured as one graph each, which then runs uncompiled: compiling takes a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = tiny_pi(depth=1, vision_depth=1)
    compare(model, observations(model, 3))


def test_one_graph_for_each_piece_and_batch_size(monkeypatch):
    graphs = []

    def count(graph, inputs):
        return graphs.append(graph) or graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    model = tiny_pi(depth=1, vision_depth=1)
    compiled.compile_for(model, 16, "cpu", lambda: None)
    assert len(graphs) == len(model.COMPILED) * len(compiled.buckets(16))
    for n in (5, 8, 16):  # a padded batch, and full ones as `draw` makes their noise
        with torch.inference_mode():  # as `rollout_worker.serve` does
            noise = model.draw([(1, i, 0, 0) for i in range(n)], [True] * n)
            obs = observations(model, n)
            model.act(*(compiled.pad(x, compiled.bucket(n)) if n == 5 else x for x in (obs, noise)))
    assert len(graphs) == len(model.COMPILED) * len(compiled.buckets(16))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_compiled_inference_of_every_family_is_the_same(name):
    model = random_model(name, "small", "cpu", torch.float32).eval().requires_grad_(False)
    compare(model, compiled.random_observations(model, 11, "cpu"))


def test_a_machine_without_a_compiler_is_told_so(monkeypatch):
    model = tiny_pi(depth=1, vision_depth=1)
    monkeypatch.setenv("CXX", "/nowhere/g++")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/nowhere/g++",))
    with pytest.raises(UserError, match="torch.compile does not work here .*--compile False"):
        compiled.compile_for(model, 2, "cpu", lambda: None)


@pytest.mark.slow
def test_a_run_compiles_its_inference(cli, tiny_checkpoint, tmp_path):
    flags = (
        f"{SMALL} --tasks handle-press --max-staleness 0 --iterations 3 --checkpoint "
        f"{tiny_checkpoint} --compile True"
    )
    status, output = cli("train.py", f"{flags} --run {tmp_path / 'run'}").finish(timeout=400)
    assert status == 0 and "3 iterations done" in output, output
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert (
        all(line["ratio_max"] == pytest.approx(1.0, abs=1e-4) for line in lines)
        and lines[-1]["weight_sync_s"] > 0
    )
