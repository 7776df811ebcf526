"""Pictures as other projects' models were shown them. Sizes are pixels, values 0 to 255.

    π0, π0.5    resize_pil (openpi, RLinf), resize_torch (LeRobot, openpi's PyTorch)
    GR00T       crop_and_resize (NVIDIA, RLinf), resize_eagle (LeRobot)
    OFT         center_crop (openvla-oft), resize_bicubic (RLinf)

Sources: openpi src/openpi/shared/image_tools.py and openpi_client/image_tools.py;
NVIDIA/Isaac-GR00T gr00t/data; moojink/openvla-oft experiments/robot/openvla_utils.py. All are
exact.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def fitted(height: int, width: int, size: int) -> tuple[int, int, int, int]:
    """Height and width of a picture scaled to touch the sides of a square of `size`, and what is
    left above it and on its left."""
    ratio = max(width / size, height / size)
    height, width = (int(side / ratio) for side in (height, width))
    return height, width, (size - height) // 2, (size - width) // 2


def resize_pil(image: np.ndarray, size: int) -> np.ndarray:
    """image [H, W, 3] uint8 → [size, size, 3] uint8, centred on black: openpi's."""
    height, width, top, left = fitted(*image.shape[:2], size)
    small = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    out = np.zeros((size, size, 3), np.uint8)
    out[top : top + height, left : left + width] = small
    return out


def resize_torch(image: Tensor, size: int, black: float) -> Tensor:
    """image [n, H, W, 3] fp32 in [black, 1] → [n, size, size, 3], openpi's resize_with_pad_torch
    (black −1) and LeRobot's (0)."""
    height, width, top, left = fitted(*image.shape[1:3], size)
    x = image.permute(0, 3, 1, 2)
    small = F.interpolate(x, (height, width), mode="bilinear", align_corners=False)
    sides = (left, size - width - left, top, size - height - top)
    return F.pad(small.clamp_(black, 1.0), sides, value=black).permute(0, 2, 3, 1)


def crop_and_resize(image: np.ndarray, size: int, scale: float = 0.95) -> np.ndarray:
    """NVIDIA's evaluation transform: centre crop of `scale`, bilinear with antialiasing, truncated
    to 8 bits.

    image [V, H, W, 3] uint8 → [V, size, size, 3] uint8."""
    height, width = image.shape[1:3]
    high = int(height * scale)
    wide = int(width * scale)
    top = round((height - high) / 2.0)
    left = round((width - wide) / 2.0)
    x = planes(torch.tensor(image[:, top : top + high, left : left + wide])).div_(255.0)
    if x.shape[2:] != (size, size):
        x = F.interpolate(x, (size, size), mode="bilinear", align_corners=False, antialias=True)
    return (x * 255.0).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def resize_eagle(image: np.ndarray, size: int) -> np.ndarray:
    """Eagle's image processor, one tile: [V, H, W, 3] uint8 → [V, size, size, 3] uint8."""
    if image.shape[1:3] == (size, size):
        return image
    x = torch.tensor(image).permute(0, 3, 1, 2)  # in 8 bits: torch rounds both directions
    return bicubic(x, size).permute(0, 2, 3, 1).numpy()


def crop_positions(size: int, area: float = 0.9) -> Tensor:
    """Where the pixels of a row or column of the middle `area` lie in a picture: [size] fp32. As
    tf.image.crop_and_resize: corners of the box are pixel centres."""
    side = np.sqrt(np.float32(area))
    low = (np.float32(1.0) - side) / np.float32(2.0)
    step = (low + side - low) * np.float32(size - 1) / np.float32(size - 1)
    at = low * np.float32(size - 1) + np.arange(size, dtype=np.float32) * step
    return torch.from_numpy(at)


def center_crop(image: Tensor, at: Tensor) -> Tensor:
    """The middle of pictures, resized back: [n, H, H, 3] uint8 → the same. at: `crop_positions`,
    on the pictures' device. As tf.image.crop_and_resize: in fp32 in TensorFlow's order, horizontal
    before vertical, × 255.5 rounded down."""
    first = at.floor().long()
    last = at.ceil().long()
    part = at - at.floor()
    # Each column, and then each row, lies between two of the picture's.
    x, right = (image.index_select(2, i).float() * np.float32(1.0 / 255.0) for i in (first, last))
    x = x + (right - x) * part[:, None]
    top, bottom = (x.index_select(1, i) for i in (first, last))
    out = top + (bottom - top) * part[:, None, None]
    return (out.clamp(0.0, 1.0) * 255.5).to(torch.uint8)


def resize_bicubic(image: Tensor, size: int) -> Tensor:
    """[n, H, W, 3] uint8 → [n, size, size, 3] uint8 as torchvision's antialiased bicubic."""
    x = bicubic(planes(image), size).clamp_(0.0, 255.0).round_()
    return x.to(torch.uint8).permute(0, 2, 3, 1)


def bicubic(x: Tensor, size: int) -> Tensor:
    """[n, 3, H, W] → [n, 3, size, size], antialiased, in the type it comes in."""
    return F.interpolate(x, (size, size), mode="bicubic", align_corners=False, antialias=True)


def planes(image: Tensor) -> Tensor:
    """[n, H, W, 3] uint8 → [n, 3, H, W] fp32, a plane for each colour: torch resizes these in two
    thirds of the time that it takes for colours side by side."""
    return image.permute(0, 3, 1, 2).contiguous().float()
