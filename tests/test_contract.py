"""The written contract of a model family: a forker's omission or mistake is one sentence."""

import sys
import types

import pytest
import torch
from torch import nn

import models
from config import Config
from envs import metaworld
from errors import UserError
from models import contract
from models.flow import FlowPolicy


def family(**members) -> types.ModuleType:
    """A module that holds a whole family by itself."""
    module = types.ModuleType("mine")
    for name, value in ({"FORMATS": None, "build": None, "preparation": None} | members).items():
        if value != "left out":
            setattr(module, name, value)
    return module


@pytest.fixture
def register(monkeypatch):
    def put(module):
        monkeypatch.setitem(sys.modules, "mine", module)
        monkeypatch.setitem(models.MODELS, "emulated", "mine")

    return put


@pytest.mark.parametrize(
    "members, words",
    [
        ({"FORMATS": "left out"}, "lacks FORMATS: the name of the module"),
        ({"build": "left out"}, r"lacks build: \(config, spec, device, weights\)"),
        ({"FORMATS": "models.formats.pi"}, "lacks CONFIG: a frozen dataclass"),
        (
            {"FORMATS": "models.formats.pi", "CONFIG": None, "NETWORK": nn.Linear, "FULL": {}},
            "in its NETWORK lacks HEADS",
        ),
    ],
)
def test_what_a_family_lacks_is_named(register, members, words):
    register(family(**members))
    with pytest.raises(UserError, match=words) as error:
        models.load("emulated")
    assert "\n" not in str(error.value)


class Network(FlowPolicy):
    HEADS = ()
    heads = imitate = imitation_draw = None


def test_what_a_family_s_files_lack_is_named(register):
    files = "models.formats.bins"
    register(family(CONFIG=None, NETWORK=Network, FULL={}, FORMATS=files))
    with pytest.raises(UserError, match="files of model family 'emulated' lacks MARKS"):
        models.files("emulated")


def test_what_a_preparation_lacks_is_named(register):
    class Half:
        def observe(self, images, state, task):
            return {}

    register(family(preparation=lambda header, tokenizer: Half()))
    with pytest.raises(UserError, match="preparation of model family 'emulated' lacks actions"):
        models.preparation("emulated", None, "")


class Model(nn.Module):
    """The least that the contract asks for; `changes` replace what a method returns."""

    config = header = None

    def __init__(self, changes: dict):
        super().__init__()
        self.changes = {
            "observation_fields": {"picture": ((2, 2), torch.uint8)},
            "slot_fields": {"noise": ((3,), torch.float32)},
            "training_fields": ("picture", "noise", "actions"),
            "trainable": {},
            "critic": {},
            "idle": (),
        } | changes
        for name, value in self.changes.items():
            setattr(self, name, types.MethodType(lambda self, value=value: value, self))

    def acts_in(self, name):
        return None

    def draw(self, keys, explore):
        return {}

    def act(self, obs, drawn):
        return {}

    def evaluate(self, batch):
        return {}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"slot_fields": {"noise": ((3,), "float32")}}, "'noise' the dtype 'float32', not one of"),
        ({"slot_fields": {"noise": ((0.5,), torch.float32)}}, "'noise' the shape .* whole numbers"),
        (
            {"observation_fields": {"picture": ((2,), torch.bfloat16)}},
            "'picture' as bfloat16, which simulators cannot write",
        ),
        ({"critic": {"value.weight": None}}, "'value.weight' in its critic and does not train it"),
    ],
)
def test_what_is_wrong_with_a_model_s_fields_is_named(register, changes, words):
    register(family(build=lambda *_: Model(changes)))
    config = Config()
    config.train.model = "emulated"
    with pytest.raises(UserError, match=words) as error:
        models.build(config, metaworld.spec((), 64))
    assert "\n" not in str(error.value)


def test_a_model_that_lacks_a_method_is_named(register, monkeypatch):
    monkeypatch.delattr(Model, "evaluate")
    register(family(build=lambda *_: Model({})))
    with pytest.raises(UserError, match=r"lacks evaluate: \(slot fields\) → logprob"):
        models.build(emulated(), metaworld.spec((), 64))


def emulated() -> Config:
    config = Config()
    config.train.model = "emulated"
    return config


def test_a_model_may_call_its_observations_as_it_likes(register):
    register(family(build=lambda *_: Model({})))
    model = models.build(emulated(), metaworld.spec((), 64))
    contract.check_observed(model, {"picture": torch.zeros(2, 2, dtype=torch.uint8)})
    chunk = {"actions": torch.zeros(4, 2, 5), "logprob": torch.zeros(4, 2, 5)}
    good = {"noise": torch.zeros(4, 3), "value": torch.zeros(4)} | chunk
    contract.check_acted(model, good, 4, (2, 5))
    flat = torch.zeros(4, 1, 1)
    for name in chunk:
        with pytest.raises(UserError, match=f"'{name}' as .4, 1, 1. .*: its field is .4, 2, 5."):
            contract.check_acted(model, good | {name: flat}, 4, (2, 5))
    for row, words in (
        ({}, "observe does not give 'picture'"),
        ({"picture": torch.zeros(2, 2)}, "'picture' as .2, 2. torch.float32: its field is"),
        (
            {"picture": torch.zeros(2, 2, dtype=torch.uint8), "depth": torch.zeros(1)},
            "observe gives .'depth'., which the model has not",
        ),
    ):
        with pytest.raises(UserError, match=words):
            contract.check_observed(model, row)
    for out, words in (
        ({"value": torch.zeros(4)}, "act does not give 'noise'"),
        ({"noise": torch.zeros(4, 5), "value": torch.zeros(4)}, "'noise' as .4, 5. .*: its field"),
        ({"noise": torch.zeros(4, 3), "value": torch.zeros(4, 1)}, "'value' as .4, 1. "),
    ):
        with pytest.raises(UserError, match=words):
            contract.check_acted(model, out | chunk, 4, (2, 5))
