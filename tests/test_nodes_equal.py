"""Runs of several nodes, by torchrun on this machine, learn the bits that one node learns which has
all their lanes and as many actor workers.

Of who plays and trains what, in one process: test_global_numbers.py; of gradients: test_learner.py.
"""

import socket
from pathlib import Path

import pytest
import torch
from conftest import assert_balanced
from safetensors.torch import load_file

from config import ROOT
from run_folder import read_metrics

UPDATES = 5
LANES = 24
# What a line says of time, of memory, and of who happened to share an inference. All else must be
# the same.
TIMED = {"time", "env_steps_per_s", "samples_per_s", "reduce_s", "reduce_wait_s", "batch_wait_ms"}
TIMED |= {"bubble_env", "bubble_rollout", "bubble_actor", "waits", "cpu_fraction", "rss_gb"}
TIMED |= {"weight_sync_s", "weight_stall_s", "batch_size_mean", "batch_size_hist", "nodes"}
TIMED |= {"queue_depths", "tuning"}
SAME = (
    f"--iterations {UPDATES} --checkpoint-every {UPDATES} --eval-envs 0 --ratio 1:1 --seed 3 "
    "--update-epochs 2"
)
# A simulator and a policy of elementwise numbers, at random speeds, asynchronous but for staleness.
EXACT = f"--model emulated --env emulated --image-size 8 --lr 0.02 {SAME}"
EXACT += " --preset full --max-staleness 0"
PPO = f"{EXACT} --value-lr 0.02 --chunk 5"
GRPO = f"{EXACT} --algorithm grpo --group-size 2"


def sizes(lanes: int, actors: int, each: int, segment: int) -> str:
    """Writes how much a node has of everything. each: trajectories of a lane in a batch.

    An actor worker trains its share of a minibatch in one pass: more of them would add up by
    arrival."""
    minibatch = lanes * each // 2
    numbers = f"--envs {lanes} --batch {lanes * each} --minibatch {minibatch} --segment {segment}"
    return f"{numbers} --micro-batch {minibatch // actors * segment} --actor-workers {actors}"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def both(cli, tmp_path):
    """Runs one node, and several with the same lanes. Returns both run folders."""

    def learn(
        file: Path, flags: str, nodes: int, each: int, segment: int, workers: str = ""
    ) -> list[Path]:
        path = {"PYTHONPATH": str(ROOT)}
        folders = [tmp_path / "one", tmp_path / "several"]
        one = f"{flags} {sizes(LANES, nodes, each, segment)} --env-workers 2 {workers}"
        assert_done([cli(file, f"{one} --run {folders[0]}", **path)])
        node = f"{flags} {sizes(LANES // nodes, 1, each, segment)} --env-workers 1"
        command = f"torch.distributed.run --nnodes {nodes} --nproc-per-node 1 --rdzv-backend c10d "
        command += f"--rdzv-endpoint 127.0.0.1:{free_port()} --rdzv-id equal -- {file} {node} "
        command += f"--run {folders[1]}"
        assert_done([cli("-m", command, **path) for _ in range(nodes)])
        return folders

    return learn


def assert_done(runs: list) -> None:
    for run in runs:
        status, output = run.finish(timeout=400)
        assert status == 0 and f"{UPDATES} iterations done" in output, output


def difference(one: Path, several: Path) -> float:
    """Returns the largest difference of a weight, or of what the optimizer remembers of it."""
    saved = [folder / "checkpoints" / f"{UPDATES:06d}" for folder in (one, several)]
    weights = [load_file(path / "model.safetensors") for path in saved]
    assert weights[0].keys() == weights[1].keys()
    states = [torch.load(path / "optimizer.pt", weights_only=True)["state"] for path in saved]
    assert states[0].keys() == states[1].keys()
    pairs = [(weights[0][name], weights[1][name]) for name in weights[0]]
    pairs += [(states[0][i][name], states[1][i][name]) for i in states[0] for name in states[0][i]]
    return max(float((a - b).abs().max()) for a, b in pairs)


def assert_same_lines(one: Path, several: Path, timed: set[str]) -> list[dict]:
    """Rewards, success, losses, staleness and the ledger. Returns the lines of one."""
    lines, others = read_metrics(one), read_metrics(several)
    assert len(lines) == len(others) == UPDATES
    for line, other in zip(lines, others, strict=True):
        assert line.keys() ^ other.keys() == {"nodes"}
        for name in line.keys() - timed:
            assert line[name] == other[name], (line["iteration"], name)
        assert line["staleness_max"] == 0 and line["trained"] > 0
    assert assert_balanced(one)["collected"] == assert_balanced(several)["collected"]
    return lines


@pytest.mark.parametrize(
    "nodes, each, segment, flags",
    [
        (2, 1, 4, PPO),
        pytest.param(2, 2, 6, GRPO, marks=pytest.mark.slow),
        pytest.param(4, 2, 4, PPO, marks=pytest.mark.slow),
        pytest.param(4, 2, 6, GRPO, marks=pytest.mark.slow),
    ],
)
def test_nodes_learn_the_bits_of_one_node_with_all_their_lanes(both, nodes, each, segment, flags):
    """24 lanes: 2 nodes of 12 or 4 of 6, with one actor worker each, against 2 or 4 on one node."""
    folders = both(Path(__file__).with_name("exact.py"), flags, nodes, each, segment)
    assert difference(*folders) == 0.0
    lines = assert_same_lines(*folders, TIMED)
    assert any(line["episodes"] and line["success_rate"] for line in lines)
    assert all(line["grad_norm"] > 0 for line in lines)
    assert len({line["reward"] for line in lines}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [2, 4])
def test_nodes_learn_the_weights_of_one_node_on_the_real_simulator(both, nodes, tiny_checkpoint):
    """Meta-World and a π0.5, whose matrix products depend on how many rows they are given: so all
    lanes of a rollout worker are inferred together, here and there. Lane l asks rollout worker
    l mod their number, which therefore has the lanes of a node."""
    flags = f"{SAME} --checkpoint {tiny_checkpoint} --preset sync-disaggregated"
    folders = both(ROOT / "train.py", flags, nodes, 1, 2, f"--rollout-workers {nodes}")
    assert difference(*folders) <= 1e-6
    lines = assert_same_lines(*folders, TIMED - {"batch_size_mean", "batch_size_hist"})
    assert all(line["grad_norm"] > 0 for line in lines)
    before = load_file(tiny_checkpoint)
    after = load_file(folders[0] / "checkpoints" / f"{UPDATES:06d}" / "model.safetensors")
    assert max(float((after[name] - before[name]).abs().max()) for name in before) > 1e-5
