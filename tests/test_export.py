"""A trained policy goes back into the layout it came from, by the command that a user gives."""

import pytest
import torch
from safetensors.torch import load_file
from test_pi_files import SPEC, published, settings

from config import completed
from errors import UserError
from models import build, checkpoint, export, lora
from models.export import ExportConfig


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


def test_what_would_act_in_other_units_or_on_other_weights_is_refused(trained, tmp_path):
    folder, path = trained
    out = tmp_path / "out"
    given = {"checkpoint": path, "like": folder}
    with pytest.raises(UserError, match="is in the original's own folder: give another --out"):
        export.main(ExportConfig(**given, out=folder / "trained"))
    header = checkpoint.read_header(path)
    tensors = load_file(path)
    counted = tmp_path / "counted.safetensors"
    checkpoint.save(counted, header._replace(stats=header.stats | {"counted": True}), tensors)
    with pytest.raises(UserError, match="by others, so its tools would act in wrong units"):
        export.main(ExportConfig(checkpoint=counted, like=folder, out=out))

    # Adapters go on what they were trained on alone.
    model = build(completed(settings("pi05", folder), lora_rank=2), SPEC)
    for layer in lora.adapted(model).values():
        torch.nn.init.ones_(layer.lora_a)
    adapted = tmp_path / "adapted.safetensors"
    checkpoint.save(adapted, model.header, model.state_dict())
    export.main(ExportConfig(checkpoint=adapted, like=folder, out=out, adapter_only=True))
    assert (out / "adapter_model.safetensors").is_file()
    with torch.no_grad():
        model.expert[1].q_proj.weight[0, 0] += 1.0
    checkpoint.save(adapted, model.header, model.state_dict())
    with pytest.raises(UserError, match="has another '.*layers.1.self_attn.q_proj.weight' than"):
        export.main(
            ExportConfig(checkpoint=adapted, like=folder, out=tmp_path / "no", adapter_only=True)
        )
    assert not list(tmp_path.glob(".*")) and not (tmp_path / "no").exists()


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
