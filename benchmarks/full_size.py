"""Runs π0.5 at its released size through train.py once, on this machine's CPU.

    python -m benchmarks.full_size --json benchmarks/results/full_size.json

It writes a checkpoint as openpi publishes it, with random weights: 3.35 billion in bf16, 6.7 GB.
Then one LIBERO env plays one short segment and the actor trains on it once: the VLM and the expert
are frozen in bf16, and adapters are trained (LoRA), because fp32 weights, gradients and Adam's
moments of the whole expert do not fit beside two copies of the model into 24 GB.

    seconds          of each stage's spans in the run's trace, the mean of one
    peak_gb          the most that each process held (Pss), looked at every two seconds;
                     `predicted_gb` is memory.py's figure for it

Left out: learning anything, speed (a CPU of two cores has a ten-thousandth of a GPU's).
"""

import io
import json
import math
import shutil
import string
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import psutil
import sentencepiece
import torch
import tyro

from config import ROOT
from errors import exit_on_user_error
from models import pi
from models.formats import pi as files
from models.formats import source
from run_folder import read_trace

TYPE = torch.bfloat16
ROBOT = {"state": 8, "actions": 7}  # numbers that LIBERO's robot has
TASK = "turn_on_the_stove"
FLAGS = (
    "--model pi05 --env libero --placement colocated --prefix-dtype bfloat16 --lora-rank 16 "
    "--envs 1 --env-workers 1 --batch 1 --minibatch 1 --segment 1 --update-epochs 1 --eval-envs 0 "
    "--iterations 1 --timeout-s 3600"
)


@dataclass(kw_only=True)
class FullSizeConfig:
    folder: Path = ROOT / "runs" / "full_size"  # where checkpoint and run go: 7 GB
    json: Path | None = None  # also write the result to this file


def publish(folder: Path, config: pi.PiConfig) -> None:
    """Writes a checkpoint folder in openpi's layout, with random weights, tensor by tensor."""
    model = source.sketch(pi.Pi, config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    layout = files.SOURCES["openpi"].keys(shapes)
    entries = {}
    end = 0
    for name, keys in layout.items():
        rows, *rest = shapes[name]
        for key in keys:
            begin = end
            end += math.prod((rows // len(keys), *rest)) * TYPE.itemsize
            where = {"shape": [rows // len(keys), *rest], "data_offsets": [begin, end]}
            entries[key] = {"dtype": "BF16"} | where
    head = json.dumps(entries).encode()
    head += b" " * (-len(head) % 8)
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for entry in entries.values():
            weights = torch.randn(entry["shape"]) * 0.02
            if len(entry["shape"]) > 1:
                weights *= 50 * math.prod(entry["shape"][1:]) ** -0.5
            file.write(weights.to(TYPE).view(torch.int16).numpy().tobytes())
    numbers = {
        name: {"q01": [-1.0] * n, "q99": [1.0] * n, "mean": [0.0] * n, "std": [1.0] * n}
        for name, n in ROBOT.items()
    }
    write_vocabulary(folder / "tokenizer.model", config.vocabulary)
    (folder / "norm_stats.json").write_text(json.dumps({"norm_stats": numbers}))


def write_vocabulary(file: Path, pieces: int) -> None:
    """Writes a SentencePiece model of letters, filled up with words that no prompt has."""
    fillers = 0
    size = 0
    while size != pieces:
        fillers += pieces - size  # the first time a few too many, by the letters
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([string.ascii_letters + string.digits + "_.:;,'?\n"]),
            model_writer=model,
            model_type="char",
            pad_id=0,
            eos_id=1,
            bos_id=2,
            unk_id=3,
            hard_vocab_limit=False,
            vocab_size=2 * pieces,
            user_defined_symbols=[f"▁filler{i}" for i in range(fillers)],
            num_threads=1,
            minloglevel=2,
        )
        made = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        size = made.vocab_size()
    file.write_bytes(model.getvalue())


def watch(command: list[str]) -> dict[str, float]:
    """Runs train.py to its end. Returns the most that each of its processes held, in GB."""
    peak: dict[str, float] = defaultdict(float)
    run = subprocess.Popen(command, cwd=ROOT)
    root = psutil.Process(run.pid)
    while run.poll() is None:
        for process in [root, *root.children(recursive=True)]:
            try:
                name = "launcher" if process == root else process.name()
                name = "server" if name.startswith("python") else name  # it forks the others
                peak[name] = max(peak[name], process.memory_full_info().pss / 1e9)
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
        time.sleep(2.0)
    if run.returncode:
        sys.exit(run.returncode)
    return dict(peak)


def predicted(flags: list[str]) -> dict[str, float]:
    """Returns the GB that memory.py says of every process."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        command = [sys.executable, "memory.py", *flags, "--json", str(file)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        rows = json.loads(file.read_text())["rows"]
    return {row["process"]: row["total_gb"] for row in rows}


def main(config: FullSizeConfig) -> None:
    checkpoint = config.folder / "pi05_openpi"
    run = config.folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    if not checkpoint.is_dir():
        partial = checkpoint.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        publish(partial, pi.PI05_FULL)
        partial.rename(checkpoint)
    flags = [*FLAGS.split(), "--tasks", TASK, "--checkpoint", str(checkpoint)]
    flags += ["--tokenizer", str(checkpoint / "tokenizer.model")]
    begun = time.monotonic()
    peak = watch([sys.executable, "train.py", *flags, "--run", str(run)])
    result = {"what": "full_size", "seconds_in_all": time.monotonic() - begun, "peak_gb": peak}
    result["predicted_gb"] = predicted(flags)
    seconds = defaultdict(list)
    for spans in read_trace(run).values():
        for name, start, end, *_ in spans:
            seconds[name].append(end - start)
    result["seconds"] = {name: sum(spans) / len(spans) for name, spans in seconds.items()}
    print(json.dumps(result, indent=1))
    if config.json:
        config.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    with exit_on_user_error():
        main(tyro.cli(FullSizeConfig))
