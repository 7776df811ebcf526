"""What `bench.py` measures, one file each."""

import os

import torch.multiprocessing as mp

from config import ROOT


def context(module: str):
    """Where processes come from: a server that has imported `module` already, so that one starts in milliseconds."""
    # That server looks for the module here alone, and says nothing when it fails: each process would import torch itself.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    server = mp.get_context("forkserver")
    server.set_forkserver_preload([module])
    return server
