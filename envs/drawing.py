"""What MuJoCo simulators share for drawing small frames fast.

On a processor a frame costs what its triangles cost, hardly its pixels, and a model is mostly
textures and meshes. So both are thinned to what a frame can show.
"""

import contextlib
import ctypes
import hashlib
import io
import os
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import mujoco
import numpy as np

LARGE = 1000  # triangles of a mesh that is worth thinning
UNMATCHED: list[str] = []  # what to say where this process cannot draw on its own GPU
FEWEST = 100  # triangles that must be left of it


class EglDevice(NamedTuple):
    """What EGL's driver says of one of its devices."""

    file: str  # "/dev/dri/card0", or ""
    cuda: int | None  # CUDA's number of it, in a process with this CUDA_VISIBLE_DEVICES


def egl_devices() -> list[EglDevice]:
    """Lists the devices as MUJOCO_EGL_DEVICE_ID counts them. (Extensions EGL_EXT_device_query,
    EGL_EXT_device_drm, EGL_NV_device_cuda; numbers are of Khronos' eglext.h.)"""
    from mujoco.egl import egl_ext

    def function(name: str, result, *arguments):
        return ctypes.CFUNCTYPE(result, *arguments)(egl_ext.eglGetProcAddress(name))

    device = egl_ext.EGLDeviceEXT
    number = ctypes.POINTER(ctypes.c_ssize_t)
    try:
        text = function("eglQueryDeviceStringEXT", ctypes.c_char_p, device, ctypes.c_int32)
        ask = function("eglQueryDeviceAttribEXT", ctypes.c_uint, device, ctypes.c_int32, number)
    except TypeError:  # an EGL without these functions
        return []
    found = []
    for each in egl_ext.eglQueryDevicesEXT():
        extensions = (text(each, 0x3055) or b"").split()  # EGL_EXTENSIONS
        file = text(each, 0x3233) if b"EGL_EXT_device_drm" in extensions else None
        cuda = ctypes.c_ssize_t(-1)
        known = b"EGL_NV_device_cuda" in extensions and ask(each, 0x323A, ctypes.byref(cuda))
        found.append(EglDevice((file or b"").decode(), cuda.value if known else None))
    return found


def matching(
    devices: list[EglDevice], cuda: int, address: str, root: Path = Path("/")
) -> int | None:
    """Returns the number of the EGL device that is a GPU, or None.

    EGL has an order of its own, and knows no CUDA_VISIBLE_DEVICES. So what counts is the address on
    the PCI bus, which the system tells of a device file; where there is none, CUDA's number, which
    NVIDIA's driver counts among the visible ones (RLinf, tests of its NvidiaGPUManager)."""
    for number, device in enumerate(devices):
        folder = root / "sys/class/drm" / Path(device.file).name / "device"
        if device.file and folder.resolve().name == address:
            return number
    of_cuda = [number for number, device in enumerate(devices) if device.cuda == cuda]
    return of_cuda[0] if len(of_cuda) == 1 else None


def choose_device() -> None:
    """Lets MuJoCo draw on this worker's GPU: turns MUJOCO_EGL_DEVICE_ID from CUDA's number into
    EGL's. Where no device of EGL is that GPU, MuJoCo takes the first one that works; `renderer`
    says so."""
    address = os.environ.pop("VLA3_DRAWS_ON", "")
    cuda = os.environ.get("MUJOCO_EGL_DEVICE_ID")
    if not address or cuda is None or os.environ["MUJOCO_GL"] != "egl":
        return
    devices = egl_devices()
    number = matching(devices, int(cuda), address)
    if number is None:
        del os.environ["MUJOCO_EGL_DEVICE_ID"]
        UNMATCHED.append(
            f", the first of EGL's {len(devices)} devices, of which none is cuda:{cuda}"
        )
    else:
        os.environ["MUJOCO_EGL_DEVICE_ID"] = str(number)


@contextlib.contextmanager
def hidden_device() -> Iterator[None]:
    """Hides MUJOCO_EGL_DEVICE_ID from an import: robosuite refuses a number that is not in
    CUDA_VISIBLE_DEVICES (utils/binding_utils.py), and EGL's need not be."""
    device = os.environ.pop("MUJOCO_EGL_DEVICE_ID", None)
    try:
        yield
    finally:
        if device is not None:
            os.environ["MUJOCO_EGL_DEVICE_ID"] = device


def renderer() -> str:
    """Names what draws in this thread, as GL does, or returns "" where nothing was drawn yet."""
    if os.environ["MUJOCO_GL"] != "egl":
        return os.environ["MUJOCO_GL"]
    from mujoco.egl import egl_ext

    if not (address := egl_ext.eglGetProcAddress("glGetString")):
        return ""
    name = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_uint)(address)(0x1F01)  # GL_RENDERER
    return (name or b"").decode(errors="replace") + "".join(UNMATCHED)


def merge(vertices: np.ndarray, cell: float) -> tuple[np.ndarray, np.ndarray]:
    """Finds which vertices [V, 3] share a cell of this side.

    Returns the first vertex of each cell, and the cell of each vertex. Three coordinates become one
    number, because numbers sort ten times as fast as rows."""
    x, y, z = np.round(vertices.T / cell).astype(np.int64) + 2**20
    _, first, cells = np.unique((x << 42) + (y << 21) + z, return_index=True, return_inverse=True)
    return first, cells


def whole_triangles(corners: np.ndarray) -> np.ndarray:
    """Tells which of [F, 3] have three different corners, each triangle once."""
    a, b, c = np.sort(corners, axis=1).astype(np.int64).T
    kept = np.zeros(len(corners), bool)
    kept[np.unique((a << 42) + (b << 21) + c, return_index=True)[1]] = True
    return kept & (a < b) & (b < c)


def thin_meshes(model: mujoco.MjModel, cell: float) -> None:
    """Merges the vertices of each large mesh that share a cell of this side in metres.

    For pictures only: the physics collides with hulls made when the model was compiled."""
    for mesh in np.flatnonzero(model.mesh_facenum > LARGE):
        start = model.mesh_vertadr[mesh]
        vertices = model.mesh_vert[start : start + model.mesh_vertnum[mesh]]
        start = model.mesh_faceadr[mesh]
        faces = slice(start, start + model.mesh_facenum[mesh])
        first, cells = merge(vertices, cell)
        corners = first[cells][model.mesh_face[faces]]  # [faces, 3]
        kept = whole_triangles(corners)
        fewer = slice(start, start + kept.sum())
        model.mesh_face[fewer] = corners[kept]
        for attribute in (model.mesh_facenormal, model.mesh_facetexcoord):
            attribute[fewer] = attribute[faces][kept]
        model.mesh_facenum[mesh] = kept.sum()


# Of a mesh's triangles, corner by corner: positions [F, 3, 3], and where it has them normals
# [F, 3, 3] and texture coordinates [F, 3, 2].
Corners = tuple[np.ndarray, np.ndarray | None, np.ndarray | None]


@lru_cache(maxsize=200)
def small_png(file: str, most: int) -> bytes | None:
    """Reduces a picture file to sides of at most `most` pixels; None where it is that small."""
    from PIL import Image

    with Image.open(file) as picture:
        factor = -(-max(picture.size) // most)
        if factor == 1:
            return None
        out = io.BytesIO()
        # Means of squares, as GL's own mipmaps.
        picture.convert("RGB").reduce(factor).save(out, "png", compress_level=1)
        return out.getvalue()


def read_msh(raw: bytes) -> Corners:
    """MuJoCo's own: four counts, vertices, normals, texture coordinates, and triangles of these."""
    counts = np.frombuffer(raw, np.int32, 4)
    parts = []
    at = 16
    for count, width, dtype in zip(counts, (3, 3, 2, 3), ("f4", "f4", "f4", "i4"), strict=True):
        parts.append(np.frombuffer(raw, dtype, count * width, at).reshape(count, width))
        at += 4 * count * width
    positions, normals, texels, faces = parts
    return positions[faces], *(x[faces] if len(x) else None for x in (normals, texels))


def read_stl(raw: bytes) -> Corners:
    """Binary: 80 bytes, a count, and per triangle a normal, three corners and two bytes."""
    triangle = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("bytes", "<u2")])
    count = np.frombuffer(raw, "<u4", 1, 80)[0]
    return np.frombuffer(raw, triangle, count, 84)["corners"], None, None


def read_obj(raw: bytes) -> Corners:
    """Lines of vertices, normals, texture coordinates, and polygons of an index into each."""
    lines: dict[str, list[str]] = {"v": [], "vn": [], "vt": [], "f": []}
    for line in raw.decode().splitlines():
        word, _, rest = line.partition(" ")
        if word in lines:
            lines[word].append(rest)

    # A polygon is as many triangles as it has corners beyond two; they share its first corner.
    sizes = [len(polygon.split()) for polygon in lines["f"]]
    fans = {size: np.arange(1, size - 1) for size in set(sizes)}
    second = np.concatenate([fans[size] for size in sizes])
    first = np.repeat(np.cumsum(sizes) - sizes, np.array(sizes) - 2)
    triangles = np.stack([first, first + second, first + second + 1], axis=1)

    # A corner is an index, or two or three with slashes between, the second of which may lack. What
    # only some corners have is left out.
    corners = " ".join(lines["f"]).split()
    slashes = min(corner.count("/") for corner in corners)
    if any(corner.count("/") > slashes for corner in corners):
        corners = ["/".join(corner.split("/")[: slashes + 1]) for corner in corners]
    text = " ".join(corners).replace("//", "/0/").replace("/", " ")
    indices = np.fromstring(text, int, sep=" ").reshape(len(corners), slashes + 1)

    def look_up(column: int, word: str, width: int) -> np.ndarray | None:
        if not lines[word] or column > slashes or not indices[:, column].all():
            return None
        values = np.fromstring(" ".join(lines[word]), sep=" ").reshape(len(lines[word]), -1)
        return values[:, :width].astype("f4")[indices[:, column] - 1][triangles]

    texture = look_up(1, "vt", 2)
    if texture is not None:  # MuJoCo turns those of this format round
        texture = texture * np.array([1, -1], "f4") + np.array([0, 1], "f4")
    return look_up(0, "v", 3), look_up(2, "vn", 3), texture


READERS = {".msh": read_msh, ".stl": read_stl, ".obj": read_obj}


@lru_cache(maxsize=200)
def small_mesh(file: str, cell: float) -> bytes | None:
    """Merges the vertices of a mesh file that share a cell. Returns MuJoCo's .msh.

    None where it is small already, or too much would go. cell: side, in the units of the file.
    Normals and texture coordinates stay each corner's own."""
    path = Path(file)
    positions, normals, texels = READERS[path.suffix.lower()](path.read_bytes())
    if len(positions) <= LARGE:
        return None
    positions = positions.reshape(-1, 3)
    first, cells = merge(positions, cell)
    cells = cells.reshape(-1, 3)
    kept = whole_triangles(cells)
    if kept.sum() < FEWEST:
        return None
    # A cell's first vertex stands for all of it.
    faces = cells[kept]
    vertices = positions[first]
    if normals is not None or texels is not None:
        vertices = vertices[faces].reshape(-1, 3)
        faces = np.arange(3 * len(faces))
    more = [
        np.zeros((0, width)) if values is None else values[kept]
        for values, width in ((normals, 3), (texels, 2))
    ]
    counts = [len(vertices), *(x.size // x.shape[-1] for x in more), faces.size // 3]
    parts = [np.array(counts, "i4"), *(x.astype("f4") for x in (vertices, *more))]
    return b"".join(part.tobytes() for part in (*parts, faces.astype("i4")))


def thin_assets(
    xml: str, most: int, cell_of: Callable[[str], float]
) -> tuple[str, dict[str, bytes]]:
    """Replaces the large textures and meshes of a model, which are most of its time and memory.

    Returns the XML and the new files by name, for `MjModel.from_xml_string`. Of meshes only those
    of visual geoms are touched. most: pixels of a texture's side; cell_of: a mesh's name → metres
    within which its vertices are one."""
    root = ElementTree.fromstring(xml)
    files = {}

    def replace(element: ElementTree.Element, content: bytes, detail: float, suffix: str) -> None:
        # One name, one content: MuJoCo has a cache.
        name = hashlib.sha1(f"{element.get('file')} {detail}".encode()).hexdigest() + suffix
        files[name] = content
        element.set("file", name)

    for texture in root.iter("texture"):
        file = texture.get("file")
        if file and (content := small_png(file, most)):
            replace(texture, content, most, ".png")
    seen_only = only_seen(root)
    for mesh in root.iter("mesh"):
        file = mesh.get("file", "")
        if mesh.get("name") in seen_only and Path(file).suffix.lower() in READERS:
            scale = max(abs(float(x)) for x in mesh.get("scale", "1").split())
            cell = cell_of(mesh.get("name")) / scale
            if content := small_mesh(file, cell):
                replace(mesh, content, cell, ".msh")
                mesh.set("inertia", "shell")  # what is left need not enclose anything
    return ElementTree.tostring(root, encoding="unicode"), files


def only_seen(root: ElementTree.Element) -> set[str]:
    """Names the meshes that only visual geoms have, in a model that takes no masses from these."""
    if not any(x.get("inertiagrouprange") == "0 0" for x in root.iter("compiler")):
        return set()
    seen = set()
    touched = set()
    for geom in root.iter("geom"):
        kind = (geom.get("group"), geom.get("contype"), geom.get("conaffinity"))
        meshes = seen if kind == ("1", "0", "0") else touched
        meshes.add(geom.get("mesh"))
    return seen - touched - {None}
