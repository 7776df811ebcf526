"""What only a GPU can show to be right: `pytest -m gpu`, or the last section of `bench.py gpu`.

Small models, fp32 where a CPU is compared with.
"""

import os
import subprocess
import sys
from multiprocessing import get_context

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

import machine
import models
import transfers
from benchmarks.measuring import random_model
from channel import SlotPool
from config import ROOT
from envs import drawing
from models import compiled
from weights import WeightFetcher, WeightPlane

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda:0"
FAMILIES = [name for name in models.MODELS if name != "emulated"]
SPEC = {"a": ((1000, 30), torch.float32), "b": ((7,), torch.bfloat16)}


@pytest.fixture(autouse=True)
def as_it_was():
    """Puts back what these tests change of the process."""
    cores = os.sched_getaffinity(0)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(precision)
    os.sched_setaffinity(0, cores)
    torch.compiler.reset()


# ---------------------------------------------------------------- bytes


def weights_of(version: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(version)
    return {
        name: torch.randn(shape, generator=generator).to(DEVICE, dtype)
        for name, (shape, dtype) in SPEC.items()
    }


def fetch(plane: WeightPlane, versions, results) -> None:
    """A rollout worker's part: fetches by its side thread, and says whether it has the bits."""
    parameters = {name: torch.zeros_like(x) for name, x in weights_of(0).items()}
    fetcher = WeightFetcher(plane, parameters, 60.0)
    for _ in range(3):
        version = versions.recv()
        fetcher.look()
        assert fetcher.swap(60.0)
        same = [torch.equal(parameters[name], x) for name, x in weights_of(version).items()]
        results.send((fetcher.version, all(same)))


def test_another_process_has_the_weights_that_were_published_on_the_device():
    plane = WeightPlane(SPEC, DEVICE)
    versions, told = mp.Pipe(duplex=False)
    answers, results = mp.Pipe(duplex=False)
    context = get_context("forkserver")
    process = context.Process(target=fetch, args=(plane, versions, results), daemon=True)
    plane.publish(weights_of(0), 0)
    process.start()
    try:
        for version in range(3):
            if version:
                plane.publish(weights_of(version), version)
            told.send(version)
            assert answers.poll(120.0)
            assert answers.recv() == (version, True)
    finally:
        process.join(20.0)
        process.kill()
    assert process.exitcode == 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_rows_come_from_slots_and_go_back_bit_by_bit(dtype):
    """Large rows go straight, small ones through blocks."""
    shapes = {"large": (2**16 + 5,), "small": (3, 5)}
    pool = SlotPool({name: ((4, *shape), dtype) for name, shape in shapes.items()}, 6)
    for name in shapes:
        pool[name].copy_(torch.randint(0, 256, pool[name].shape).to(dtype))
    transfers.lock(pool, tuple(shapes), DEVICE)
    assert transfers.goes_straight(pool, "large") and not transfers.goes_straight(pool, "small")
    slots = np.array([5, 0, 3, 4])
    rows = np.array([3, 0, 1, 1])
    found = transfers.read(pool, tuple(shapes), slots, rows, DEVICE)
    for name, x in found.items():
        assert x.device == torch.device(DEVICE) and torch.equal(x.cpu(), pool[name][slots, rows])

    doubled = {name: x + x for name, x in found.items()}
    wanted = {name: x.cpu() for name, x in doubled.items()}
    here = transfers.bring_back(pool, doubled, [0, 2], slots, rows, DEVICE)
    assert list(here) == ["small"] and torch.equal(here["small"], wanted["small"])
    chosen = (slots[[0, 2]], rows[[0, 2]])
    assert torch.equal(pool["large"][chosen], wanted["large"][[0, 2]])


def test_trajectories_that_travel_ahead_arrive_bit_by_bit():
    segment = 3
    pool = SlotPool({"seen": ((segment + 1, 2**16), torch.float32)}, 8)
    pool["seen"].normal_()
    carrier = transfers.Carrier(pool, ("seen",), segment, DEVICE)
    batches = [(0, 1, 2), (5, 4), (7,), (3, 6)]
    carrier.begin(batches[0])
    for slots, following in zip(batches, [*batches[1:], None], strict=True):
        taken = carrier.take(slots)["seen"]
        if following:
            carrier.begin(following)
        assert torch.equal((taken * 2.0).cpu(), pool["seen"][list(slots), :segment] * 2.0)


# ---------------------------------------------------------------- numbers


def played(name: str, device: str, n: int = 5) -> tuple[torch.nn.Module, dict, dict, dict]:
    """A small model on a device, what it sees, its noise, and what it does; the same everywhere."""
    model = random_model(name, "small", "cpu", torch.float32).eval().to(device)
    torch.manual_seed(1)
    obs = compiled.random_observations(model, n, device)
    noise = compiled.random_noise(model, n, device)
    with torch.inference_mode():
        out = model.act(obs, noise)
    return model, obs, noise, {key: x.clone() for key, x in out.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_acts_and_learns_as_on_a_cpu(name):
    _, _, _, expected = played(name, "cpu")
    _, _, _, acted = played(name, DEVICE)
    for key, x in expected.items():
        if x.dtype.is_floating_point:
            torch.testing.assert_close(acted[key].cpu(), x, rtol=1e-3, atol=1e-3)

    gradients = []
    for device in ("cpu", DEVICE):
        model, obs, _, _ = played(name, device)
        batch = {key: x.to(device) for key, x in expected.items()} | obs
        trained = model.trainable()
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(key in trained)
        out = model.evaluate({key: batch[key] for key in model.training_fields()})
        torch.testing.assert_close(out["logprob"].cpu(), expected["logprob"], rtol=1e-3, atol=1e-3)
        (out["logprob"].mean() + out["value"].mean()).backward()
        found = [p.grad for p in trained.values() if p.grad is not None]
        gradients.append(torch.cat([x.flatten().cpu() for x in found]))
    distance = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    # Rounding takes a few sums of GR00T's ReLU over the edge, which is 0.02 of its gradient.
    assert len(gradients[0]) and distance < (0.05 if name == "gr00t" else 1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_compiled_inference_is_the_eager_one(name, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, obs, noise, expected = played(name, DEVICE)
    compiled.compile_for(model, 5, DEVICE, lambda: None)
    n = compiled.bucket(5)
    act = compiled.Graphs(model.act, 2 * n)
    with torch.inference_mode():
        for size in (n, n, 2 * n, n):  # it is captured once, and replayed
            out = act(compiled.pad(obs, size), compiled.pad(noise, size))
            for key in ("actions", "logprob", "value"):
                torch.testing.assert_close(out[key][:5], expected[key], rtol=2e-3, atol=2e-3)
    assert set(act.graphs) == {n, 2 * n}


def test_the_fused_optimizer_steps_as_the_plain_one():
    torch.manual_seed(0)
    first = [torch.nn.Parameter(torch.randn(shape)) for shape in ((300, 20), (7,), (64,))]
    weights = {}
    for device, fused in (("cpu", False), (DEVICE, True)):
        mine = [torch.nn.Parameter(p.detach().clone().to(device)) for p in first]
        optimizer = torch.optim.AdamW(mine, lr=1e-2, betas=(0.9, 0.95), fused=fused)
        for step in range(5):
            for i, parameter in enumerate(mine):
                generator = torch.Generator().manual_seed(10 * step + i)
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
            optimizer.step()
        weights[device] = [p.detach().cpu() for p in mine]
    for plain, other in zip(weights["cpu"], weights[DEVICE], strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- drawing


def test_every_gpu_has_a_device_of_egl_that_draws_there():
    devices = drawing.egl_devices()
    gpus = range(torch.cuda.device_count())
    found = [drawing.matching(devices, gpu, machine.address(f"cuda:{gpu}")) for gpu in gpus]
    assert None not in found and len(set(found)) == len(found)

    # In a process of its own, since MuJoCo chooses its device once.
    code = (
        "from envs import drawing\n"
        "drawing.choose_device()\n"
        "from mujoco.egl import GLContext\n"
        "context = GLContext(64, 64)\n"
        "context.make_current()\n"
        "print(drawing.renderer())\n"
    )
    last = gpus[-1]
    place = {"MUJOCO_GL": "egl", "MUJOCO_EGL_DEVICE_ID": str(last)}
    place |= {"VLA3_DRAWS_ON": machine.address(f"cuda:{last}")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | place,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-1000:]
    name = done.stdout.lower()
    assert "none is cuda" not in name
    assert not any(software in name for software in ("llvmpipe", "softpipe", "swrast"))


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("name", FAMILIES)
def test_acting_and_training_agree_in_half_precision(name):
    """At the same weights, where training computes other batches. The bound is loose: what the gap
    is at full size, `bench.py gpu` measures."""
    changes = {} if name == "oft" else {"prefix_dtype": "bfloat16"}
    model = random_model(name, "small", DEVICE, torch.float32, **changes).eval()
    model.compute = torch.bfloat16
    obs = compiled.random_observations(model, 16, DEVICE)
    with torch.no_grad():
        stored = obs | model.act(obs, compiled.random_noise(model, 16, DEVICE))
        some = [{key: x[i : i + 5] for key, x in stored.items()} for i in range(0, 16, 5)]
        again = torch.cat([model.evaluate(batch)["logprob"] for batch in some])
    gaps = (again - stored["logprob"]).flatten(1).sum(1).abs()
    assert gaps.isfinite().all() and gaps.mean() < 0.1
