"""What is found of LIBERO in package folders: small ones that these tests write."""

import pickle
import re
import zipfile

import numpy as np
import pytest
import torch

from envs import libero_suites
from envs.libero_suites import initial_states, limit_of, perturbed, prompt, tasks_of
from errors import UserError


def bddl(language: str) -> str:
    return f"(define (problem X)\n (:domain robosuite)\n (:language {language})\n)"


class Package:
    """A folder as LIBERO packages have."""

    def __init__(self, folder):
        self.folder = folder
        self.table = {}
        (folder / "benchmark").mkdir(parents=True)
        self.list_tasks()

    def list_tasks(self, **suites: list[str]) -> None:
        self.table |= suites
        file = self.folder / "benchmark" / "libero_suite_task_map.py"
        file.write_text(f"libero_task_map = {self.table!r}")

    def add(self, suite: str, task: str, language: str, states: int | None = 50) -> None:
        file = self.folder / "bddl_files" / suite / f"{task}.bddl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(bddl(language))
        if states is not None:
            self.add_states(suite, task, states)

    def add_states(self, suite: str, task: str, states: int, suffix: str = ".npz") -> None:
        file = self.folder / "init_files" / suite / f"{task}.pruned_init{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        if suffix:
            np.savez(file, states=np.zeros((states, 3)))
        else:
            torch.save(np.zeros((states, 3)), file)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Returns a function that makes the packages; nothing else is installed."""

    def clear() -> None:
        for function in (libero_suites.installed, libero_suites.find, libero_suites.language):
            function.cache_clear()

    def folder_of(name: str):
        return tmp_path / name if (tmp_path / name).exists() else None

    monkeypatch.setattr(libero_suites, "folder_of", folder_of)
    clear()
    yield lambda name: Package(tmp_path / name)
    clear()


def names(name: str) -> list[str]:
    return [task.name for task in tasks_of(name)]


def test_suites_are_the_folders_that_have_tasks_and_states(package):
    pro = package("libero")
    pro.list_tasks(libero_10=["b", "a"], libero_10_env=["a"], libero_10_swap=["b", "a"])
    for suite in ("libero_10", "libero_10_swap", "libero_10_temp_x0.1"):  # the last is not listed
        for task in ("a", "b"):
            pro.add(suite, task, task)
    pro.add("libero_10_with_trigger", "a", "a", states=None)
    pro.add("libero_10_with_milk", "FLOOR_SCENE1_a", "a", states=10)
    pro.add("libero_10_with_milk", "FLOOR_SCENE1_b", "b", states=0)
    pro.add("libero_mine", "own", "own")

    assert names("libero_10") == ["b", "a"]  # in the package's order, by bare names
    assert names("libero_10_swap") == ["libero_10_swap/b", "libero_10_swap/a"]
    assert names("libero_10_temp_x0.1") == ["libero_10_temp_x0.1/b", "libero_10_temp_x0.1/a"]
    assert names("libero_10_with_milk") == ["libero_10_with_milk/FLOOR_SCENE1_a"]
    said = "1 of libero_10_with_milk's 2 tasks have no initial states\n"
    assert libero_suites.left_out("libero_10_with_milk") == said
    assert libero_suites.left_out("libero_10") == libero_suites.left_out("a") == ""
    assert names("a") == names("libero_10/a") == ["a"]
    assert names("libero_10_swap/a") == ["libero_10_swap/a"]
    assert names("FLOOR_SCENE1_a") == ["libero_10_with_milk/FLOOR_SCENE1_a"]
    assert names("own") == ["libero_mine/own"]
    assert perturbed("libero_10") == {
        "libero_10_env": "has no task files",
        "libero_10_swap": "",
        "libero_10_temp_x0.1": "",
        "libero_10_with_milk": "",
        "libero_10_with_trigger": "has no initial states",
    }
    assert perturbed("libero_10_swap") == perturbed("libero_mine") == {}
    for name, words in (
        ("libero_10_env", "libero_10_env cannot be played .*: it has no task files"),
        ("libero_10_with_trigger", "it has no initial states"),
        ("libero_10_with_milk/FLOOR_SCENE1_b", "it has no initial states"),
        ("libero_goal/a", "unknown LIBERO task 'libero_goal/a'"),  # which libero_10 has
        ("juggle", "unknown LIBERO task 'juggle': choose suites .libero_10, libero_mine, or a per"),
    ):
        with pytest.raises(UserError, match=words):
            tasks_of(name)


def test_a_name_of_several_perturbed_suites_needs_its_suite(package):
    pro = package("libero")
    pro.add("libero_goal", "a", "a")
    for suite in ("libero_goal_with_mug", "libero_goal_with_milk"):
        pro.add(suite, "MAIN_SCENE1_a", "a")
    words = "several LIBERO suites have a task 'MAIN_SCENE1_a'.*as libero_goal_with_m.*/MAIN_SCENE1"
    with pytest.raises(UserError, match=words):
        tasks_of("MAIN_SCENE1_a")


def test_limits_are_the_base_s():
    for suite, limit in (
        ("libero_spatial_swap", 240),
        ("libero_object_temp_x0.1", 240),
        ("libero_goal_with_mug", 320),
        ("libero_10_lan", 480),
        ("libero_90", 400),
        ("libero_mine", 480),  # which has no base
    ):
        assert limit_of(suite) == limit


def test_words_are_the_file_s_where_it_says_something_else_than_the_base_s(package):
    pro = package("libero")
    pro.add("libero_10", "KITCHEN_SCENE10_open_it", "Open the thing")  # LIBERO's differ, too
    pro.add("libero_10_swap", "KITCHEN_SCENE10_open_it", "open THE  thing")
    pro.add("libero_10_lan", "KITCHEN_SCENE10_open_it", "Please, open\n it")
    pro.add("libero_10_with_mug", "MAIN_SCENE1_open_it", "Open it, mug")
    said = {suite: prompt(tasks_of(suite)[0]) for suite in libero_suites.installed().tasks}
    assert said == {
        "libero_10": "open it",
        "libero_10_swap": "open it",
        "libero_10_lan": "please, open it",
        "libero_10_with_mug": "open it, mug",
    }
    (pro.folder / "bddl_files" / "libero_10_lan" / "KITCHEN_SCENE10_open_it.bddl").write_text("()")
    libero_suites.language.cache_clear()
    with pytest.raises(UserError, match=r"KITCHEN_SCENE10_open_it.bddl has no \(:language"):
        prompt(tasks_of("libero_10_lan")[0])


def test_several_packages_share_their_suites(package):
    """RLinf's LIBERO, LIBERO-Pro and LIBERO-plus beside one another."""
    standard, pro, plus = map(package, libero_suites.PACKAGES)
    for one in (standard, pro, plus):
        one.add("libero_10", "a", "a", states=None)
        one.add_states("libero_10", "a", 50, suffix="")
    pro.add("libero_10_swap", "a", "a")
    stays = "view_0_0_100_0_0_initstate_0"
    variants = {
        "language": f"a_language_3_{stays}",
        "camera": "a_view_-15_5_110_0_2_initstate_0",
        "robot": "a_view_0_0_100_0_0_initstate_12",
        "noise": f"a_{stays}_noise_45",
        "light": "a_light_1",
        "background": "a_tb_2",
        "layout": "a_moved_level2_sample1",
    }
    plus.list_tasks(libero_10=[*variants.values(), "a_table_7", "a_add_1"])
    for task, words in (
        ("a_language_3", "Other words"),
        ("a_light_1", "a"),
        ("a_tb_2", "a"),
        ("a_table_7", "a"),
        ("a_moved_level2_sample1", "a"),
        ("a_add_1", "a"),
    ):
        plus.add("libero_10", task, words, states=None)
    for task in ("a_moved_level2_sample1", "a_add_1"):
        plus.add_states("libero_newobj/libero_10", task, 1, suffix="")

    tasks = {name: tasks_of(name) for name, why in perturbed("libero_10").items() if not why}
    assert {name: [task.package for task in found] for name, found in tasks.items()} == {
        "libero_10_swap": ["liberopro"],
        "libero_10_language": ["liberoplus"],
        "libero_10_camera": ["liberoplus"],
        "libero_10_robot": ["liberoplus"],
        "libero_10_light": ["liberoplus"],
        "libero_10_background": ["liberoplus"] * 2,
        "libero_10_layout": ["liberoplus"] * 2,
    }
    assert tasks_of("libero_10")[0].package == "libero"
    assert "random" in perturbed("libero_10")["libero_10_noise"]
    with pytest.raises(UserError, match="libero_10_noise cannot be played .* at random"):
        tasks_of("libero_10_noise")
    assert {name: prompt(found[0]) for name, found in tasks.items()} == {
        **dict.fromkeys(tasks, "a"),
        "libero_10_language": "other words",
    }
    camera = tasks["libero_10_camera"][0]
    assert camera.file.name == "a.bddl" and camera.name == f"libero_10_camera/{variants['camera']}"
    assert camera.settings == {
        "horizon_view": -15,
        "vertical_view": 5,
        "scale_factor": 1.1,
        "end_point_rot": 0,
        "end_point_vertical": 2,
        "init_state": 0,
    }
    robot = tasks["libero_10_robot"][0]
    assert robot.settings["robots"] == ["Panda12"] and robot.settings["scale_factor"] == 1.0
    counts = {name: libero_suites.count(found[0].states) for name, found in tasks.items()}
    assert counts == {**dict.fromkeys(tasks, 50), "libero_10_layout": 1}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("shape", [(50, 79), (3, 3), (1, 300), (79,)])
def test_initial_states_are_read_without_unpickling(tmp_path, monkeypatch, protocol, shape):
    states = np.random.default_rng(0).normal(size=shape)
    file = tmp_path / "a.pruned_init"
    torch.save(states, file, pickle_protocol=protocol)
    monkeypatch.setattr(pickle, "Unpickler", None)
    read = initial_states(file)
    assert read.dtype == np.float64 and np.array_equal(read, np.atleast_2d(states))


def test_files_that_are_no_array_of_float64_are_refused(tmp_path):
    class Harm:
        def __reduce__(self):
            return (tmp_path.joinpath("harm").write_text, ("done",))

    file = tmp_path / "a.pruned_init"
    columns = np.asfortranarray(np.random.default_rng(0).normal(size=(3, 4)))
    for value in (Harm(), np.zeros((2, 3), np.float32), columns, torch.zeros(2, 3), [], "text"):
        torch.save(value, file)
        with pytest.raises(
            UserError, match=f"cannot read the initial states {re.escape(str(file))}"
        ):
            initial_states(file)
    file.write_bytes(b"no zip")
    with pytest.raises(UserError, match="cannot read the initial states"):
        initial_states(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("other", "")
    with pytest.raises(UserError, match="cannot read the initial states"):
        initial_states(file)
    torch.save(np.zeros(0), file, pickle_protocol=4)
    assert len(initial_states(file)) == 0
    assert not (tmp_path / "harm").exists()
