"""An emulated actor that infers while it waits for trajectories. No run of ours does, unless
EMULATED_HELP=1 is in the environment: `python -m benchmarks.helping_ladder` measures what it gives.

A rollout worker that begins an inference asks whether the actor waits. If so, the actor's GPUs take
their part of the batch, and what an inference takes for its samples becomes as much less; what it
takes besides, every GPU does. The actor trains what comes meanwhile when that inference is done.
Handing over costs nothing.

Who waits is in a file that all workers of a run share, as that of `devices.py` is. An actor counts
as waiting when it has not trained for `PAUSE`, which is longer than what lies between two
micro-batches. One actor worker stands for all GPUs that train, as everywhere here.
"""

import contextlib
import time
from collections.abc import Iterator

from benchmarks.emulated.devices import Shared

PAUSE = 0.005  # seconds without training after which an actor waits for trajectories


class Help:
    """What rollout workers and the actor of the run that this process belongs to know of it."""

    def __init__(self, share: float):
        """share: of a batch that is left where the actor's GPUs take their part."""
        self.share = share
        # Seconds of the monotonic clock: when the actor last ended training (infinite while it
        # trains), and until when it infers.
        self.state = Shared("emulated-help", count=2)

    def inference(self, fixed: float, samples: float) -> float:
        """Returns how long an inference takes that begins now. Alone it takes fixed + samples
        seconds, of which `samples` are in proportion to its samples."""
        now = time.monotonic()
        with self.state.locked() as state:
            trained_at, infers_until = state
            if now < max(trained_at + PAUSE, infers_until):
                return fixed + samples
            helped = fixed + self.share * samples
            state[1] = now + helped
        return helped

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """The actor trains, as soon as it has inferred what it has begun."""
        with self.state.locked() as state:
            state[0] = float("inf")
            infers_until = state[1]
        time.sleep(max(0.0, infers_until - time.monotonic()))
        yield
        with self.state.locked() as state:
            state[0] = time.monotonic()
