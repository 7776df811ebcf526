"""What the fork server imports once, so that a hundred workers begin with it.

Nothing here draws, opens a GPU or starts a thread: a fork would not survive that. (numpy's OpenBLAS
starts threads, and ends them before a fork.) What cannot be imported is imported again by the
worker that needs it, and that one says why.
"""

import contextlib
import gc
import importlib
import os

for name in os.environ["VLA3_PRELOAD"].split():
    with contextlib.suppress(Exception):
        module = importlib.import_module(name)
        if "preload" in vars(module):  # of a simulator
            module.preload()

# A worker's garbage collector would look at all of it, and so copy every page.
gc.collect()
gc.freeze()
