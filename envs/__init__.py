"""What a simulator must offer, and where each one is found.

A new simulator is one file and one line in `SIMULATORS`. The file offers:

    spec(tasks, image_size) -> EnvSpec    what the slots must hold; imports nothing heavy
    Env                                   a class derived from `envs.Env`: one env
    Envs                                  or one derived from `envs.Envs`: many that step together;
                                          with both, `Env` is for evaluation and for looking at it
    workers(ratio, placement) -> int      optional: how many env workers to start; else --ratio
                                          decides
    perturbed(suite) -> dict              optional: other suites that perturb this one; name → why
                                          it cannot be played here, or ""
    preload()                             optional: imports what takes seconds, before the process
                                          is copied for each env worker; draws nothing
    PACKAGES                              optional: packages that it imports where they are used,
                                          because that takes seconds

`load` checks this list, `python -m envs.check --env NAME` checks it by playing. Time limits are the
lanes' business (`EnvSpec.limit`), so success, failure and truncation stay apart.
"""

import contextlib
import importlib
import importlib.util
import inspect
import os
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np

from errors import UserError, place_of, require

if TYPE_CHECKING:  # importing it takes seconds, and a simulator without a GPU does not need it
    from torch import Tensor

# What the user's environment says of drawing. Left over from another project, it breaks ours.
GL_VARIABLES = ("MUJOCO_GL", "MUJOCO_EGL_DEVICE_ID", "PYOPENGL_PLATFORM")
LEFT = {name: os.environ[name] for name in GL_VARIABLES if os.environ.get(name, "egl") != "egl"}
# Read where MuJoCo, SAPIEN and Mesa are imported. Processes of the software rasteriser scale, its
# threads only fight. Compiled shaders save each process half a second, outside the user's home.
os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault("LP_NUM_THREADS", "0")
SHADERS = f"{tempfile.gettempdir()}/mesa_shader_cache_{os.getuid()}"
os.environ.setdefault("MESA_SHADER_CACHE_DIR", SHADERS)

# What --env takes: name → its module, and how to install the packages that it imports.
SIMULATORS = {
    "metaworld": ("envs.metaworld", "pip install -r requirements.txt"),
    "libero": ("envs.libero", "pip install -r requirements.txt"),
    "maniskill": ("envs.maniskill", "bash setup.sh --maniskill"),
    "robocasa": ("envs.robocasa", "envs/robocasa.py describes the environment of its own"),
    "emulated": ("benchmarks.emulated.libero", ""),
    "emulated_gr00t": ("benchmarks.emulated.gr00t", ""),
    "vectorised": ("benchmarks.emulated.maniskill", ""),
    "emulated_metaworld": ("benchmarks.emulated.metaworld", ""),
    "vectorised_hybrid": ("benchmarks.emulated.maniskill_hybrid", ""),
}

# How an import fails where GL or the display is missing: the kind of error, and its message.
# PyOpenGL has None in place of a library that is missing; MuJoCo says what it does not find.
GL_ERRORS = (
    (AttributeError, r"^'NoneType' object has no attribute '(egl|gl|glX|OSMesa)[A-Z]"),
    (ImportError, r"\b(EGL|OSMesa|GLFW|OpenGL)\b"),
    (OSError | ImportError, r"\blib(EGL|GL|GLX|GLdispatch|OpenGL|OSMesa|X11|vulkan)\.so"),
    (RuntimeError, r"\b(MUJOCO_GL|MUJOCO_EGL_DEVICE_ID|PYOPENGL_PLATFORM|EGL|OpenGL)\b"),
)
GL_PACKAGES = ("OpenGL", "glfw")  # whose own errors are always of this kind

Compared = Literal["success", "reward"]
# How a wide picture becomes square: squeezed (bilinear, or bicubic), or whole between black bars.
Fit = Literal["squeeze", "bicubic", "letterbox"]


class EnvSpec(NamedTuple):
    """What a simulator looks like from outside: enough to size slots and build prompts."""

    tasks: tuple[str, ...]
    prompts: tuple[str, ...]  # one language instruction per task
    views: int  # cameras: all that there are, then those that the policy sees
    image_size: int  # pixels, square
    state_dim: int  # S, numbers of the proprioception, float32
    action_dim: int  # A
    horizon: int  # control steps before an episode is truncated, of the longest task
    # lowest and highest usual state [S] each, an untrained model's -1 and 1; a number means all
    state_range: tuple = (-1.0, 1.0)
    # what GRPO compares within a group: who succeeded, or the summed reward of an episode (dense)
    compares: Compared = "success"
    limits: tuple[int, ...] = ()  # the same of each task; none means the horizon for all
    # What other projects' policies are used to: a robot of `models.formats.bins.ROBOTS`, and the
    # size that their data's pictures were drawn in, pixels
    robot: str = ""
    picture: int = 256
    fit: Fit = "squeeze"  # of wide pictures, as the policy wants it
    states: int = 0  # fixed initial states that each task has; 0 means that the seed draws them
    note: str = ""  # what a user must know of the choice of tasks, a line each
    rate: float = 0.0  # control steps per second, where that is known

    def limit(self, task: int) -> int:
        """Control steps before an episode of a task is truncated, whatever tasks it is beside."""
        return self.limits[task] if self.limits else self.horizon

    def seen_by(self, header) -> "EnvSpec":
        """The same with the cameras and the fit of a policy's `models.checkpoint.Header`."""
        views = header.shape.get("views", self.views)
        return self._replace(views=views, fit=header.stats.get("fit", self.fit))


class Step(NamedTuple):
    """What one control step brought: numbers, or of `Envs` tensors [N] each.

    An episode ends with success, or without it where it failed (a dropped object, a fall, a safety
    limit). One that failed has not succeeded, whatever `success` says."""

    reward: "float | Tensor"
    success: "bool | Tensor"
    failed: "bool | Tensor" = False


class Env(ABC):
    """One env of a simulator."""

    # The instruction of the running episode, where episodes of one task differ in it.
    prompt: str | None = None
    # How many cameras the policy sees, the first ones; others need not be drawn. None means all.
    views: int | None = None
    # Which of the `EnvSpec.states` episodes begin at, one for each seed; none means all.
    states: tuple[int, ...] = ()

    def __init__(self, tasks: tuple[str, ...], image_size: int, quality: str = "fast"):
        """quality: "fast" or "full" pictures, for a simulator that knows the difference."""
        self.tasks = tasks
        self.size = image_size
        self.quality = quality

    @abstractmethod
    def reset(self, task: int, seed: int) -> None:
        """Begins an episode of a task; the same seed begins the same episode."""

    @abstractmethod
    def observe(self) -> tuple[np.ndarray, np.ndarray]:
        """Draws. Returns pictures [V, H, W, 3] uint8 and the state [S] float32."""

    @abstractmethod
    def step(self, action: np.ndarray) -> Step:
        """Takes one control step with an action [A] float32. Draws nothing."""

    def film(self, size: int = 256) -> np.ndarray:
        """Draws a frame for people, [size, size, 3] uint8; by default the policy's first view.

        Evaluations are filmed as they are played, so it must not change what follows: no state of
        the simulator, and no random numbers."""
        return resized(self.observe()[0][0], size)

    def renderer(self) -> str:
        """Names what has drawn last, as its driver does; "" where the simulator does not know."""
        return ""

    def close(self) -> None:  # noqa: B027  nothing to free is the default
        """Frees what the interpreter's exit does not."""


class Envs(ABC):
    """The envs of one lane of a vectorised simulator, which step together."""

    # How many cameras the policy sees, the first ones; others need not be drawn. None means all.
    views: int | None = None
    # Which of the `EnvSpec.states` episodes begin at, one for each seed; none means all.
    states: tuple[int, ...] = ()
    fit: Fit = "squeeze"

    def __init__(self, tasks: tuple[str, ...], image_size: int, count: int, device: str):
        """device: "cpu" or "cuda:k", where all tensors are."""
        self.tasks = tasks
        self.size = image_size
        self.count = count
        self.device = device

    @abstractmethod
    def reset(self, rows: list[int], task: int, seeds: list[int]) -> None:
        """Begins an episode of a task in some of the envs, one seed each; the others play on."""

    @abstractmethod
    def observe(self) -> "tuple[Tensor, Tensor]":
        """Draws. Returns pictures [N, V, H, W, 3] uint8 and states [N, S] float32."""

    @abstractmethod
    def step(self, actions: "Tensor") -> Step:
        """Takes one control step in every env, also in those never reset; actions [N, A] float32.

        Draws nothing."""

    def film(self, size: int = 256) -> np.ndarray:
        """Draws a frame of the first env for people, [size, size, 3] uint8, as `Env.film`."""
        return resized(self.observe()[0][0, 0].cpu().numpy(), size)

    def renderer(self) -> str:
        """Names what has drawn last, as its driver does; "" where the simulator does not know."""
        return ""

    def close(self) -> None:  # noqa: B027  nothing to free is the default
        """Frees what the interpreter's exit does not."""


def resized(picture: np.ndarray, size: int) -> np.ndarray:
    """A square picture [H, H, 3] with `size` pixels a side, each the nearest one."""
    pixels = np.arange(size) * len(picture) // size
    return picture[pixels][:, pixels]


@dataclass(frozen=True)
class Simulator:
    """A simulator whose file keeps the contract."""

    name: str
    module: ModuleType

    @property
    def vectorised(self) -> bool:
        return Envs in offered_classes(self.module)

    def spec(self, tasks: tuple[str, ...], image_size: int) -> EnvSpec:
        """Describes these tasks; none means the default ones. Raises UserError."""
        return checked_spec(self.name, self.module.spec(tasks, image_size))

    def make(self, spec: EnvSpec, quality: str = "fast", states: tuple[int, ...] = ()) -> Env:
        """Makes one env, also of a vectorised simulator. states: as `Env.states`."""
        if Env not in offered_classes(self.module):
            from envs.lanes import OneOfMany

            return OneOfMany(self, spec, states)
        env = self.module.Env(spec.tasks, spec.image_size, quality)
        env.views = spec.views
        env.states = states
        return env

    def make_many(
        self, spec: EnvSpec, count: int, device: str, states: tuple[int, ...] = ()
    ) -> Envs:
        """Makes `count` envs of a vectorised simulator, which step together. states: as
        `Envs.states`."""
        many = self.module.Envs(spec.tasks, spec.image_size, count, device)
        many.views = spec.views
        many.fit = spec.fit
        many.states = states
        return many

    def perturbed(self, suite: str) -> dict[str, str]:
        """Lists the perturbations of a suite: name → why it cannot be played here, or ""."""
        listed = vars(self.module).get("perturbed")
        return listed(suite) if listed else {}

    def workers(self, ratio: str, placement: str) -> int | None:
        """Says how many env workers to start; None leaves that to --ratio."""
        workers = vars(self.module).get("workers")
        return workers(ratio, placement) if workers else None


def load(name: str, installed: bool = True) -> Simulator:
    """Imports a simulator and checks what it offers. Raises UserError, which says what to do.

    installed: its packages must be there, without which it has a spec and no envs."""
    require(name in SIMULATORS, f"unknown --env {name!r}: choose one of {', '.join(SIMULATORS)}")
    path, install = SIMULATORS[name]
    try:
        module = importlib.import_module(path)
        for package in vars(module).get("PACKAGES", ()) if installed else ():
            if importlib.util.find_spec(package) is None:
                raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    except UserError:
        raise
    except ModuleNotFoundError as error:
        require(error.name != path, f"the simulator {name!r} has no file: there is no {path}")
        how = install or f"pip install {error.name}"
        missing = f"the simulator {name!r} is not installed (no module {error.name!r})"
        raise UserError(f"{missing}: {how}") from None
    except Exception as error:
        if is_about_gl(error):
            raise does_not_start(name, error) from error
        what = f"has an error in {place_of(error)}: {type(error).__name__}: {error}"
        raise UserError(f"the simulator {name!r} {what}") from error
    check_contract(name, module)
    return Simulator(name, module)


# What an env raises whose simulation cannot go on: one that is unstable, or singular. What is left
# of such an env is not to be trusted.
UNSTABLE = (FloatingPointError, np.linalg.LinAlgError)


def is_about_gl(error: Exception) -> bool:
    found = (isinstance(error, kind) and re.search(words, str(error)) for kind, words in GL_ERRORS)
    return type(error).__module__.partition(".")[0] in GL_PACKAGES or any(found)


def does_not_start(name: str, error: Exception) -> UserError:
    """Names the variable that is left over, or else the libraries that may be missing."""
    said = f"the simulator {name!r} does not start ({' '.join(str(error).split())})"
    given = " and ".join(f"{variable}={value}" for variable, value in LEFT.items())
    if not given:
        return UserError(f"{said}: see setup.sh for the GL libraries it needs")
    because = "with" if is_about_gl(error) else f"in {place_of(error)}, perhaps because of"
    return UserError(f"{said} {because} {given} in the environment: unset {' '.join(LEFT)}")


@contextlib.contextmanager
def starting(name: str) -> Iterator[None]:
    """Turns an error of a simulator that is made and first drawn into UserError, if GL's or perhaps
    that of a variable in LEFT."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not (LEFT or is_about_gl(error)):
            raise
        raise does_not_start(name, error) from error


def check_contract(name: str, module: ModuleType) -> None:
    """Raises UserError with a sentence that names what a simulator's file lacks or has wrong."""
    offered = vars(module)
    where = f"the simulator {name!r} ({module.__name__})"
    require(callable(offered.get("spec")), f"{where} lacks the function spec(tasks, image_size)")
    check_call(f"{where} has", "spec", module.spec, ("tasks", "image_size"))
    classes = offered_classes(module)
    require(classes, f"{where} lacks a class Env, or Envs")
    for base, found in classes.items():
        kind = base.__name__
        strange = f"{where} has an {kind} that is no class derived from envs.{kind}"
        require(inspect.isclass(found) and issubclass(found, base), strange)
        missing = ", ".join(sorted(found.__abstractmethods__))
        require(not missing, f"{where} lacks {missing} in its {kind}")
        members = dict(inspect.getmembers(found))
        for method, function in inspect.getmembers(base, inspect.isfunction):
            parameters = tuple(inspect.signature(function).parameters)
            check_call(f"{where} has in its {kind}", method, members[method], parameters)
    for function, parameters in (("workers", ("ratio", "placement")), ("perturbed", ("suite",))):
        if function in offered:
            check_call(f"{where} has", function, offered[function], parameters)


def offered_classes(module: ModuleType) -> dict[type, type]:
    """Which of the two classes a simulator's file has: base → its own."""
    offered = {base: vars(module).get(base.__name__, base) for base in (Env, Envs)}
    return {base: found for base, found in offered.items() if found is not base}


def check_call(where: str, name: str, function, parameters: tuple[str, ...]) -> None:
    """Raises UserError where a function does not take so many arguments."""
    try:
        inspect.signature(function).bind(*parameters)
    except TypeError:
        given = ", ".join(parameter for parameter in parameters if parameter != "self")
        raise UserError(f"{where} {name}, which cannot be called as {name}({given})") from None


def checked_spec(name: str, spec: EnvSpec) -> EnvSpec:
    """Checks a spec and gives `state_range` one number per dimension. Raises UserError."""
    where = f"the spec of the simulator {name!r}"
    require(isinstance(spec, EnvSpec), f"{where} is a {type(spec).__name__}, not an EnvSpec")
    tasks = len(spec.tasks)
    prompts = len(spec.prompts)
    counts = f"{where} has {tasks} tasks and {prompts} prompts"
    require(tasks == prompts > 0, f"{counts}: it needs one prompt per task, and a task")
    for field in ("views", "state_dim", "action_dim", "horizon"):
        value = getattr(spec, field)
        wrong = f"{where} has {field} {value!r}, which is no whole number above 0"
        require(isinstance(value, int) and value > 0, wrong)
    natural = isinstance(spec.states, int) and spec.states >= 0
    require(natural, f"{where} has states {spec.states!r}, which is no whole number from 0 up")
    limits = spec.limits or (spec.horizon,) * tasks
    each = f"{where} has limits {spec.limits!r}: it needs none, or one per task, the longest"
    right = len(limits) == tasks and 0 < min(limits) <= max(limits) == spec.horizon
    require(right, f"{each} being its horizon {spec.horizon}")
    choose = f"choose {' or '.join(get_args(Compared))}"
    require(spec.compares in get_args(Compared), f"{where} compares {spec.compares!r}: {choose}")
    try:
        low, high = (np.broadcast_to(bound, spec.state_dim) for bound in spec.state_range)
    except (ValueError, TypeError):  # another number of them, or none at all
        low = high = np.zeros(1)
    usual = f"the lowest and the highest usual state, {spec.state_dim} numbers each"
    wrong = f"{where} has state_range {spec.state_range!r}: it must be {usual}"
    require((low < high).all(), wrong)
    return spec._replace(state_range=(tuple(low.tolist()), tuple(high.tolist())))
