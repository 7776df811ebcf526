"""Each env worker draws on its own GPU, and says by what; meshes are read as they are written."""

import os
from types import SimpleNamespace

import numpy as np
import pytest

from envs import drawing, libero, metaworld, robocasa
from envs.drawing import EglDevice, matching
from shard import Shard


def written(root, cards: dict[str, str]):
    """Makes a /sys that has these files of devices on the PCI bus."""
    for card, address in cards.items():
        folder = root / "sys/devices/pci0000:00" / address
        folder.mkdir(parents=True)
        (root / "sys/class/drm" / card).mkdir(parents=True)
        (root / "sys/class/drm" / card / "device").symlink_to(folder)
    return root


FIRST, SECOND = "0000:1a:00.0", "0000:81:00.0"
CARDS = {"card0": "0000:02:00.0", "card1": SECOND, "card2": FIRST}  # one is the screen's
NVIDIA = [EglDevice("/dev/dri/card1", 1), EglDevice("/dev/dri/card2", 0), EglDevice("", None)]


def test_a_gpu_is_found_by_its_address_in_whatever_order_egl_has(tmp_path):
    root = written(tmp_path, CARDS)
    assert [matching(NVIDIA, i, each, root) for i, each in enumerate((FIRST, SECOND))] == [1, 0]
    # With CUDA_VISIBLE_DEVICES=1 the second GPU is cuda:0, whatever a driver counts.
    assert matching(NVIDIA, 0, SECOND, root) == 0


def test_without_files_of_devices_the_driver_s_number_counts(tmp_path):
    bare = [device._replace(file="") for device in NVIDIA]
    assert [matching(bare, i, FIRST, tmp_path) for i in range(3)] == [1, 0, None]
    assert matching(NVIDIA, 1, SECOND, tmp_path) == 0  # no /sys
    software = [EglDevice("", None)]
    assert matching(software, 0, FIRST, tmp_path) is None
    # A driver that gives one number to all says nothing.
    assert matching([EglDevice("", 0), EglDevice("", 0)], 0, FIRST, tmp_path) is None


def test_mujoco_is_told_egl_s_number(monkeypatch):
    monkeypatch.setattr(drawing, "egl_devices", lambda: [d._replace(file="") for d in NVIDIA])
    monkeypatch.setattr(drawing, "UNMATCHED", [])
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setenv("VLA3_DRAWS_ON", FIRST)
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "0")
    drawing.choose_device()
    assert os.environ["MUJOCO_EGL_DEVICE_ID"] == "1"
    drawing.choose_device()  # of another env in the same process
    assert os.environ["MUJOCO_EGL_DEVICE_ID"] == "1" and not drawing.UNMATCHED

    monkeypatch.setenv("VLA3_DRAWS_ON", FIRST)
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "5")
    drawing.choose_device()
    assert "MUJOCO_EGL_DEVICE_ID" not in os.environ
    assert drawing.UNMATCHED == [", the first of EGL's 3 devices, of which none is cuda:5"]


@pytest.mark.parametrize("simulator", [libero, metaworld, robocasa])
def test_whoever_draws_by_mujoco_chooses_its_device(simulator, monkeypatch):
    chosen = []
    monkeypatch.setattr(drawing, "choose_device", lambda: chosen.append(simulator))
    env = simulator.Env((), 64)
    assert chosen
    monkeypatch.setattr(drawing, "renderer", lambda: "a GPU")
    assert env.renderer() == "a GPU"  # which a warning of software rendering is due to


def test_robosuite_does_not_see_egl_s_number_when_it_is_imported(monkeypatch):
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "3")
    with drawing.hidden_device():
        assert "MUJOCO_EGL_DEVICE_ID" not in os.environ
    assert os.environ["MUJOCO_EGL_DEVICE_ID"] == "3"


def test_this_machine_s_devices_are_listed():
    devices = drawing.egl_devices()
    assert devices and all(isinstance(device, EglDevice) for device in devices)


@pytest.mark.parametrize(
    "device, name, said",
    [
        ("cpu", "llvmpipe (LLVM 15.0.6)", "env-0 draws with llvmpipe (LLVM 15.0.6)\n"),
        ("cuda:0", "NVIDIA H100/PCIe/SSE2", "env-0 draws with NVIDIA H100/PCIe/SSE2\n"),
        ("cuda:0", "llvmpipe", "warning: env-0 draws with llvmpipe, in software beside GPUs"),
        ("cuda:0", "", ""),
    ],
)
def test_what_draws_is_named_and_software_beside_gpus_is_a_warning(capsys, device, name, said):
    shard = SimpleNamespace(device=device, meter=SimpleNamespace(name="env-0"))
    lane = SimpleNamespace(player=SimpleNamespace(renderer=lambda: name))
    Shard.name_renderer(shard, lane)
    out = capsys.readouterr().out
    assert out.startswith(said) and bool(out) == bool(said)
    assert ("NVIDIA_DRIVER_CAPABILITIES" in out) == ("warning" in said)


SQUARE = "v 0 0 0 1\nv 1 0 0 1\nv 1 1 0 1\nv 0 1 .5 1\nvn 0 0 1\nvn 0 1 0\nvt .5 .25 0\nvt 1 0 0\n"


@pytest.mark.parametrize("file", ["1/1/1 2/2/1 3/1/2 4/2/2", "1//1 2//1 3//2 4//2", "1 2 3 4"])
def test_polygons_become_triangles_that_share_their_first_corner(file):
    raw = f"# square\n{SQUARE}f {file}\nf {' '.join(file.split()[1:])}\n".encode()
    positions, normals, texels = drawing.read_obj(raw)
    corners = np.float32([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0.5]])
    np.testing.assert_array_equal(positions, corners[[[0, 1, 2], [0, 2, 3], [1, 2, 3]]])
    assert (normals is None) == ("/" not in file) and (texels is None) == ("/1/" not in file)
    if normals is not None:
        up = np.float32([[0, 0, 1], [0, 1, 0]])
        np.testing.assert_array_equal(normals, up[[[0, 0, 1], [0, 1, 1], [0, 1, 1]]])
    if texels is not None:
        places = np.float32([[0.5, 0.75], [1.0, 1.0]])
        np.testing.assert_array_equal(texels, places[[[0, 1, 0], [0, 0, 1], [1, 0, 1]]])


def test_what_only_some_corners_have_is_left_out():
    raw = f"{SQUARE}f 1/1/1 2/2/1 3/1/2\nf 1//1 3//1 4//2\nf 1 2 3\n".encode()
    assert drawing.read_obj(raw)[1:] == (None, None)
    raw = f"{SQUARE}f 1/1/1 2/2/1 3/1/2\nf 1//1 3//1 4//2\n".encode()
    _, normals, texels = drawing.read_obj(raw)
    assert texels is None and normals.shape == (2, 3, 3)
