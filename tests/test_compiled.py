"""Inference through torch.compile gives what it gives without, and a run with it trains."""

import contextlib
import json
import multiprocessing
import os
from functools import partial

import pytest
import torch
from conftest import SMALL, observations, tiny_pi
from torch import nn

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
    sizes = [1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128]
    assert sorted({compiled.bucket(n) for n in range(1, 129)}) == sizes
    for n in range(1, 129):
        assert compiled.bucket(n) == min(size for size in sizes if size >= n)


def test_padding_repeats_the_last_row():
    padded = compiled.pad(
        {"a": torch.arange(6).view(3, 2), "b": torch.tensor([True, False, True])}, 5
    )
    assert padded["a"].tolist() == [[0, 1], [2, 3], [4, 5], [4, 5], [4, 5]]
    assert padded["b"].tolist() == [True, False, True, True, True]


def compare(model, obs) -> None:
    """Eager against compiled, before and after the weights are swapped for others."""
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
    assert len(signs) == 2  # for one sample, and for several
    for weights, want in zip((before, swapped), wanted, strict=True):
        for name, parameter in model.named_parameters():
            parameter.data = weights[name]
        # What comes later than the start-up, of tensors made as `rollout_worker.serve` makes them.
        with torch.compiler.set_stance("fail_on_recompile"), torch.inference_mode():
            out = model.act(obs, noise)
        for name, tensor in want.items():
            torch.testing.assert_close(out[name], tensor, atol=1e-4, rtol=1e-4)


def test_compiled_inference_is_the_same(monkeypatch):
    # Captured as a graph for each kind of block, which then runs uncompiled: compiling takes long.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = tiny_pi(depth=1, vision_depth=1)
    compare(model, observations(model, 3))


def graphs_of(model, monkeypatch) -> list:
    """What compiling for up to 16 samples captures; nothing more for whatever number comes then."""
    graphs = []

    def count(graph, inputs):
        return graphs.append(graph) or graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    compiled.compile_for(model, 16, "cpu", lambda: None)
    with torch.compiler.set_stance("fail_on_recompile"), torch.inference_mode():
        for n in (1, 2, 3, 7, 16):
            obs = compiled.random_observations(model, n, "cpu")
            model.act(obs, compiled.random_noise(model, n, "cpu"))
    torch.compiler.reset()
    return graphs


# π: SigLIP's layer, Gemma's in the prefix and in the expert. GR00T: SigLIP's, Qwen's, of the
# features, and of the DiT the keys, what attends to them and what attends to itself. OFT: two of
# towers, Llama's. One sample has two kinds of the expert's: strides of a dimension of one differ.
KINDS = {"pi05": 3, "gr00t": 6, "oft": 3}


@pytest.mark.parametrize("name", KINDS)
def test_all_blocks_of_a_kind_are_one_code_for_every_number_of_samples(name, monkeypatch):
    deeper = {"pi05": {"depth": 3}, "gr00t": {"depth": 3, "dit_depth": 6}, "oft": {"depth": 3}}
    model = random_model(name, "small", "cpu", torch.float32, **deeper[name])
    graphs = graphs_of(model.eval().requires_grad_(False), monkeypatch)
    assert 2 * KINDS[name] <= len(graphs) <= 2 * KINDS[name] + 1


class Toy(nn.Module):
    """The smallest model with blocks."""

    config = "toy"

    def __init__(self):
        super().__init__()
        self.stack = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def observation_fields(self):
        return {"state": ((4,), torch.float32)}

    def draw(self, keys, explore):
        return {"noise": torch.zeros(len(keys), 4)}

    def act(self, obs, noise):
        x = obs["state"] + noise["noise"]
        for block in self.stack:
            x = block(x)
        return {"actions": x}


def compile_toy(folder: str, gate, results) -> None:
    """Compiles in a process of its own → hits and misses of the cache on disk, signs of life."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    from torch._dynamo.utils import counters

    signs = []
    torch.manual_seed(0)
    model = Toy().requires_grad_(False)
    gate.wait()
    compiled.compile_for(model, 1, "cpu", lambda: signs.append(1))
    found = counters["inductor"]
    results.put((found["fxgraph_cache_hit"], found["fxgraph_cache_miss"], len(signs)))


def test_workers_that_start_together_compile_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    gate = context.Barrier(2)
    results = context.Queue()
    workers = [
        context.Process(target=compile_toy, args=(str(tmp_path), gate, results)) for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    first, second = sorted((results.get(timeout=300) for _ in workers), key=lambda x: x[0])
    for worker in workers:
        worker.join()
    assert first[:2] == (0, 1) and second[:2] == (1, 0)
    assert second[2] > 1  # it gave signs of life while it waited


# ---------------------------------------------------------------- CUDA graphs, without CUDA


class Stream:
    def wait_stream(self, other):
        pass


class Graph:
    """Remembers that it was replayed. `broken`: the capture fails for this size."""

    replayed = 0

    def replay(self):
        self.replayed += 1


@contextlib.contextmanager
def capturing(graph, pool, capture_error_mode):
    yield


@pytest.fixture
def graphs_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)


def given(n: int, value: float) -> compiled.Given:
    return {"state": torch.full((n, 4), value)}, {"noise": torch.zeros(n, 4)}


def test_act_is_captured_once_for_each_size_and_the_largest_first(graphs_without_cuda):
    sizes = []

    def act(obs, noise):
        sizes.append(len(obs["state"]))
        return {"actions": obs["state"] + noise["noise"]}

    graphs = compiled.Graphs(act, 8)
    graphs(*given(3, 1.0))
    calls = compiled.WARM_UPS + 1
    assert sizes == calls * [8] + calls * [3]
    graphs(*given(3, 2.0))
    assert len(sizes) == 2 * calls  # replayed, not called
    assert graphs.graphs[3].replayed == 2
    obs, _ = graphs.given
    assert obs["state"][:3].tolist() == given(3, 2.0)[0]["state"].tolist()  # it reads the new ones


def test_graphs_of_all_sizes_read_and_write_the_same_memory(graphs_without_cuda):
    """So a graph keeps nothing of its own: a cached prefix is 20 MB for each sample of each."""
    graphs = compiled.Graphs(Toy().act, 8)
    with torch.inference_mode():
        large = graphs(*given(8, 1.0))["actions"]
        assert torch.allclose(large, graphs.act(*given(8, 1.0))["actions"])
        for n in (5, 1):
            small = graphs(*given(n, 1.0))["actions"]
            assert small.data_ptr() == large.data_ptr() and len(small) == n


def test_where_capturing_fails_inference_goes_on_without(graphs_without_cuda, monkeypatch, capsys):
    @contextlib.contextmanager
    def failing(graph, pool, capture_error_mode):
        yield
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "graph", failing)
    graphs = compiled.Graphs(Toy().act, 8)
    for value in (1.0, 2.0):
        want = graphs.act(*given(3, value))["actions"]
        assert torch.equal(graphs(*given(3, value))["actions"], want)
    said = capsys.readouterr().err
    assert said.count("warning: inference goes without CUDA graphs") == 1
    assert said.count("\n") == 1 and "not permitted" in said


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
