"""The real launcher on one, four and eight GPUs that are not there (benchmarks/fake_gpu)."""

import pytest

from run_folder import read_metrics

# What trains at once with the weights that act: every ratio is 1 where those were fetched well, and
# where all ranks step alike.
EXACT = "--preset full --max-staleness 0 --update-epochs 1 --precision float32 --warmup 0"
RUNS = {
    1: ("--placement colocated", "rollout on cuda:0; actor on cuda:0"),
    4: (
        "--ratio 1:1 --rollout-workers 2 --actor-workers 2",
        "rollout on cuda:0, cuda:1; actor on cuda:2, cuda:3",
    ),
    8: (
        "--ratio 3:1 --placement hybrid",
        "rollout on cuda:2, cuda:3, cuda:4, cuda:5; actor on cuda:6, cuda:7",
    ),
}


def test_runs_on_one_four_and_eight_gpus(gpus, cli, tmp_path, tiny_checkpoint):
    """Places, processes, streams, page-locked slots, the weight plane and gradients over ranks."""
    sizes = "--envs 8 --env-workers 2 --batch 8 --minibatch 8 --eval-envs 0 --segment 3 --seed 3"
    same = f"{EXACT} {sizes} --checkpoint {tiny_checkpoint} --compile False --iterations 3"
    norms = {}
    for count, (flags, places) in RUNS.items():
        run = tmp_path / str(count)
        started = cli("train.py", f"{flags} {same} --run {run}", **gpus(count))
        status, output = started.finish(timeout=240.0)
        assert status == 0 and places in output, output
        lines = read_metrics(run)
        norms[count] = [line["grad_norm"] for line in lines]
        assert len(lines) == 3 and all(line["trained_once"] > 0 for line in lines)
        for line in lines:
            assert line["ratio_max"] == pytest.approx(1.0, abs=1e-3)

    # However many ranks share a batch, its gradient is the same.
    assert [norms[4][0], norms[8][0]] == pytest.approx(2 * [norms[1][0]], rel=1e-4)
