"""Gives every Python process `FAKE_GPUS` GPUs as soon as it imports torch; processes that it starts
have them too. How: ../__init__.py.
"""

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


class Finder:
    """Finds two modules as Python would, and changes them as they are loaded."""

    def __init__(self):
        self.changes = {"torch": add_devices, "memory": forget_driver}

    def find_spec(self, name, path, target=None):
        change = self.changes.pop(name, None)
        if change is None:
            return None
        if name == "torch":
            from benchmarks.fake_gpu import library

            library.load()  # torch asks once which devices there are
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_change(module):
            execute(module)
            change(module)

        spec.loader.exec_module = execute_and_change
        return spec


def add_devices(torch) -> None:
    from benchmarks.fake_gpu import device

    device.install(int(os.environ["FAKE_GPUS"]))


def forget_driver(memory) -> None:
    """Ours counts the memory of a driver on the host, which is not there either."""
    if memory.__file__ == str(ROOT / "memory.py"):
        memory.DRIVER = 0.0


if os.environ.get("FAKE_GPUS"):
    sys.path.insert(0, str(ROOT))
    sys.meta_path.insert(0, Finder())
