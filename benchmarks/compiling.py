"""Measures what it takes until compiled inference is ready, for the small models on this machine:

    python -m benchmarks.compiling [--models pi05 gr00t oft]

Per family, each in a process of its own: seconds for the first batch size and for one sample, which
is a code of its own; the most that any other size takes; codes (one for each kind of block and of
these two); the same with what the first process has left on disk; and processor seconds of this
process and its compilers, since other programs share the cores.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

import torch

from benchmarks.measuring import random_model
from errors import exit_on_user_error
from models import compiled

SIZES = (8, 1, 2, 5, 12, 32)  # the first two are compiled, the others must not be


def row(name: str) -> dict:
    """Measures one family in this process."""
    from torch._dynamo.utils import counters

    model = random_model(name, "small", "cpu", torch.float32).eval().requires_grad_(False)
    compiled.compile_parts(model)
    took = []
    with torch.inference_mode():
        for n in SIZES:
            given = compiled.random_observations(model, n, "cpu")
            noise = compiled.random_noise(model, n, "cpu")
            start = time.perf_counter()
            model.act(given, noise)
            took.append(time.perf_counter() - start)
    codes = counters["stats"]["unique_graphs"]
    spent = os.times()
    processor = spent.user + spent.system + spent.children_user + spent.children_system
    first, one, *others = (round(seconds, 1) for seconds in took)
    return {
        "model": name,
        "first_s": first,
        "one_sample_s": one,
        "others_s": max(others),
        "codes": codes,
        "processor_s": round(processor),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["pi05", "pi0", "gr00t", "oft"])
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        print(json.dumps(row(args.models[0])))
        return
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            for cache in ("empty", "full"):
                command = [
                    sys.executable,
                    "-m",
                    "benchmarks.compiling",
                    "--alone",
                    "--models",
                    name,
                ]
                environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder}
                told = subprocess.run(
                    command, env=environment, check=True, stdout=subprocess.PIPE, text=True
                )
                print({"cache": cache} | json.loads(told.stdout.splitlines()[-1]), flush=True)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
