"""What MuJoCo simulators share for drawing small frames fast. Import it before mujoco: it says
which GL is meant.

On a processor a frame costs what its triangles cost, hardly its pixels, and a model is mostly
textures and meshes: both are thinned to what a frame can show.
"""

import ctypes
import hashlib
import io
import os
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from xml.etree import ElementTree

os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault(
    "LP_NUM_THREADS", "0"
)  # software rasteriser: processes scale, its threads only fight
# Mesa keeps compiled shaders, which saves each process half a second; by itself it would put them
# into the user's home.
os.environ.setdefault(
    "MESA_SHADER_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"mesa_shader_cache_{os.getuid()}")
)
import mujoco
import numpy as np


def forget_missing_device() -> None:
    """A container may show fewer EGL devices than CUDA ones; MuJoCo then takes the first that works
    instead of failing.
    """
    wanted = os.environ.get("MUJOCO_EGL_DEVICE_ID")
    if wanted is not None and os.environ["MUJOCO_GL"] == "egl":
        from mujoco.egl import egl_ext

        if int(wanted) >= len(egl_ext.eglQueryDevicesEXT()):
            del os.environ["MUJOCO_EGL_DEVICE_ID"]


def give_back_memory() -> None:
    """Compiling a model takes three times its size for a moment, which the C library would keep for
    later.
    """
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def thin_meshes(model: mujoco.MjModel, cells: np.ndarray) -> None:
    """Merges the vertices of each large mesh that share a cell and drops the faces that thereby
    collapse.

    cells [nmesh]: metres, the side of a cell. For pictures only: the physics collides with hulls
    and primitives, made when the model was compiled.
    """
    for mesh in np.flatnonzero(model.mesh_facenum > 1000):
        vertices = slice(
            model.mesh_vertadr[mesh], model.mesh_vertadr[mesh] + model.mesh_vertnum[mesh]
        )
        faces = slice(model.mesh_faceadr[mesh], model.mesh_faceadr[mesh] + model.mesh_facenum[mesh])
        # A cell's three coordinates as one number: numbers sort an order of magnitude faster than
        # rows.
        x, y, z = np.round(model.mesh_vert[vertices].T / cells[mesh]).astype(np.int64) + 2**20
        _, first, cell = np.unique(
            (x << 42) + (y << 21) + z, return_index=True, return_inverse=True
        )
        corners = first[cell][
            model.mesh_face[faces]
        ]  # [faces, 3]: a cell's first vertex stands for all of it
        kept = whole_triangles(corners)
        fewer = slice(faces.start, faces.start + kept.sum())
        model.mesh_face[fewer] = corners[kept]
        for attribute in (model.mesh_facenormal, model.mesh_facetexcoord):
            attribute[fewer] = attribute[faces][kept]
        model.mesh_facenum[mesh] = kept.sum()


def whole_triangles(corners: np.ndarray) -> np.ndarray:
    """Which of [F, 3] have three different corners, each triangle once."""
    a, b, c = np.sort(corners, axis=1).astype(np.int64).T
    kept = np.zeros(len(corners), bool)
    kept[np.unique((a << 42) + (b << 21) + c, return_index=True)[1]] = True
    return kept & (a < b) & (b < c)


# ---------------------------------------------------------------- before a model is compiled


@lru_cache(maxsize=200)
def small_png(file: str, most: int) -> bytes | None:
    """A picture file with sides of at most `most` pixels, or None where it is that small
    already.
    """
    from PIL import Image

    with Image.open(file) as picture:
        factor = -(-max(picture.size) // most)
        if factor == 1:
            return None
        out = io.BytesIO()
        picture.convert("RGB").reduce(factor).save(
            out, "png", compress_level=1
        )  # means of squares, as GL's own mipmaps
        return out.getvalue()


def read_mesh(file: str) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Corners of a mesh's triangles: positions [F, 3, 3], normals [F, 3, 3] and texture coordinates
    [F, 3, 2] if it has them.
    """
    raw = Path(file).read_bytes()
    kind = file.rpartition(".")[2].lower()
    if kind == "msh":
        # MuJoCo's: four counts, then vertices, normals, texture coordinates, and triangles of their
        # common index
        counts = np.frombuffer(raw, np.int32, 4)
        widths = (3, 3, 2, 3)
        parts = []
        at = 16
        for count, width, dtype in zip(counts, widths, ("f4", "f4", "f4", "i4"), strict=True):
            parts.append(np.frombuffer(raw, dtype, count * width, at).reshape(count, width))
            at += 4 * count * width
        positions, normals, texels, faces = parts
        return positions[faces], *(x[faces] if len(x) else None for x in (normals, texels))
    if (
        kind == "stl"
    ):  # binary: 80 bytes, a count, and per triangle a normal, three corners and two bytes
        triangle = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("bytes", "<u2")])
        return (
            np.frombuffer(raw, triangle, np.frombuffer(raw, "<u4", 1, 80)[0], 84)["corners"],
            None,
            None,
        )
    lines: dict[str, list[str]] = {"v": [], "vn": [], "vt": [], "f": []}
    for line in raw.decode().splitlines():
        word, _, rest = line.partition(" ")
        if word in lines:
            lines[word].append(rest)
    positions, normals, texels = (
        np.array([x.split()[:n] for x in lines[k]], "f4")
        for k, n in (("v", 3), ("vn", 3), ("vt", 2))
    )
    corners = [[corner.split("/") for corner in face.split()] for face in lines["f"]]
    fans = [
        (face[0], face[i], face[i + 1]) for face in corners for i in range(1, len(face) - 1)
    ]  # polygons as triangles

    def look_up(column: int, values: np.ndarray) -> np.ndarray | None:
        if not len(values) or any(len(c) <= column or not c[column] for face in fans for c in face):
            return None
        return values[np.array([[int(c[column]) for c in face] for face in fans]) - 1]

    texture = look_up(1, texels)
    if texture is not None:
        texture = texture * np.array([1, -1], "f4") + np.array(
            [0, 1], "f4"
        )  # MuJoCo turns those of this format round
    return look_up(0, positions), look_up(2, normals), texture


@lru_cache(maxsize=200)
def small_mesh(file: str, cell: float) -> bytes | None:
    """A mesh file, as MuJoCo's .msh, whose vertices within a cell are one; None where it is small
    already, or too much would go.

    cell: side, in the units of the file. Normals and texture coordinates stay each corner's own.
    """
    positions, normals, texels = read_mesh(file)
    if len(positions) <= 1000:
        return None
    x, y, z = np.round(positions.reshape(-1, 3).T / cell).astype(np.int64) + 2**20
    _, first, cells = np.unique((x << 42) + (y << 21) + z, return_index=True, return_inverse=True)
    kept = whole_triangles(cells.reshape(-1, 3))
    if kept.sum() < 100:
        return None
    # a cell's first vertex stands for all of it
    faces = cells.reshape(-1, 3)[kept]
    vertices = positions.reshape(-1, 3)[first]
    if normals is not None or texels is not None:
        vertices = vertices[faces].reshape(-1, 3)
        faces = np.arange(3 * len(faces))
    more = [
        np.zeros((0, 3)) if normals is None else normals[kept],
        np.zeros((0, 2)) if texels is None else texels[kept],
    ]
    counts = [len(vertices), *(x.size // x.shape[-1] for x in more), faces.size // 3]
    parts = [
        np.array(counts, "i4"),
        vertices.astype("f4"),
        *(x.astype("f4") for x in more),
        faces.astype("i4"),
    ]
    return b"".join(part.tobytes() for part in parts)


def thin_assets(
    xml: str, most: int, cell_of: Callable[[str], float]
) -> tuple[str, dict[str, bytes]]:
    """A model's XML with its large textures and meshes replaced, and their files by name, for
    `MjModel.from_xml_string`.

    They are most of a model: of the time to compile it, and of memory, in the simulator as well as
    in GL. Only meshes of visual geoms are touched, and only in a model that takes no masses from
    these (`inertiagrouprange`). most: pixels of a texture's side; cell_of: a mesh's name → metres
    within which its vertices are one.
    """
    root = ElementTree.fromstring(xml)
    files = {}
    weightless = any(
        compiler.get("inertiagrouprange") == "0 0" for compiler in root.iter("compiler")
    )
    seen_only = {}
    for geom in root.iter("geom"):
        if mesh := geom.get("mesh"):
            visual = weightless and (
                geom.get("group"),
                geom.get("contype"),
                geom.get("conaffinity"),
            ) == ("1", "0", "0")
            seen_only[mesh] = visual and seen_only.get(mesh, True)

    def replace(
        element: ElementTree.Element, content: bytes | None, detail: float, suffix: str
    ) -> bool:
        if content is not None:  # one name, one content: MuJoCo has a cache
            name = hashlib.sha1(f"{element.get('file')} {detail}".encode()).hexdigest() + suffix
            files[name] = content
            element.set("file", name)
        return content is not None

    for texture in root.iter("texture"):
        if texture.get("file"):
            replace(texture, small_png(texture.get("file"), most), most, ".png")
    for mesh in root.iter("mesh"):
        if seen_only.get(mesh.get("name")) and mesh.get("file", "").lower().endswith(
            (".msh", ".stl", ".obj")
        ):
            scale = max(abs(float(x)) for x in mesh.get("scale", "1").split())
            cell = cell_of(mesh.get("name")) / scale
            if replace(mesh, small_mesh(mesh.get("file"), cell), cell, ".msh"):
                mesh.set("inertia", "shell")  # what is left need not enclose anything
    return ElementTree.tostring(root, encoding="unicode"), files
