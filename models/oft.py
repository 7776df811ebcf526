"""OpenVLA-OFT with discrete actions: DINOv2 ⊕ SigLIP → projector → Llama that attends both ways →
256 bins → value.

    image [V, H, W, 3] ──► DINOv2 ⊕ SigLIP ──► projector ─────────┐
    tokens [L] = BOS, padding, prompt, "▁" ──► embeddings ────────┴► [BOS, pictures, prompt,
    C·A zeros (, stop)] ──► Llama, position of token i − 1 ──► softmax over the last 256 words
    ──► action token i, for all C·A tokens in one pass

This is the variant that reinforcement learning trains (RLinf `openvla_oft/rlinf`, SimpleVLA-RL,
checkpoints `Haozhan72/Openvla-oft-SFT-libero-*-traj1`): no proprioception, no FiLM, no continuous
head. Sources: moojink/openvla-oft `prismatic/extern/hf/modeling_prismatic.py`,
moojink/transformers-openvla-oft `modeling_llama.py` (attention without a causal mask), RLinf
`rlinf/models/embodiment/openvla_oft/rlinf/openvla_oft_action_model.py`, timm 0.9.10
`vision_transformer.py`.

As a stochastic policy: every action token is a categorical over 256 bins at a temperature; the
log-prob of a chunk is the sum over its C·A tokens, which are independent given the observation.

Differs from the textbook: features are the output of the second-to-last block without the last
norm, so the last block is neither built nor loaded; action tokens are read one position early, as
in next-word prediction, so the first comes from "▁". Left out: key/value caching (attention goes
both ways, so nothing is a prefix), activation checkpointing.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checks import AboveZero, Count, FromZero, Length, Natural, Size
from errors import require
from models import layers, lora
from models.flow import Shape
from models.formats import bins, pictures
from models.lora import LoraConfig
from models.noise import Key, generator


@dataclass(kw_only=True, frozen=True)
class OftConfig(LoraConfig):
    """The defaults are the embedded model; in the comments the published one."""

    views: Count = 1  # cameras; 1, or 2 with the wrist's
    image_size: Length = 64  # pixels; 224
    patch: Size = 8  # pixels; 14
    center_crop: bool = False  # the middle 0.9 of the area, resized back; True (evaluation)
    # ImageNet's, rounded to bf16 as in preprocessor_config.json
    dino_mean: tuple[FromZero, ...] = (0.484375, 0.455078125, 0.40625)
    dino_std: tuple[AboveZero, ...] = (0.228515625, 0.2236328125, 0.224609375)
    dino_width: Size = 64  # 1024
    dino_depth: Count = 2  # 23: the tower has 24 blocks and the output of the 23rd is read
    dino_heads: Count = 4  # 16
    dino_mlp: Size = 192  # 4096
    dino_registers: Size = 4  # 4, beside one class token
    siglip_width: Size = 64  # 1152
    siglip_depth: Count = 2  # 26 of 27
    siglip_heads: Count = 4  # 16
    siglip_mlp: Size = 192  # 4304
    width: Size = 128  # 4096
    depth: Count = 4  # 32
    heads: Count = 4  # 32
    kv_heads: Count = 4  # 32
    mlp: Size = 320  # 11008
    norm_eps: FromZero = 1e-6  # Hugging Face's default, which config.json leaves (Llama-2's: 1e-5)
    rope_theta: AboveZero = 10_000.0
    words: Size = 399  # ids before the action bins; 31744
    bins: Size = 256
    spare: Size = 1  # rows after the bins; 64, the first of them the padding token
    pad: Natural = 0  # id of the padding token; 32000
    stop: Size = 2  # id of </s>
    tokens: Length = 24  # prompt length; RLinf 128 on LIBERO-10
    action_dim: Length = 4  # A; 7
    chunk: Length = 10  # C; 8
    stop_token: bool = True  # </s> after the placeholders (moojink, SimpleVLA-RL); RLinf drops it
    temperature: AboveZero = 1.0  # 1.6 in RLinf's LIBERO recipes
    value_widths: tuple[Size, ...] = (128, 64)  # (512, 128)
    train: Literal["lora", "full"] = "lora"  # what learns, beside the value head
    lora_rank: Size = 32  # of adapters, where `train` is "lora"

    @property
    def rank(self) -> int:
        return self.lora_rank if self.train == "lora" else 0

    def with_lora(self, rank: int, alpha: float | None, targets: tuple[str, ...]) -> "OftConfig":
        changed = super().with_lora(rank or self.lora_rank, alpha, targets)
        return replace(changed, train="lora" if rank else "full")

    @property
    def vocabulary(self) -> int:
        return self.words + self.bins + self.spare

    @property
    def pictures(self) -> int:
        """Tokens of all views."""
        return self.views * (self.image_size // self.patch) ** 2

    @property
    def actions(self) -> int:
        """Action tokens of a chunk."""
        return self.chunk * self.action_dim

    @property
    def played(self) -> tuple[int, int]:
        """(C, A) that the robot executes."""
        return self.chunk, self.action_dim


FULL = {
    "oft": OftConfig(
        image_size=224,
        patch=14,
        center_crop=True,
        dino_width=1024,
        dino_depth=23,
        dino_heads=16,
        dino_mlp=4096,
        siglip_width=1152,
        siglip_depth=26,
        siglip_heads=16,
        siglip_mlp=4304,
        width=4096,
        depth=32,
        heads=32,
        kv_heads=32,
        mlp=11008,
        words=31744,
        spare=64,
        pad=32000,
        tokens=128,
        action_dim=7,
        chunk=8,
        temperature=1.6,
        value_widths=(512, 128),
    )
}


class VisionBlock(nn.Module):
    """timm's `Block`: pre-norm, exact GELU; `scale` is LayerScale, which only DINOv2 has."""

    def __init__(self, width: int, mlp: int, heads: int, scale: bool):
        super().__init__()
        self.heads = heads
        self.norm1 = layers.LayerNorm(width, eps=1e-6)
        self.norm2 = layers.LayerNorm(width, eps=1e-6)
        self.qkv = lora.Linear(width, 3 * width)
        self.proj = lora.Linear(width, width)
        self.fc1 = lora.Linear(width, mlp)
        self.fc2 = lora.Linear(mlp, width)
        # Published training starts scales at 1e-5; at 1 a small tower learns from scratch.
        self.scale1 = nn.Parameter(torch.ones(width)) if scale else None
        self.scale2 = nn.Parameter(torch.ones(width)) if scale else None

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [n, heads, S, d]
        h = self.proj(layers.join_heads(layers.attention(q, k, v)))
        x = x + (h if self.scale1 is None else h * self.scale1.to(h.dtype))
        h = self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x + (h if self.scale2 is None else h * self.scale2.to(h.dtype))


class VisionTower(nn.Module):
    """A ViT without its last block and norm. DINOv2 has class and register tokens in front,
    without positions; SigLIP has none (`registers` None)."""

    def __init__(self, c: OftConfig, width, depth, heads, mlp, registers: int | None = None):
        super().__init__()
        dino = registers is not None
        self.patch_embed = lora.PatchEmbedding(3, width, c.patch, c.patch)
        self.pos_embed = layers.normal(1, (c.image_size // c.patch) ** 2, width)
        self.cls_token = layers.normal(1, 1, width) if dino else None
        self.reg_token = layers.normal(1, registers, width) if dino else None
        self.extra = 1 + registers if dino else 0
        self.blocks = nn.ModuleList(VisionBlock(width, mlp, heads, dino) for _ in range(depth))

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [n, 3, H, W], normalised → [n, P, D]."""
        x = self.patch_embed(pixels)
        x = x + self.pos_embed.to(x.dtype)
        if self.extra:
            front = torch.cat([self.cls_token, self.reg_token], dim=1).to(x.dtype)
            x = torch.cat([front.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return x[:, self.extra :]


class Projector(nn.Module):
    def __init__(self, vision_width: int, width: int):
        super().__init__()
        self.fc1 = lora.Linear(vision_width, 4 * vision_width)
        self.fc2 = lora.Linear(4 * vision_width, width)
        self.fc3 = lora.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(x)))))


class LlamaLayer(nn.Module):
    def __init__(self, c: OftConfig):
        super().__init__()
        self.heads = c.heads
        self.kv_heads = c.kv_heads
        kv_width = c.width // c.heads * c.kv_heads
        self.input_layernorm = layers.RMSNorm(c.width, c.norm_eps)
        self.post_attention_layernorm = layers.RMSNorm(c.width, c.norm_eps)
        self.q_proj = lora.Linear(c.width, c.width, False)
        self.o_proj = lora.Linear(c.width, c.width, False)
        self.k_proj = lora.Linear(c.width, kv_width, False)
        self.v_proj = lora.Linear(c.width, kv_width, False)
        self.gate_proj = lora.Linear(c.width, c.mlp, False)
        self.up_proj = lora.Linear(c.width, c.mlp, False)
        self.down_proj = lora.Linear(c.mlp, c.width, False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """x [n, S, D], mask [n, 1, 1, S]: all look at everything that is not padding."""
        h = self.input_layernorm(x)
        q = layers.rotate(layers.split_heads(self.q_proj(h), self.heads), cos, sin)
        k = layers.rotate(layers.split_heads(self.k_proj(h), self.kv_heads), cos, sin)
        v = layers.split_heads(self.v_proj(h), self.kv_heads)
        x = x + self.o_proj(layers.join_heads(layers.attention(q, k, v, mask)))
        h = self.post_attention_layernorm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class Oft(nn.Module):
    HEADS = ("value_head",)
    WIDE = ("lm_head.",)  # what computes in fp32 beside the value head, whatever the others do
    compute: torch.dtype | None = None  # what those compute in; None: the type of their weights
    ADAPTED = ("*",)  # every linear layer and patch embedding, as RLinf (rlinf/models/__init__.py)

    def __init__(self, config: OftConfig):
        super().__init__()
        c = self.config = config
        self.dino = VisionTower(
            c, c.dino_width, c.dino_depth, c.dino_heads, c.dino_mlp, c.dino_registers
        )
        self.siglip = VisionTower(c, c.siglip_width, c.siglip_depth, c.siglip_heads, c.siglip_mlp)
        self.projector = Projector(c.dino_width + c.siglip_width, c.width)
        self.embed_tokens = nn.Embedding(c.vocabulary, c.width)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        self.language = nn.ModuleList(LlamaLayer(c) for _ in range(c.depth))
        self.language_norm = layers.RMSNorm(c.width, c.norm_eps)
        self.lm_head = lora.Linear(c.width, c.vocabulary, False)
        self.value_head = self.heads(c)["value_head"]
        for name, table in self.tables({}).items():
            self.register_buffer(name, table, persistent=False)
        lora.adapt(self, self.ADAPTED)

    def tables(self, stats: dict) -> dict[str, Tensor]:
        """Numbers that lie on the device, so that no inference has to bring them there: the actions
        of all bins [A, bins], ImageNet's mean and deviation [2, 3, 1, 1], and where the pixels of
        the cropped picture lie [H]."""
        c = self.config
        scale = np.array([c.dino_mean, c.dino_std], np.float32)[..., None, None]
        return {
            "action_table": torch.from_numpy(bins.action_table(stats, c.action_dim, c.bins)),
            "dino_scale": torch.from_numpy(scale),
            "crop": pictures.crop_positions(c.image_size),
        }

    @staticmethod
    def heads(c: OftConfig) -> dict[str, nn.Module]:
        """RLinf's `ValueHead`: GELU between, no bias at the end."""
        head = layers.mlp((c.width, *c.value_widths, 1), nn.GELU, bias=False)
        nn.init.normal_(head[-1].weight, std=0.02)
        return {"value_head": head}

    def asked(self, stored: OftConfig, actor) -> OftConfig:
        """The configuration with what a run trains: by --oft-train and --lora-rank, or else as the
        checkpoint does. Raises UserError where the flags contradict one another."""
        rank = actor.lora_rank
        train = actor.oft_train or (stored.train if rank is None else "lora" if rank else "full")
        both = f"--oft-train {train} and --lora-rank {rank} contradict one another: leave out one"
        require(rank is None or (train == "lora") == bool(rank), both)
        return lora.asked(replace(stored, train=train), actor, self.ADAPTED)

    def begin(self, config, stats: dict) -> None:
        """Makes the adapters. Actions leave the model in the units of `stats`. What is trained is
        in fp32, and so is what a file has in half precision."""
        trained = self.config.train == "full"
        critic = self.critic()
        for name, p in self.named_parameters():
            if trained or name in critic or "lora_" in name or p.dtype == torch.float16:
                p.data = p.data.to(torch.float32)
        lora.adapt(self, self.ADAPTED)
        for name, table in self.tables(stats).items():
            setattr(self, name, table.to(self.lm_head.weight.device))

    def dtype_of(self, name: str) -> None:
        """As the file has it; `begin` decides what is widened."""

    def acts_in(self, name: str) -> torch.dtype | None:
        return None if name.startswith((*self.HEADS, *self.WIDE)) else self.compute

    def pixels(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """image [n, V, H, W, 3] uint8 → as DINOv2 and as SigLIP want it, [n·V, 3, H, W] each."""
        c = self.config
        f = self.compute or self.lm_head.weight.dtype
        layers.require_images(image, c)
        image = image.flatten(0, 1)
        if c.center_crop:
            image = pictures.center_crop(image, self.crop)
        x = image.permute(0, 3, 1, 2).float() / 255.0
        mean, std = self.dino_scale
        return ((x - mean) / std).to(f), ((x - 0.5) / 0.5).to(f)

    def features(self, image: Tensor) -> Tensor:
        """image [n, V, H, W, 3] uint8 → both towers' features side by side [n, V·P, D₁ + D₂]."""
        first, second = self.pixels(image)
        both = torch.cat([self.dino(first), self.siglip(second)], dim=-1)
        return both.unflatten(0, image.shape[:2]).flatten(1, 2)

    def hidden(self, image: Tensor, tokens: Tensor, count: int | None = None) -> Tensor:
        """Last hidden states that predict the first `count` (default C·A) tokens after the prompt.

        image [n, V, H, W, 3] uint8; tokens [n, L] = BOS, padding, prompt, "▁" → [n, count, D]."""
        c = self.config
        n = len(tokens)
        pictures = self.projector(self.features(image))
        words = self.embed_tokens(tokens).to(pictures.dtype)
        blanks = words.new_zeros(n, c.actions, c.width)  # action tokens differ by position alone
        end = self.embed_tokens(tokens.new_full((n, int(c.stop_token)), c.stop)).to(words.dtype)
        x = torch.cat([words[:, :1], pictures, words[:, 1:], blanks, end], dim=1)
        words_real = tokens != c.pad
        rest = F.pad(words_real[:, 1:], (c.pictures, c.actions + end.shape[1]), value=True)
        real = torch.cat([words_real[:, :1], rest], dim=1)
        d = c.width // c.heads
        frequency = 1.0 / c.rope_theta ** (torch.arange(0, d, 2, device=x.device).float() / d)
        cos, sin = layers.rotary(real.cumsum(1) - 1, frequency, x.dtype)
        mask = layers.additive(real[:, None], x.dtype)
        for layer in self.language:
            x = layer(x, cos, sin, mask)
        start = c.pictures + tokens.shape[1] - 1  # the position of "▁"
        return self.language_norm(x[:, start : start + (c.actions if count is None else count)])

    def action_logits(self, hidden: Tensor) -> Tensor:
        """hidden [n, C·A, D] → [n, C·A, bins] fp32: all other words have probability 0."""
        first = self.config.words
        return self.lm_head(layers.wide(hidden), slice(first, first + self.config.bins))

    def value(self, hidden: Tensor) -> Tensor:
        """hidden [n, C·A, D] → value [n], from where the first action token is predicted."""
        return self.value_head(hidden[:, 0].to(self.value_head[0].weight.dtype))[:, 0]

    def observation_fields(self) -> dict[str, Shape]:
        return layers.image_and_tokens(self.config)

    def slot_fields(self) -> dict[str, Shape]:
        return {"action_tokens": (self.config.played, torch.int32)}

    def training_fields(self) -> tuple[str, ...]:
        return ("image", "tokens", "action_tokens")

    def draw(self, keys: list[Key], explore: list[bool]) -> dict[str, Tensor]:
        """A uniform number per action token [n, C·A], and whether to sample [n] or be greedy."""
        uniform = np.stack([generator(key).random(self.config.actions, np.float32) for key in keys])
        return {"uniform": torch.from_numpy(uniform), "explore": torch.tensor(explore)}

    @torch.inference_mode()
    def act(self, obs: dict[str, Tensor], noise: dict[str, Tensor]) -> dict[str, Tensor]:
        """obs: image [n, V, H, W, 3] uint8, tokens [n, L]; noise from `draw` → actions, logprob,
        value, slot fields."""
        c = self.config
        hidden = self.hidden(obs["image"], obs["tokens"])
        logits = self.action_logits(hidden)
        logprob = (logits / c.temperature).log_softmax(-1)
        # Sample by inverting the cumulative distribution: one number per token, whoever shares the
        # batch.
        below = logprob.double().exp().cumsum(-1)
        passed = below <= noise["uniform"][..., None] * below[..., -1:]
        sample = passed.sum(-1).clamp(max=c.bins - 1)
        index = torch.where(noise["explore"][:, None], sample, logits.argmax(-1))  # [n, C·A]
        chosen = logprob.gather(-1, index[..., None])
        index = index.view(-1, *c.played)
        return {
            "logprob": chosen.view(index.shape),
            "value": self.value(hidden),
            "action_tokens": (index + c.words).to(torch.int32),
            "actions": self.action_table[torch.arange(c.action_dim, device=index.device), index],
        }

    def evaluate(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Log-prob and value of stored chunk steps under today's weights, differentiable.

        batch: image, tokens, action_tokens [n, …]. Returns logprob [n, C, A], one per token, value
        [n] and entropy [], the mean per token in nats."""
        c = self.config
        hidden = self.hidden(batch["image"], batch["tokens"])
        logprob = (self.action_logits(hidden) / c.temperature).log_softmax(-1)
        index = (batch["action_tokens"].long() - c.words).flatten(1)
        chosen = logprob.gather(-1, index[..., None]).view(-1, *c.played)
        entropy = -(logprob.exp() * logprob).sum(-1).mean()
        return {"logprob": chosen, "value": self.value(hidden), "entropy": entropy}

    def imitation_draw(self, n: int) -> dict[str, Tensor]:
        return {}

    def imitate(self, obs: dict[str, Tensor], actions: Tensor, draw: dict[str, Tensor]) -> Tensor:
        """The originals' fine-tuning loss []: mean cross-entropy over the whole vocabulary at the
        C·A action tokens and </s>. actions [n, C, A] in [-1, 1]; nothing is drawn."""
        c = self.config
        targets = bins.encode_actions(actions, c.words, c.bins).flatten(1)
        if c.stop_token:
            targets = F.pad(targets, (0, 1), value=c.stop)
        hidden = self.hidden(obs["image"], obs["tokens"], targets.shape[1])
        return F.cross_entropy(self.lm_head(layers.wide(hidden)).flatten(0, 1), targets.flatten())

    def trainable(self) -> dict[str, nn.Parameter]:
        """Everything, or adapters and value head."""
        return lora.trained(self) if self.config.rank else dict(self.named_parameters())

    def critic(self) -> dict[str, nn.Parameter]:
        return dict(self.value_head.named_parameters(prefix="value_head"))

    def idle(self) -> tuple[str, ...]:
        """None: attention goes both ways, so there is no prefix to keep."""
        return ()


# the family: `contract.py`
CONFIG = OftConfig
NETWORK = Oft
FORMATS = "models.formats.oft"
