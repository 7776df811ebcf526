"""Runs whole programs on the GPU: train.py at full size, train.py with ManiSkill, the tests.

`pipeline` is π0.5 at its published size with random weights, all stages on one GPU, and simulators
that only sleep for the times of LIBERO that benchmarks/emulated/libero.py derives, at a tenth of
their length. Nothing is compiled, which would take longer than the section has.

    env_steps_per_s       after the first batch, over `iterations` of them
    samples_per_s         chunk steps trained
    gpu_busy              share of that time in which inference, training, the optimizer or
                          publishing ran; both_share: in which rollout and actor did
    bubble_…              share of the time that the stage waited
"""

import contextlib
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from xml.etree import ElementTree

import torch

import models
from benchmarks.gpu import Where, die_with_parent
from config import ASSETS, ROOT
from envs import EnvSpec
from models import tokenize, untrained
from models.formats import source
from run_folder import read_metrics, read_trace

TYPE = torch.bfloat16
LINES = 4  # of metrics.jsonl, of which the first is not measured
ENDING_S = 10.0  # kept of a section's time for what comes after a run
SMALLER = "--precision float32 --envs 4 --batch 4 --minibatch 4 --segment 2 --env-workers 2"
SHAPES = ("--model pi05 --env emulated --chunk 10 --envs 32 --batch 64 --minibatch 64 --segment 8",)
SHAPES += ("--update-epochs 1 --denoise-steps 4 --sde-steps 4 --noise-level 0.5",)
COMMON = "--eval-envs 0 --eval-every 0 --checkpoint-every 1000000 --iterations 1000 --compile False"
MANISKILL = "--env maniskill --envs 128 --batch 128 --minibatch 128 --segment 5 --update-epochs 1"
WORK = {"rollout": ("infer",), "actor": ("train", "optimizer", "publish")}  # spans of a trace


# ---------------------------------------------------------------- train.py


def pipeline(where: Where) -> Iterator[dict]:
    """Measures the whole pipeline on one GPU, two ways of sharing it."""
    end = time.monotonic() + where.limit_s
    with tempfile.TemporaryDirectory(prefix="pipeline-") as folder:
        made = Path(folder) / "model.safetensors"
        write_checkpoint(made, where)
        flags = [*" ".join(SHAPES).split(), "--checkpoint", str(made)]
        flags += ["--tokenizer", str(ASSETS / "tokenizer.model")]
        if where.fake:
            flags += SMALLER.split()
        took_s = 0.0
        for preset in ("full-colocated", "sync-colocated"):
            began = time.monotonic()
            left_s = end - began - ENDING_S
            if left_s < took_s:
                yield {"preset": preset, "note": "no time is left for it"}
                continue
            run = Path(folder) / preset
            yield {"preset": preset} | measured(run, [*flags, "--preset", preset], left_s)
            took_s = time.monotonic() - began


def maniskill(where: Where) -> Iterator[dict]:
    """Measures a run whose simulator is on the GPU, too."""
    if importlib.util.find_spec("mani_skill") is None:
        yield {"note": "not installed: bash setup.sh --maniskill"}
        return
    if where.fake:
        yield {"note": "it simulates on GPUs that are there"}
        return
    with tempfile.TemporaryDirectory(prefix="maniskill-") as folder:
        flags = [*MANISKILL.split(), "--placement", "colocated"]
        yield measured(Path(folder) / "run", flags, where.limit_s - ENDING_S)


def write_checkpoint(file: Path, where: Where) -> None:
    """Writes π0.5 with random weights, as a file of ours. They repeat after 64 MB: drawing all of
    them would take minutes."""
    words = ASSETS / "tokenizer.model"
    shape = models.load("pi05").FULL["pi05"]
    if where.fake:
        shape = models.files("pi05").embedded("pi05", str(words)).config
    pieces = tokenize.load(str(words)).vocab_size()
    spec = EnvSpec(("emulated",), ("wait",), 2, shape.image_size, 4, 4, 80)
    if where.fake:
        shape = untrained.fitted(shape, spec, 10, shape.tokens)
    else:
        played = {"executed_steps": 10, "executed_dims": spec.action_dim}
        shape = replace(shape, views=spec.views, vocabulary=pieces, **played)
    model = source.sketch(models.load("pi05").NETWORK, shape)

    # The header: who it is, and where each tensor lies.
    ends = {"state_low": [-1.0] * spec.state_dim, "state_high": [1.0] * spec.state_dim}
    entries = {"__metadata__": {"family": "pi05", "vocabulary": tokenize.fingerprint(words)}}
    entries["__metadata__"] |= {"shape": json.dumps(asdict(shape)), "stats": json.dumps(ends)}
    end = 0
    for name, tensor in model.state_dict().items():
        begin = end
        end += tensor.numel() * TYPE.itemsize
        entries[name] = {"dtype": "BF16", "shape": list(tensor.shape)}
        entries[name]["data_offsets"] = [begin, end]
    head = json.dumps(entries).encode()
    head += b" " * (-len(head) % 8)

    # The weights.
    torch.manual_seed(0)
    block = (torch.randn(2**25) * 0.02).to(TYPE).view(torch.int16).numpy().tobytes()
    with file.open("wb") as stream:
        stream.write(len(head).to_bytes(8, "little") + head)
        for begin in range(0, end, len(block)):
            stream.write(block[: end - begin])


def measured(run: Path, flags: list[str], limit_s: float) -> dict:
    """Runs train.py until it has written enough lines, or until its time is over, and ends it
    before it saves anything. Raises RuntimeError where there is nothing to measure."""
    command = [sys.executable, str(ROOT / "train.py"), *flags, *COMMON.split(), "--run", str(run)]
    log = run.parent / f"{run.name}.log"
    began = time.monotonic()
    with log.open("wb") as said:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=said, stderr=said, preexec_fn=die_with_parent
        )
        try:
            lines = watch(process, run, began + limit_s)
        finally:
            stop(process)
    if len(lines) < 2:
        words = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        found = f"{len(lines)} of {LINES} batches in {limit_s:.0f} s"
        raise RuntimeError(f"train.py trained {found}: {words[-1]}")
    return row_of(lines) | busy(run, lines)


def stop(process: subprocess.Popen) -> None:
    """Ends a run. Interrupted twice it saves nothing, but for its trace."""
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.7)  # two in less than half a second count as one
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(ENDING_S - 2.0)
    process.kill()  # and the kernel its workers, which end with it
    process.wait()


def watch(process: subprocess.Popen, run: Path, deadline: float) -> list[dict]:
    """Waits for the lines of a run. Returns those that there are."""
    lines: list[dict] = []
    while process.poll() is None and len(lines) < LINES and time.monotonic() < deadline:
        time.sleep(0.2)
        lines = read_metrics(run) if (run / "metrics.jsonl").is_file() else []
    return lines[:LINES]


def row_of(lines: list[dict]) -> dict:
    """Computes what metrics.jsonl says of the batches after the first one."""
    window = lines[1:]
    seconds = lines[-1]["time"] - lines[0]["time"]
    row = {"iterations": len(window), "seconds": seconds}
    for name, key in (("env_steps_per_s", "env_steps"), ("samples_per_s", "trained_once")):
        row[name] = (lines[-1][key] - lines[0][key]) / seconds
    for name in ("bubble_env", "bubble_rollout", "bubble_actor", "batch_size_mean"):
        row[name] = statistics.mean(line[name] for line in window)
    return row


def busy(run: Path, lines: list[dict]) -> dict:
    """Computes the share of time in which the GPU had work, from the trace: between the moments
    when the first of these batches was published and the last one."""
    if not (run / "trace.json").is_file():  # too busy to write it in time
        return {"gpu_busy": None, "both_share": None}
    stages: dict[str, list[tuple[float, float]]] = {stage: [] for stage in WORK}
    published = {}
    for worker, spans in read_trace(run).items():
        stage = worker.partition("-")[0]
        for name, start, end, args in spans:
            if name in WORK.get(stage, ()):
                stages[stage].append((start, end))
            if name == "publish":
                published[args["version"]] = end
    window = (published[lines[0]["version"]], published[lines[-1]["version"]])
    seconds = window[1] - window[0]
    alone = sum(covered(spans, window) for spans in stages.values())
    together = covered(stages["rollout"] + stages["actor"], window)
    return {"gpu_busy": together / seconds, "both_share": (alone - together) / seconds}


def covered(spans: list[tuple[float, float]], window: tuple[float, float]) -> float:
    """Returns the seconds of a window in which at least one of these spans was going on."""
    total = 0.0
    reached = window[0]
    for start, end in sorted(spans):
        start = max(start, reached)
        end = min(end, window[1])
        if end > start:
            total += end - start
            reached = end
    return total


# ---------------------------------------------------------------- tests


def tests(where: Where) -> Iterator[dict]:
    """Runs the tests that need a GPU, and counts them."""
    environment = dict(os.environ)
    if where.fake:
        environment.pop("FAKE_GPUS")  # they are for a GPU that is there
    with tempfile.TemporaryDirectory(prefix="tests-") as folder:
        file = Path(folder) / "results.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "gpu",
            "-n",
            "0",
            "-q",
            f"--junitxml={file}",
        ]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=max(1.0, where.limit_s - 2.0),
            preexec_fn=die_with_parent,
        )
        if not file.is_file():
            words = (done.stdout + done.stderr).strip().splitlines() or ["it said nothing"]
            raise RuntimeError(f"pytest: {words[-1]}")
        suite = ElementTree.parse(file).getroot().find("testsuite")
        counts = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
        counts["passed"] = counts["tests"] - sum(list(counts.values())[1:])
        yield counts
        for case in suite.iter("testcase"):
            for failure in (*case.iter("failure"), *case.iter("error")):
                name = f"{case.get('classname')}::{case.get('name')}"
                said = (failure.get("message") or "").strip().splitlines() or [""]
                yield {"error": f"{name}: {said[0][:300]}"}
