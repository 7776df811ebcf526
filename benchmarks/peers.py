"""Makes the round trips of `machinery.py` in another library: TorchRL 0.14, under a Python that has
it.

    python bench.py machinery --peer PYTHON          runs this file with PYTHON, in turns with ours
    PYTHON benchmarks/peers.py --way server --envs 8  by itself

It imports nothing of this repository, so PYTHON's environment need not hold it. The simulator
returns constant observations of the same shapes, and the policy constant actions [10, 4]. Episodes
have 8 steps. There are three ways, each as TorchRL's documentation recommends it:

    server     AsyncBatchedCollector, a process per env and one that infers in batches,
               shared-memory slots (`transport="auto"`), transitions in messages of 64: its "fast
               configuration for many process-backed environments", and our shape
    driver     AsyncBatchedCollector, two processes with half the envs each, exchange in shared
               memory, inference in the driver
    workers    MultiAsyncCollector, two processes that each step half the envs one by one and infer
               for them in one batch: no round trip leaves its process, and nothing overlaps in one

Left out here, and counted for ours: the learner. What a collector yields is dropped; there are no
advantages, losses, gradients and weight transfers. Counted here alone: every observation is stored
twice, the second time as "next", as TorchRL does.
"""

import argparse
import functools
import json
import time

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.collectors import AsyncBatchedCollector, MultiAsyncCollector
from torchrl.data import Composite, Unbounded
from torchrl.envs import EnvBase, SerialEnv
from torchrl.modules.inference_server import InferenceServerConfig

VIEWS = 2
STATE = 4
ACTION = (10, 4)
EPISODE = 8
WORKERS = 2  # processes of `driver` and `workers`: as many env workers as ours
WARMUP_S = 2.0  # not measured


class Env(EnvBase):
    """Costs nothing: the same tensors again and again."""

    def __init__(self, pixels: int):
        super().__init__(device="cpu", batch_size=[])
        self.observation_spec = Composite(
            image=Unbounded((VIEWS, pixels, pixels, 3), dtype=torch.uint8),
            state=Unbounded((STATE,), dtype=torch.float32),
        )
        self.action_spec = Unbounded(ACTION)
        self.reward_spec = Unbounded((1,))
        self.seen = {
            "image": torch.zeros(VIEWS, pixels, pixels, 3, dtype=torch.uint8),
            "state": torch.zeros(STATE),
        }
        self.reward = torch.zeros(1)
        self.no = torch.tensor([False])
        self.yes = torch.tensor([True])
        self.steps = 0

    def _reset(self, tensordict: TensorDict | None, **kwargs) -> TensorDict:
        self.steps = 0
        return TensorDict(self.seen | {"done": self.no, "terminated": self.no}, [])

    def _step(self, tensordict: TensorDict) -> TensorDict:
        self.steps += 1
        done = self.yes if self.steps == EPISODE else self.no
        return TensorDict(self.seen | {"reward": self.reward, "done": done, "terminated": done}, [])

    def _set_seed(self, seed: int | None) -> None:
        pass


class Constant(torch.nn.Module):
    """Returns zeros for every observation."""

    def __init__(self):
        super().__init__()
        self.action = torch.zeros(ACTION)

    def forward(self, image: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        return self.action.expand(*state.shape[:-1], *ACTION)


def policy() -> TensorDictModule:
    return TensorDictModule(Constant(), in_keys=["image", "state"], out_keys=["action"])


def collector(way: str, envs: int, pixels: int):
    """Makes the collector of one way."""
    make = functools.partial(Env, pixels)
    if way == "workers":
        several = [functools.partial(SerialEnv, envs // WORKERS, make)] * WORKERS
        return MultiAsyncCollector(
            several, policy(), frames_per_batch=64 * envs // WORKERS, total_frames=-1, num_threads=1
        )
    settings = {
        "create_env_fn": [make] * envs,
        "frames_per_batch": 64 * envs,
        "env_backend": "multiprocessing",
        "policy_factory": policy,
        "policy_version_key": None,
        "server_config": InferenceServerConfig(
            max_batch_size=envs, min_batch_size=1, timeout=0.001, collect_stats=False
        ),
    }
    if way == "server":
        return AsyncBatchedCollector(**settings, transport="auto")
    return AsyncBatchedCollector(
        **settings, transport="driver", env_exchange="shm", envs_per_worker=max(1, envs // WORKERS)
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--way", choices=("server", "driver", "workers"), default="server")
    parser.add_argument("--envs", type=int, default=8)
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    source = collector(args.way, args.envs, args.pixels)
    first = None  # when the first batch came, seconds
    start = None  # when measuring began
    steps = 0  # since then
    for batch in source:
        now = time.monotonic()
        if start is not None:
            steps += batch.numel()
            if now - start >= args.seconds:
                end = {"event": "end", "round_trips": steps, "seconds": now - start}
                print(json.dumps(end), flush=True)
                break
        elif first is None:
            first = now
        elif now - first >= WARMUP_S:
            print(json.dumps({"event": "begin"}), flush=True)
            start = now
    source.shutdown()


if __name__ == "__main__":
    main()
