"""The user's smoke test says what it should, and draws what it saw; what breaks the contract is
named.
"""

import sys
from types import ModuleType

import imageio.v2 as imageio
import numpy as np
import pytest
import torch

import envs
from config import ROOT
from envs import EnvSpec, Step
from envs.check import BrokenContract, CheckConfig, main
from errors import UserError


def test_meta_world(tmp_path, capsys):
    config = CheckConfig(
        tasks=("handle-press", "reach"),
        at_most=1,
        image_size=32,
        steps=60,
        out=tmp_path / "sheet.png",
    )
    main(config)
    text = capsys.readouterr().out
    assert "2 tasks, 1 cameras of 32 pixels, state [4], action [4]" in text
    assert "ok    pictures [1, 32, 32, 3] uint8" in text and text.count("ok    ") == 6
    assert (
        "handle-press, random" in text
        and "handle-press, expert" in text
        and "success after" in text
        and "reach" not in text
    )
    assert "memory in MB" in text and str(config.out) in text
    sheet = imageio.imread(config.out)
    assert sheet.shape == (2 * 32, 3 * 32, 3) and sheet.std() > 10


def test_libero(tmp_path, capsys):
    try:
        envs.load("libero")
    except UserError as missing:
        pytest.skip(str(missing))
    main(
        CheckConfig(
            env="libero",
            tasks=("turn_on_the_stove",),
            image_size=32,
            steps=4,
            out=tmp_path / "sheet.png",
        )
    )
    assert "turn_on_the_stove, random" in capsys.readouterr().out
    assert imageio.imread(tmp_path / "sheet.png").shape == (32, 6 * 32, 3)


def test_mistakes(tmp_path):
    for change, words in (
        ({"env": "atari"}, "unknown --env"),
        ({"out": tmp_path / "no" / "x.png"}, "does not exist"),
        ({"steps": -1}, "--steps"),
        ({"seed": -1}, "--seed"),
        ({"at_most": -1}, "--at-most"),
        ({"out": tmp_path / "picture.txt"}, "must end in one of .png"),
    ):
        with pytest.raises(UserError, match=words):
            main(CheckConfig(**change))


# ---------------------------------------------------------------- simulators that are wrong

GOOD = EnvSpec(("one",), ("push",), 2, 8, 3, 4, 12)


def spec(tasks, image_size):
    return GOOD


class Env(envs.Env):
    """Keeps the contract. What is wrong with another one stands in its subclass."""

    reward = 0.5
    success = False
    failed = False
    shape = (2, 8, 8, 3)
    state = np.zeros(3, np.float32)

    def reset(self, task, seed):
        self.picture = np.full(self.shape, seed, np.uint8)

    def observe(self):
        return self.picture, self.state

    def step(self, action):
        return Step(self.reward, self.success, self.failed)


class Envs(envs.Envs):
    """The same of two that step together."""

    reward = torch.zeros(2)
    success = torch.zeros(2, dtype=torch.bool)
    failed = False

    def reset(self, rows, task, seeds):
        self.seeds = seeds

    def observe(self):
        return torch.zeros(self.count, 2, 8, 8, 3, dtype=torch.uint8), torch.zeros(self.count, 3)

    def step(self, actions):
        count = self.count
        return Step(
            *(x if x is False else x[:count] for x in (self.reward, self.success, self.failed))
        )


@pytest.fixture
def register(monkeypatch):
    """Makes a simulator of what a file would hold, under the name `made`."""

    def make(**offered):
        module = ModuleType("made")
        vars(module).update({"spec": spec} | offered)
        monkeypatch.setitem(sys.modules, "made", module)
        monkeypatch.setitem(envs.SIMULATORS, "made", ("made", ""))

    return make


def check(tmp_path):
    main(CheckConfig(env="made", image_size=8, out=tmp_path / "sheet.png"))


def changed(kind=Env, **attributes):
    return {kind.__name__: type(kind.__name__, (kind,), attributes)}


class Forgetful(Env):
    """Another picture in every episode, whatever the seed."""

    episodes = 0

    def reset(self, task, seed):
        self.episodes += 1
        self.picture = np.full(self.shape, self.episodes, np.uint8)


class Hurt(Env):
    """Falls over at once."""

    failed = True


class Narrow(Env):
    def step(self, action):
        return np.zeros(3) + action


def test_a_simulator_that_keeps_the_contract(register, tmp_path, capsys):
    register(Env=Env)
    check(tmp_path)
    assert "12 steps" in capsys.readouterr().out
    register(Env=Hurt)
    check(tmp_path)
    assert "failure after 1" in capsys.readouterr().out
    register(Envs=Envs)
    check(tmp_path)
    assert "actions [2, 4]" in capsys.readouterr().out


@pytest.mark.parametrize(
    "offered, sentence",
    [
        (changed(shape=(2, 8, 8)), r"pictures must be \[2, 8, 8, 3\] uint8, not \[2, 8, 8\] uint8"),
        (changed(state=np.zeros(3)), r"the state must be \[3\] float32, not \[3\] float64"),
        (changed(state=np.zeros(4, np.float32)), r"the state must be \[3\] float32, not \[4\]"),
        (changed(state=np.full(3, np.nan, np.float32)), "the state must be finite"),
        (changed(prompt=7), "a prompt must be words, not 7"),
        (changed(reward=float("nan")), "the Step's reward must be finite"),
        (changed(reward=np.zeros(1)), r"the Step's reward must be \[\]"),
        (changed(success=0), r"the Step's success must be \[\] bool, not \[\] int64"),
        (changed(failed=None), "the Step's failed must be .* bool"),
        (changed(step=lambda self, action: (0.0, False)), "must return a Step, not a tuple"),
        (changed(film=lambda self, size=256: np.zeros((size, 8, 3))), r"film\(64\) must be"),
        ({"Env": Forgetful}, "the same seed must begin the same episode.*pictures differ"),
        ({"Env": Narrow}, r"test_check.py:\d+: ValueError: operands could not be broadcast"),
        (changed(Envs, reward=np.zeros(2)), "the Step's reward must be a tensor"),
        (changed(Envs, reward=torch.zeros(2, 1)), r"the Step's reward must be \[2\] float32"),
        (changed(Envs, success=torch.zeros(2)), r"success must be \[2\] bool, not \[2\] float32"),
        (changed(Envs, failed=torch.zeros(2)), r"failed must be \[2\] bool, not \[2\] float32"),
        (changed(Envs, reward=torch.full((2,), torch.inf)), "the Step's reward must be finite"),
    ],
)
def test_what_breaks_the_contract_is_named(register, tmp_path, offered, sentence):
    register(**offered)
    with pytest.raises(BrokenContract, match=sentence):
        check(tmp_path)


def without(name: str, kind=Env) -> dict:
    rest = {key: value for key, value in vars(kind).items() if key != name}
    return {kind.__name__: type(kind.__name__, kind.__bases__, rest)}


@pytest.mark.parametrize(
    "offered, sentence",
    [
        ({}, "'made' .made. lacks a class Env, or Envs"),
        ({"Env": Env, "spec": None}, r"lacks the function spec\(tasks, image_size\)"),
        ({"Env": Env, "spec": lambda tasks: GOOD}, r"spec, which cannot be called as spec\(tasks"),
        (without("step"), "lacks step in its Env"),
        (without("observe", Envs), "lacks observe in its Envs"),
        ({"Env": object}, "an Env that is no class derived from envs.Env"),
        ({"Env": spec}, "an Env that is no class derived from envs.Env"),
        (
            changed(reset=lambda self: None),
            r"has in its Env reset, which cannot be called as reset\(task, seed\)",
        ),
        (
            changed(__init__=lambda self, tasks: None),
            r"__init__, which cannot be called as __init__\(tasks, image_size, quality\)",
        ),
        ({"Env": Env, "workers": lambda: 3}, r"cannot be called as workers\(ratio, placement\)"),
    ],
)
def test_what_a_file_lacks_is_named_when_it_is_loaded(register, offered, sentence):
    register(**offered)
    with pytest.raises(UserError, match=sentence):
        envs.load("made")


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"prompts": ()}, "1 tasks and 0 prompts"),
        ({"tasks": (), "prompts": ()}, "0 tasks and 0 prompts"),
        ({"action_dim": 0}, "action_dim 0, which is no whole number above 0"),
        ({"horizon": 9.5}, "horizon 9.5"),
        ({"limits": (1, 2, 3)}, "limits .1, 2, 3.: it needs none, or one per task"),
        ({"compares": "points"}, "compares 'points': choose success or reward"),
        (
            {"state_range": ((0.0, 0.0), (1.0, 1.0))},
            "lowest and the highest usual state, 3 numbers",
        ),
        ({"state_range": (1.0, 0.0)}, "lowest and the highest usual state"),
    ],
)
def test_a_wrong_spec_is_named(register, change, sentence):
    register(Env=Env, spec=lambda tasks, image_size: GOOD._replace(**change))
    with pytest.raises(UserError, match=sentence):
        envs.load("made").spec((), 8)


def test_a_spec_without_a_range_of_states_has_the_usual_one(register):
    register(Env=Env)
    found = envs.load("made").spec((), 8)
    assert found.state_range == ((-1.0,) * 3, (1.0,) * 3) and found.compares == "success"
    assert envs.load("made").workers("3:1", "disaggregated") is None
    register(Env=Env, workers=lambda ratio, placement: 5)
    assert envs.load("made").workers("3:1", "disaggregated") == 5


@pytest.mark.parametrize(
    "code, words",
    [
        ("x = 1\ndef spec(tasks:\n", ":2: SyntaxError"),
        ("\n\nx = {}['lift']", ":3: KeyError: 'lift'"),
        ("x = gripper", ":1: NameError: name 'gripper' is not defined"),
        ("import math\nx = math.glow", ":2: AttributeError"),
        ("import numpy\nnumpy.zeros(3) + numpy.zeros(4)", ":2: ValueError"),
        ("import json\njson.loads('{')", ":2: JSONDecodeError"),
        ("from envs import nothing", ":1: ImportError"),
        ("x = None.reset", ":1: AttributeError"),
    ],
)
def test_an_error_in_a_simulators_code_is_named_with_its_place(tmp_path, monkeypatch, code, words):
    (tmp_path / "mine.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(envs.SIMULATORS, "mine", ("mine", ""))
    with pytest.raises(UserError, match="mine.py:") as raised:
        envs.load("mine")
    assert words in str(raised.value) and "GL" not in str(raised.value)


def test_a_variable_that_is_left_over_is_named(monkeypatch):
    broken = RuntimeError("no context\nwas created")
    monkeypatch.setattr(envs, "LEFT", {})
    with pytest.raises(RuntimeError, match="no context"), envs.starting("made"):
        raise broken
    monkeypatch.setattr(envs, "LEFT", {"MUJOCO_GL": "glfw", "MUJOCO_EGL_DEVICE_ID": ""})
    given = "MUJOCO_GL=glfw and MUJOCO_EGL_DEVICE_ID= in .*: unset MUJOCO_GL MUJOCO_EGL_DEVICE_ID$"
    words = f"not start .no EGL context was created. with {given}"
    with pytest.raises(UserError, match=words), envs.starting("made"):
        raise RuntimeError("no EGL context\nwas created")
    # What may have another cause is named with its place.
    words = f"not start .no context was created. in .*test_check.py:[0-9]+, perhaps .* of {given}"
    with pytest.raises(UserError, match=words), envs.starting("made"):
        raise broken
    with pytest.raises(UserError, match="^assets are missing$"), envs.starting("made"):
        raise UserError("assets are missing")


@pytest.mark.parametrize(
    "code",
    [
        "raise AttributeError(\"'NoneType' object has no attribute 'eglQueryString'\")",
        "raise ImportError('Cannot initialize a EGL device display.')",
        "raise ImportError('libGL.so.1: cannot open shared object file')",
        "raise OSError('libOSMesa.so.8: cannot open shared object file')",
        "raise RuntimeError('invalid value for environment variable MUJOCO_GL: none')",
    ],
)
def test_a_missing_gl_is_said_to_be_one(tmp_path, monkeypatch, code):
    (tmp_path / "drawn.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(envs.SIMULATORS, "drawn", ("drawn", ""))
    with pytest.raises(UserError, match="does not start .* see setup.sh for the GL libraries"):
        envs.load("drawn")


def test_what_is_not_there_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(envs.SIMULATORS, "lost", ("envs.lost", ""))
    with pytest.raises(UserError, match="'lost' has no file: there is no envs.lost"):
        envs.load("lost")
    (tmp_path / "needy.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    for hint, words in (("", "pip install no_such_package"), ("ask me", "ask me")):
        monkeypatch.setitem(envs.SIMULATORS, "needy", ("needy", hint))
        with pytest.raises(UserError, match=f"not installed .*: {words}"):
            envs.load("needy")


def test_a_broken_simulator_ends_the_command_with_status_1(cli, tmp_path):
    script = tmp_path / "broken.py"
    script.write_text(f"""
import runpy, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import envs, test_check
sys.modules["made"] = test_check
test_check.Env.reward = float("nan")
del test_check.Envs
envs.SIMULATORS["made"] = ("made", "")
sys.argv = ["check", "--env", "made", "--image-size", "8"]
runpy.run_path({str(ROOT / "envs" / "check.py")!r}, run_name="__main__")
""")
    status, output = cli(script).finish()
    assert status == 1 and "Traceback" not in output, output
    assert "ok    state [3] float32, finite" in output
    assert "error: the simulator breaks its contract: the Step's reward must be finite" in output
