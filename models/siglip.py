"""SigLIP, the image tower of π0, π0.5 and GR00T N1.5. OpenVLA-OFT's follows timm, with another end:
models/oft.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class VisionLayer(nn.Module):
    def __init__(self, width: int, mlp: int, heads: int):
        super().__init__()
        self.heads = heads
        self.layer_norm1 = nn.LayerNorm(width, eps=1e-6)
        self.layer_norm2 = nn.LayerNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, mlp)
        self.fc2 = nn.Linear(mlp, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = (
            self.qkv(self.layer_norm1(x)).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        )
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, width)
        x = x + self.out_proj(out)
        return x + self.fc2(F.gelu(self.fc1(self.layer_norm2(x)), approximate="tanh"))


class Siglip(nn.Module):
    """Patches, learned positions, pre-norm layers, one last norm. c: image_size, patch,
    vision_width, _depth, _heads, _mlp.
    """

    def __init__(self, c):
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, c.vision_width, c.patch, c.patch)
        patches = (c.image_size // c.patch) ** 2
        self.position_embedding = nn.init.normal_(
            nn.Parameter(torch.empty(patches, c.vision_width)), std=0.02
        )
        self.layers = nn.ModuleList(
            VisionLayer(c.vision_width, c.vision_mlp, c.vision_heads) for _ in range(c.vision_depth)
        )
        self.post_layernorm = nn.LayerNorm(c.vision_width, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [m, 3, H, W] in [-1, 1] → [m, (H/patch)², D]."""
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2) + self.position_embedding
        x = x.to(self.layers[0].qkv.weight.dtype)
        for layer in self.layers:
            x = layer(x)
        return self.post_layernorm(x)
