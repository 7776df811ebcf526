"""What several families share: pictures and prompts as fields, rotary embedding, the norm of Llama
and Qwen, small heads, and SigLIP, the image tower of π0, π0.5 and GR00T N1.5.

Left out: OpenVLA-OFT's towers, which follow timm and end in another way (`models/oft.py`).
"""

import math
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from checks import Count, Length, Size
from errors import UserError
from models import lora


def image_and_tokens(c) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The observation fields that all families have. c: a family's configuration."""
    shape = (c.views, c.image_size, c.image_size, 3)
    return {"image": (shape, torch.uint8), "tokens": ((c.tokens,), torch.int32)}


def require_images(image: Tensor, c, floats: bool = False) -> None:
    """Raises UserError unless `image` is [n, V, H, W, 3] uint8; any numbers, with `floats`."""
    shape, dtype = image_and_tokens(c)["image"]
    if tuple(image.shape[1:]) != shape or not (floats or image.dtype == dtype):
        raise UserError(
            f"images are {list(image.shape[1:])} {image.dtype} and the model needs {list(shape)} "
            f"{dtype}"
        )


def normal(*shape: int, std: float = 0.02) -> nn.Parameter:
    """A parameter that begins as normal noise."""
    return nn.init.normal_(nn.Parameter(torch.empty(shape)), std=std)


def wide(x: Tensor) -> Tensor:
    """Gives x at least fp32: what sums many terms is not done in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[n, S, heads·d] → [n, heads, S, d]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """[n, heads, S, d] → [n, S, heads·d]."""
    return x.transpose(1, 2).flatten(2)


def frequencies(d: int, device: torch.device, theta: float = 1e4) -> Tensor:
    """Angles per position of the rotary embedding of Gemma (θ = 10⁴) and Qwen3: [d/2] fp32."""
    half = d // 2
    return theta ** (-torch.arange(half, device=device, dtype=torch.float32) / half)


def rotary(positions: Tensor, frequency: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine [n, 1, S, d/2], computed in fp32. positions [n, S], frequency [d/2]."""
    angle = positions[:, None, :, None] * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [n, heads, S, d], its halves rotated."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attends: q [n, heads, S, d], k and v [n, kv, P, d], mask of `additive` → [n, heads, S, d].

    A key/value head serves heads/kv query heads, which fold into the query axis: there they read
    its keys once, and no kernel need know of groups.

    Every call has arguments that a fused kernel of CUDA takes, in inference and training; "math",
    which is left where none does, writes a number for every pair of positions. What a kernel does
    not take (torch 2.13, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp):

        flash       a mask, fp32, d > 256
        cuDNN       fp32, d > 128 (later versions take 256 on Hopper and Blackwell)
        efficient   fewer heads of keys than of queries, d that is no multiple of 8 (fp32: of 4)

    Who serves whom. Where cuDNN is preferred (Hopper and Blackwell with cuDNN 9.15.1), it stands
    before flash and efficient:

        call                                      d        mask                 bf16       fp32
        SigLIP, DINOv2                            72, 64   none                 flash      efficient
        GR00T's blocks after the language model   64, 48   none                 flash      efficient
        the same with `mask_padding`              64, 48   [n, 1, 1, P]         efficient  efficient
        Gemma: prefix, π0.5's expert              256      [n, 1, 1, P + S]     efficient  efficient
        Gemma: π0's expert                        256      [n, 1, 8·S, P + S]   efficient  efficient
        Qwen3 (but for "eager", which is math)    128      [n, 1, 2·P, P]       efficient  efficient
        Llama                                     128      [n, 1, 1, P]         efficient  efficient
    """
    folded = q.reshape(len(q), k.shape[1], -1, q.shape[-1])  # [n, kv, heads/kv·S, d]
    # CUDA's kernels put positions before heads in memory: no view of several kv heads unfolds that.
    return F.scaled_dot_product_attention(folded, k, v, attn_mask=mask).reshape(q.shape)


def additive(see: Tensor, dtype: torch.dtype, group: int = 1) -> Tensor:
    """Makes the mask of `attention`: see [n, S or 1, P] bool → [n, 1, group·S or 1, P], 0 to attend
    and −∞ not to. group: query heads per key/value head. dtype: the queries'.

    Rows lie 8 numbers apart, or a multiple of it, as the memory-efficient kernel wants them: else
    every call would copy the mask, and a boolean one it would convert first."""
    if see.shape[1] > 1:
        see = see.repeat(1, group, 1)
    length = see.shape[-1]
    hidden = F.pad(~see, (0, -length % 8))
    mask = torch.zeros(hidden.shape, dtype=dtype, device=see.device)
    return mask.masked_fill(hidden, -math.inf)[:, None, :, :length]


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Returns a model's blocks by name: the entries of its ModuleLists."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    return {f"{name}.{i}": block for name, entries in lists for i, block in enumerate(entries)}


def recompute_blocks(model: nn.Module) -> None:
    """Makes every block of the model keep nothing but its input for the backward pass, which runs
    the block's forward pass again (activation checkpointing)."""
    for block in blocks(model).values():
        once = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        block.forward = once


class RMSNorm(nn.Module):
    """x/rms(x)·w, the root mean square in fp32: Llama's and Qwen's, not Gemma's."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = wide(x)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x.dtype) * y.to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """torch's, which sums in fp32, in the type of what comes in."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, self.bias.to(x.dtype), self.eps)


def mlp(widths: tuple[int, ...], activation: type[nn.Module], bias: bool = True) -> nn.Sequential:
    """Linear layers with an activation between them. bias: whether the last one has one."""
    layers: list[nn.Module] = []
    for inner, outer in pairwise(widths[:-1]):
        layers.append(nn.Linear(inner, outer))
        layers.append(activation())
    return nn.Sequential(*layers, nn.Linear(*widths[-2:], bias=bias))


def silent(head: nn.Sequential) -> nn.Sequential:
    """Zeroes the last layer, so that a new head begins at 0."""
    nn.init.zeros_(head[-1].weight)
    nn.init.zeros_(head[-1].bias)
    return head


@dataclass(kw_only=True, frozen=True)
class SiglipConfig:
    """Pictures and their tower. In the comments So400m/14, which all released models have."""

    views: Count = 1  # cameras
    image_size: Length = 64  # pixels; 224
    patch: Size = 8  # pixels; 14
    vision_width: Size = 96  # 1152
    vision_depth: Count = 3  # 27
    vision_heads: Count = 4  # 16
    vision_mlp: Size = 384  # 4304


SO400M = {
    "image_size": 224,
    "patch": 14,
    "vision_width": 1152,
    "vision_depth": 27,
    "vision_heads": 16,
    "vision_mlp": 4304,
}


class VisionLayer(nn.Module):
    def __init__(self, width: int, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.layer_norm1 = LayerNorm(width, eps=1e-6)
        self.layer_norm2 = LayerNorm(width, eps=1e-6)
        self.qkv = lora.Linear(width, 3 * width, parts=3 * (width,))
        self.out_proj = lora.Linear(width, width)
        self.fc1 = lora.Linear(width, hidden)
        self.fc2 = lora.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.layer_norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [n, heads, S, d]
        x = x + self.out_proj(join_heads(attention(q, k, v)))
        return x + self.fc2(F.gelu(self.fc1(self.layer_norm2(x)), approximate="tanh"))


class Siglip(nn.Module):
    """Patches, learned positions, pre-norm layers, one last norm."""

    def __init__(self, c: SiglipConfig):
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, c.vision_width, c.patch, c.patch)
        patches = (c.image_size // c.patch) ** 2
        self.position_embedding = normal(patches, c.vision_width)
        self.layers = nn.ModuleList(
            VisionLayer(c.vision_width, c.vision_mlp, c.vision_heads) for _ in range(c.vision_depth)
        )
        self.post_layernorm = LayerNorm(c.vision_width, eps=1e-6)

    def forward(self, pixels: Tensor, compute: torch.dtype | None = None) -> Tensor:
        """pixels [m, 3, H, W] in [-1, 1] → [m, (H/patch)², D]. compute: the type in which that is
        done; None: the weights'."""
        weight, bias = (p.to(pixels.dtype) for p in self.patch_embedding.parameters())
        x = F.conv2d(pixels, weight, bias, self.patch_embedding.stride).flatten(2).transpose(1, 2)
        x = x + self.position_embedding.to(x.dtype)
        x = x.to(compute or self.layers[0].qkv.weight.dtype)
        for layer in self.layers:
            x = layer(x)
        return self.post_layernorm(x)


def scaled(image: Tensor, dtype: torch.dtype) -> Tensor:
    """image [n, V, H, W, 3] uint8 → [n·V, 3, H, W] in [-1, 1]; one of floats is so already."""
    pixels = image.flatten(0, 1).permute(0, 3, 1, 2).to(dtype)
    return pixels if image.is_floating_point() else pixels / 127.5 - 1.0
