"""A trained policy goes back into the layout it came from, by the command that a user gives."""

import pytest
import torch
from safetensors.torch import load_file
from test_pi_files import SPEC, published, settings

from models import build, checkpoint


@pytest.fixture
def trained(tmp_path):
    """The folder of a published model, and a run's checkpoint of it after training."""
    folder = published("pi05", "openpi", tmp_path / "published")
    model = build(settings("pi05", folder), SPEC)
    with torch.no_grad():
        model.expert[1].q_proj.weight += 1.0
    checkpoint.save(tmp_path / "model.safetensors", model.header, model.state_dict())
    return folder, tmp_path / "model.safetensors"


def test_only_what_was_trained_changes(cli, trained, tmp_path):
    folder, path = trained
    status, output = cli(
        "-m", f"models.export --checkpoint {path} --like {folder} --out {tmp_path / 'out'}"
    ).finish()
    assert status == 0, output
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    moved = "paligemma_with_expert.gemma_expert.model.layers.1.self_attn.q_proj.weight"
    assert before.keys() == after.keys() and [
        key for key in before if not torch.equal(before[key], after[key])
    ] == [moved]
    torch.testing.assert_close(after[moved], before[moved] + 1.0)
    assert (tmp_path / "out" / "config.json").read_text() == (folder / "config.json").read_text()


def test_mistakes(cli, trained, tmp_path):
    folder, path = trained
    for flags, words in (
        (f"--checkpoint {path} --like {folder} --out {folder}", "exists already"),
        (f"--checkpoint {path} --like {folder} --out {tmp_path}/no/where", "does not exist"),
        (f"--checkpoint {path} --like {path} --out {tmp_path}/out", "one of our own"),
        (
            f"--checkpoint {folder} --like {folder} --out {tmp_path}/out",
            "was not written by this project",
        ),
    ):
        status, output = cli("-m", f"models.export {flags}").finish()
        assert (
            status == 2
            and words in output
            and output.startswith("error: ")
            and output.count("\n") == 1
        ), output
    assert not (tmp_path / "out").exists()
