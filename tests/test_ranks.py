"""Two actor ranks over Gloo: their gradients, sums and tallies are those of one."""

from pathlib import Path

import pytest
import torch
from conftest import spawn
from torch import nn

from gradients import Gradients
from ranks import Meeting, Ranks
from tally import Tally


def act(rank: int, folder: str) -> None:
    """One of two ranks, whose gradients are 1, 2, 3 times its number plus one; and 1, 2, 3 on rank
    1 alone."""
    ranks = Ranks(rank, 2, "cpu", Meeting(Path(folder, "rendezvous-4")))
    used = nn.Parameter(torch.ones(3))
    unused = nn.Parameter(torch.ones(2))  # as the last layer's with --train-vlm
    once = nn.Parameter(torch.ones(3))  # as of ranks whose groups are all filtered
    gradients = Gradients([unused, used, once], ranks)
    ((rank + 1) * used * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    if rank == 1:
        (once * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    list(gradients.meet())
    list(gradients.sum())

    tally = Tally()
    tally.add("trained", 10 + rank)
    tally.add("staleness_max", 3 - rank, "max")
    tally.add("loss_policy", 0.5, "mean")
    if rank == 1:  # names that the first rank lacks, because all of its groups were filtered
        tally.add("goodness", torch.tensor(2.5), "mean")
        tally.add("ratio_max", 1.5, "max")
        tally.add("kl_at_1", 4.0, "part")
    else:
        tally.add("episodes_0", 7, "part")
    combined = ranks.combine(tally)
    found = {
        "gradients": (used.grad, unused.grad, once.grad),
        "sum": ranks.sum([float(rank), 2.0]),
        "values": combined.values,
        "how": combined.how,
        "place": (ranks.first, ranks.several),
        "met": [path.name for path in Path(folder).glob("rendezvous*")],
    }
    torch.save(found, f"{folder}/{rank}.pt")
    list(ranks.meet())
    ranks.leave()


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    spawn(act, folder, 2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_gradients_are_summed_over_ranks_and_untouched_weights_do_not_matter(both):
    for found in both:
        used, unused, once = found["gradients"]
        assert used.tolist() == [3.0, 6.0, 9.0] and once.tolist() == [1.0, 2.0, 3.0]
        assert unused is None
        assert found["sum"] == [1.0, 4.0]
    assert [found["place"] for found in both] == [(True, True), (False, True)]
    assert both[0]["met"] == ["rendezvous-4"]  # the file of this start, at version 4


def test_tallies_are_combined_also_of_names_that_one_rank_alone_has(both):
    expected = {
        "trained": 21.0,
        "staleness_max": 3.0,
        "loss_policy": 1.0,
        "goodness": 2.5,
        "ratio_max": 1.5,
        "kl_at_1": 4.0,
        "episodes_0": 7.0,
    }
    how = {"trained": "sum", "staleness_max": "max", "loss_policy": "mean", "goodness": "mean"}
    how |= {"ratio_max": "max", "kl_at_1": "part", "episodes_0": "part"}
    for found in both:
        assert found["values"] == expected and found["how"] == how


def test_one_rank_alone_changes_nothing(tmp_path):
    ranks = Ranks(0, 1, "cpu", Meeting(tmp_path / "rendezvous-0"))
    tally = Tally()
    assert list(ranks.meet()) == [] and ranks.sum([1.0]) == [1.0] and ranks.combine(tally) is tally
    ranks.leave()
    assert ranks.first and not ranks.several and not list(tmp_path.iterdir())
