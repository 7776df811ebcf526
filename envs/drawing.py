"""What MuJoCo simulators share for drawing small frames fast. Import it before mujoco: it says which GL is meant.

A frame costs as much as its triangles and its textures' first touch, hardly its pixels: both are thinned to what it can show.
"""

import ctypes
import hashlib
import io
import os
import re
from functools import cache

os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault("LP_NUM_THREADS", "0")  # software rasteriser: processes scale, its threads only fight
import mujoco
import numpy as np


def forget_missing_device() -> None:
    """A container may show fewer EGL devices than CUDA ones; MuJoCo then takes the first that works instead of failing."""
    wanted = os.environ.get("MUJOCO_EGL_DEVICE_ID")
    if wanted is not None and os.environ["MUJOCO_GL"] == "egl":
        from mujoco.egl import egl_ext

        if int(wanted) >= len(egl_ext.eglQueryDevicesEXT()):
            del os.environ["MUJOCO_EGL_DEVICE_ID"]


def give_back_memory() -> None:
    """Compiling a model takes three times its size for a moment, which the C library would keep for later."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def thin_meshes(model: mujoco.MjModel, cells: np.ndarray) -> None:
    """Merges the vertices of each large mesh that share a cell and drops the faces that thereby collapse.

    cells [nmesh]: metres, the side of a cell. For pictures only: the physics collides with hulls and primitives, made when the
    model was compiled.
    """
    for mesh in np.flatnonzero(model.mesh_facenum > 1000):
        vertices = slice(model.mesh_vertadr[mesh], model.mesh_vertadr[mesh] + model.mesh_vertnum[mesh])
        faces = slice(model.mesh_faceadr[mesh], model.mesh_faceadr[mesh] + model.mesh_facenum[mesh])
        # A cell's three coordinates as one number: numbers sort an order of magnitude faster than rows.
        x, y, z = np.round(model.mesh_vert[vertices].T / cells[mesh]).astype(np.int64) + 2**20
        _, first, cell = np.unique((x << 42) + (y << 21) + z, return_index=True, return_inverse=True)
        corners = first[cell][model.mesh_face[faces]]  # [faces, 3]: a cell's first vertex stands for all of it
        a, b, c = np.sort(corners, axis=1).astype(np.int64).T
        kept = np.zeros(len(corners), bool)
        kept[np.unique((a << 42) + (b << 21) + c, return_index=True)[1]] = True
        kept &= (a < b) & (b < c)
        fewer = slice(faces.start, faces.start + kept.sum())
        model.mesh_face[fewer] = corners[kept]
        for attribute in (model.mesh_facenormal, model.mesh_facetexcoord):
            attribute[fewer] = attribute[faces][kept]
        model.mesh_facenum[mesh] = kept.sum()


@cache
def small_png(file: str, most: int) -> bytes | None:
    """A picture file with sides of at most `most` pixels, or None where it is that small already."""
    from PIL import Image

    with Image.open(file) as picture:
        factor = -(-max(picture.size) // most)
        if factor == 1:
            return None
        out = io.BytesIO()
        picture.convert("RGB").reduce(factor).save(out, "png", compress_level=1)  # means of squares, as GL's own mipmaps
        return out.getvalue()


def thin_textures(xml: str, most: int) -> tuple[str, dict[str, bytes]]:
    """A model's XML with its large textures replaced, and their files by name, for `MjModel.from_xml_string`.

    most: pixels of a side. Textures are most of a model's memory: in the simulator, in GL, and again in its mipmaps.
    """
    files: dict[str, bytes] = {}

    def replace(element: re.Match) -> str:
        small = small_png(element[2], most)
        if small is None:
            return element[0]
        name = hashlib.sha1(f"{element[2]} {most}".encode()).hexdigest() + ".png"  # one name, one content: MuJoCo has a cache
        files[name] = small
        return f"{element[1]}{name}{element[3]}"

    return re.sub(r'(<texture\b[^>]*?\bfile=")([^"]+)("[^>]*>)', replace, xml), files
