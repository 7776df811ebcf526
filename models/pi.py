"""π0 and π0.5: SigLIP image tower → Gemma prefix over image and language tokens → flow-matching
action expert → value.

    image [V, H, W, 3], tokens [L] ──► prefix(): keys and values of every layer, and the mean
    feature noise x₁ [C, A] ──► velocity(prefix, x_t, t) × N denoise steps ──► actions [C, A]

The field `pi05` of the configuration tells the two apart:

    π0      A state token stands before the action tokens, which it does not see. An MLP fuses time
            with each action. The value head reads the expert's mean action feature.
    π0.5    The state, if any, stands in the prompt. Time modulates every norm of the expert
            (adaRMS). The value head reads the prefix's mean feature.

The prefix never sees the actions, so it runs once per frame. With the VLM frozen, as published,
the slot keeps its keys and values, and an update epoch costs only the expert.

As a stochastic policy: `models/flow.py`. The transition is Flow-SDE's (`noise = "sde"`), or its
deviation is learned, bounded and one per element (`noise = "network"`, Flow-Noise).

`SMALL` are the embedded models, `FULL` the released ones (openpi), with which this code is exact.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checks import AboveZero, Count, Length, Natural, Size
from models import layers, lora
from models.flow import FlowConfig, FlowPolicy, Shape, ode_step
from models.tokenize import PAD


@dataclass(kw_only=True, frozen=True)
class PiConfig(layers.SiglipConfig, FlowConfig):
    """The defaults are the embedded π0.5; in the comments openpi's. A missing camera of its three
    equals a masked one."""

    pi05: bool = True  # False: π0
    vocabulary: Size = 399  # tokens; 257152
    tokens: Length = 24  # prompt length; 200
    width: Size = 128  # 2048
    mlp: Size = 384  # 16384
    depth: Count = 4  # 18, shared by prefix and expert
    heads: Count = 4  # 8
    kv_heads: Count = 1  # 1, as in Gemma-2B
    head_dim: Size = 32  # 256
    expert_width: Size = 96  # 1024
    expert_mlp: Size = 256  # 4096
    value_widths: tuple[Size, ...] = (128, 64)  # (1024, 512, 256)
    value_activation: Literal["silu", "relu"] = "silu"  # relu (RLinf)
    chunk: Length = 10  # C; base models 50
    action_dim: Length = 4  # A; 32 with padding
    state_dim: Size = 4  # 32 with padding; only π0 has a state token
    executed_steps: Natural = 0  # of the chunk, by the robot: what the log-prob counts; 0 means all
    executed_dims: Natural = 0  # of the action, the rest is padding; 0 means all
    noise: Literal["sde", "network"] = "sde"  # Flow-SDE or Flow-Noise
    noise_range: tuple[AboveZero, AboveZero] = (0.08, 0.16)  # of Flow-Noise's deviation (RLinf)
    noise_widths: tuple[Size, ...] = (128, 64)  # Flow-Noise: hidden widths of its network (RLinf)

    @property
    def played(self) -> tuple[int, int]:
        """(C, A) that the robot executes."""
        return self.executed_steps or self.chunk, self.executed_dims or self.action_dim


PI05_FULL = PiConfig(
    views=3,
    **layers.SO400M,
    vocabulary=257_152,
    tokens=200,
    width=2048,
    mlp=16_384,
    depth=18,
    heads=8,
    head_dim=256,
    expert_width=1024,
    expert_mlp=4096,
    value_widths=(1024, 512, 256),
    value_activation="relu",
    action_dim=32,
    state_dim=32,
    denoise_steps=5,
    noise_level=0.5,
    sde_steps=5,
)
PI0_FULL = replace(
    PI05_FULL,
    pi05=False,
    tokens=48,
    chunk=50,
    value_widths=(512, 256, 128),
    denoise_steps=4,
    sde_steps=4,
)
SMALL = {"pi0": PiConfig(pi05=False, value_widths=(64, 32)), "pi05": PiConfig()}
FULL = {"pi0": PI0_FULL, "pi05": PI05_FULL}


class RMSNorm(nn.Module):
    """Gemma's: x/rms(x)·(1 + w). adaRMS: scale, shift, gate are a Linear of `condition` [n, D]."""

    def __init__(self, width: int, condition: int | None = None):
        super().__init__()
        if condition is None:
            self.weight = nn.Parameter(torch.zeros(width))
        else:
            self.dense = lora.Linear(condition, 3 * width)
            nn.init.zeros_(self.dense.weight)
            nn.init.zeros_(self.dense.bias)
            with torch.no_grad():
                # Gates start open: at small width this trains in minutes, not hours.
                self.dense.bias[2 * width :] = 1.0

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        dtype = x.dtype
        x = layers.wide(x)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        if condition is None:
            return (x * (1.0 + self.weight.to(dtype).to(x.dtype))).to(dtype), None
        modulation = self.dense(condition)
        scale, shift, gate = modulation[:, None].to(x.dtype).chunk(3, dim=-1)  # each [n, 1, D]
        return (x * (1.0 + scale) + shift).to(dtype), gate.to(dtype)


class GeGLU(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_proj = lora.Linear(width, hidden, bias=False)
        self.up_proj = lora.Linear(width, hidden, bias=False)
        self.down_proj = lora.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


def gated(x: Tensor, more: Tensor, gate: Tensor | None) -> Tensor:
    return x + more if gate is None else x + gate * more


class GemmaLayer(nn.Module):
    """One decoder layer. condition: width of what its norms are conditioned on, if adaptive."""

    def __init__(self, width, mlp, heads, head_dim, condition=None, kv_heads=1):
        super().__init__()
        self.heads = heads
        self.kv_heads = kv_heads
        self.input_layernorm = RMSNorm(width, condition)
        self.q_proj = lora.Linear(width, heads * head_dim, bias=False)
        self.k_proj = lora.Linear(width, kv_heads * head_dim, bias=False)
        self.v_proj = lora.Linear(width, kv_heads * head_dim, bias=False)
        self.o_proj = lora.Linear(heads * head_dim, width, bias=False)
        self.post_attention_layernorm = RMSNorm(width, condition)
        self.mlp = GeGLU(width, mlp)

    def forward(self, x, cos, sin, mask, past=None, condition=None) -> tuple[Tensor, Tensor]:
        """x [n, S, D], cos and sin of `rotary`, mask [n, 1, 1 or heads/kv·S, P + S], past keys and
        values [n, 2·kv, P, d] → x and this layer's own keys and values [n, 2·kv, S, d]."""
        h, gate = self.input_layernorm(x, condition)
        q = layers.rotate(layers.split_heads(self.q_proj(h), self.heads), cos, sin)
        k = layers.rotate(layers.split_heads(self.k_proj(h), self.kv_heads), cos, sin)
        v = layers.split_heads(self.v_proj(h), self.kv_heads)
        own = torch.cat([k, v], dim=1)
        both = own if past is None else torch.cat([past, own], dim=2)
        out = layers.attention(q, *both.chunk(2, dim=1), mask)
        x = gated(x, self.o_proj(layers.join_heads(out)), gate)
        h, gate = self.post_attention_layernorm(x, condition)
        return gated(x, self.mlp(h), gate), own


class VisionTower(layers.Siglip):
    """SigLIP, then a Linear to the language width."""

    def __init__(self, c: PiConfig):
        super().__init__(c)
        self.projector = lora.Linear(c.vision_width, c.width)

    def forward(self, image: Tensor, compute: torch.dtype | None = None) -> Tensor:
        """image [n, V, H, W, 3] uint8, or scaled to [-1, 1] → tokens [n, V·(H/patch)², D]."""
        pixels = layers.scaled(image, compute or self.patch_embedding.weight.dtype)
        found = self.projector(super().forward(pixels, compute))
        return found.unflatten(0, image.shape[:2]).flatten(1, 2)


class Pi(FlowPolicy):
    HEADS = ("value_head", "noise_head")
    FROZEN = ("vision.", "embed_tokens.", "language.", "language_norm.")  # the VLM
    # as in openpi's own code (src/openpi/models_pytorch/pi0_pytorch.py)
    WIDE = ("action_", "time_mlp_", "state_proj.")
    # Attention and feed-forward of the expert, as openpi's gemma_300m_lora, and of the VLM, as
    # gemma_2b_lora (src/openpi/models/gemma.py) and, with the image tower, RLinf
    # (rlinf/models/__init__.py).
    ADAPTED = ("expert.*_proj",)
    ADAPTED_VLM = ("language.*_proj", "vision.layers")

    def __init__(self, c: PiConfig):
        super().__init__(c)
        self.prefix_length = c.views * (c.image_size // c.patch) ** 2 + c.tokens  # P
        self.vision = VisionTower(c)
        # Padding learns nothing, as in the original.
        self.embed_tokens = nn.Embedding(c.vocabulary, c.width, padding_idx=PAD)
        nn.init.normal_(self.embed_tokens.weight, std=c.width**-0.5)
        self.language = nn.ModuleList(
            GemmaLayer(c.width, c.mlp, c.heads, c.head_dim, kv_heads=c.kv_heads)
            for _ in range(c.depth)
        )
        self.language_norm = RMSNorm(c.width)
        e = c.expert_width
        condition = e if c.pi05 else None
        self.action_in_proj = lora.Linear(c.action_dim, e)
        if c.pi05:
            self.time_mlp_in = lora.Linear(e, e)
            self.time_mlp_out = lora.Linear(e, e)
        else:
            self.state_proj = lora.Linear(c.state_dim, e)
            self.action_time_mlp_in = lora.Linear(2 * e, e)
            self.action_time_mlp_out = lora.Linear(e, e)
        self.expert = nn.ModuleList(
            GemmaLayer(e, c.expert_mlp, c.heads, c.head_dim, condition, c.kv_heads)
            for _ in range(c.depth)
        )
        self.expert_norm = RMSNorm(e, condition)
        self.action_out_proj = lora.Linear(e, c.action_dim)
        for name, head in self.heads(c).items():
            self.add_module(name, head)
        lora.adapt(self, self.adapted)

    @staticmethod
    def heads(c: PiConfig) -> dict[str, nn.Module]:
        """The value head begins at 0, Flow-Noise's network at the middle of its range."""
        feature = c.width if c.pi05 else c.expert_width
        activation = {"silu": nn.SiLU, "relu": nn.ReLU}[c.value_activation]
        found = {"value_head": layers.silent(layers.mlp((feature, *c.value_widths, 1), activation))}
        if c.noise == "network":
            widths = (c.expert_width, *c.noise_widths, c.action_dim)
            found["noise_head"] = layers.silent(layers.mlp(widths, nn.Tanh))
        return found

    def prefix(
        self, image: Tensor, tokens: Tensor, real: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The part that never sees the actions. image [n, V, H, W, 3] uint8, tokens [n, L], real
        [n, P] bool where cameras may be missing (default: only padding is not) → cache [n, depth,
        2·kv, P, d], mean feature of the real positions [n, D], real [n, P] bool."""
        real = self.real(tokens) if real is None else real
        x, cache = self.prefix_features(image, tokens, real)
        return cache, (layers.wide(x) * real[..., None]).sum(1) / real.sum(1, keepdim=True), real

    def prefix_features(self, image: Tensor, tokens: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """As `prefix` → features [n, P, D] (meaningless where not real), cache."""
        c = self.config
        layers.require_images(image, c, floats=image.is_floating_point())
        pictures = self.vision(image, self.vlm_compute)
        words = self.embed_tokens(tokens)
        words = words.to(self.vlm_compute or words.dtype)
        words = words * math.sqrt(c.width)  # Gemma scales words, not pictures
        x = torch.cat([pictures, words], dim=1)
        x = x.to(self.vlm_compute or self.language[0].q_proj.weight.dtype)
        frequency = layers.frequencies(c.head_dim, x.device)
        cos, sin = layers.rotary(real.cumsum(1) - 1, frequency, x.dtype)
        mask = layers.additive(real[:, None], x.dtype)
        cache = []
        for layer in self.language:
            x, own = layer(x, cos, sin, mask)
            cache.append(own)
        x, _ = self.language_norm(x)
        return x, torch.stack(cache, dim=1)

    def real(self, tokens: Tensor) -> Tensor:
        """Which prefix positions are not padding: [n, P] bool."""
        pictures = self.prefix_length - tokens.shape[1]
        return F.pad(tokens != PAD, (pictures, 0), value=True)

    def suffix(
        self, cache: Tensor, real: Tensor, x_t: Tensor, t: Tensor, state: Tensor | None = None
    ) -> Tensor:
        """x_t [n, C, A], t [n], π0's state [n, S] → the expert's features of actions [n, C, E]."""
        c = self.config
        dtype = self.action_in_proj.weight.dtype
        x = self.action_in_proj(x_t.to(dtype))
        time = time_embedding(t, c.expert_width).to(dtype)  # [n, E]
        if c.pi05:
            condition = F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(time))))
            condition = condition.to(self.compute or self.expert_norm.dense.weight.dtype)
        else:
            condition = None
            both = torch.cat([x, time[:, None].expand_as(x)], dim=-1)
            x = self.action_time_mlp_out(F.silu(self.action_time_mlp_in(both)))
            x = torch.cat([self.state_proj(state.to(dtype))[:, None], x], dim=1)
        x = x.to(self.compute or self.expert[0].q_proj.weight.dtype)
        length = x.shape[1]  # S: C, and one for π0's state
        positions = real.sum(1, keepdim=True) + torch.arange(length, device=x.device)
        cos, sin = layers.rotary(positions, layers.frequencies(c.head_dim, x.device), x.dtype)
        see = F.pad(real, (0, length), value=True)[:, None]
        if not c.pi05:  # the state token sees the prefix and itself
            see = see.repeat(1, length, 1)
            see[:, 0, self.prefix_length + 1 :] = False
        mask = layers.additive(see, x.dtype, c.heads // c.kv_heads)
        for i, layer in enumerate(self.expert):
            x, _ = layer(x, cos, sin, mask, cache[:, i].to(x.dtype), condition)
        x, _ = self.expert_norm(x, condition)
        return x[:, -c.chunk :].to(self.action_out_proj.weight.dtype)

    def velocity(
        self, cache: Tensor, real: Tensor, x_t: Tensor, t: Tensor, state: Tensor | None = None
    ) -> Tensor:
        """v(x_t, t | prefix) [n, C, A], which points from data to noise, given as for `suffix`."""
        return self.direction(self.suffix(cache, real, x_t, t, state), x_t)

    def value(self, feature: Tensor) -> Tensor:
        """feature [n, D] (π0: [n, E]) → value [n]; the head's gradient stops at the feature."""
        return self.value_head(feature.detach().to(self.value_head[0].weight.dtype))[:, 0]

    def observation_fields(self) -> dict[str, Shape]:
        state = {"state": ((self.config.state_dim,), torch.float32)}
        return layers.image_and_tokens(self.config) | ({} if self.config.pi05 else state)

    def cache_fields(self) -> dict[str, Shape]:
        c = self.config
        shape = (c.depth, 2 * c.kv_heads, self.prefix_length, c.head_dim)
        fields = {"prefix_cache": (shape, getattr(torch, c.prefix_dtype))}
        return fields | ({"prefix_feature": ((c.width,), torch.float32)} if c.pi05 else {})

    def noise_shape(self) -> tuple[int, int]:
        return self.config.chunk, self.config.action_dim

    def times(self) -> list[float]:
        """linspace(1, 1/N, N), then 0 (RLinf, openpi's direction). In fp32: the fastest wave of the
        time embedding turns the last bit of t into an error of 1e-4."""
        steps = self.config.denoise_steps
        return [*torch.linspace(1.0, 1.0 / steps, steps).tolist(), 0.0]

    @property
    def learns_noise(self) -> bool:
        return self.config.noise == "network"

    def look(self, obs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The prefix, or what a slot keeps of it, and for π0 the state."""
        if "prefix_cache" in obs:
            return obs | {"real": self.real(obs["tokens"])}
        with torch.set_grad_enabled(self.config.train_vlm and torch.is_grad_enabled()):
            cache, feature, real = self.prefix(obs["image"], obs["tokens"])
        return obs | {"prefix_cache": cache, "prefix_feature": feature, "real": real}

    def denoise(self, seen: dict[str, Tensor], x: Tensor, t: Tensor, step: Tensor) -> Tensor:
        return self.suffix(seen["prefix_cache"], seen["real"], x, t, seen.get("state"))

    def direction(self, h: Tensor, x: Tensor) -> Tensor:
        return self.action_out_proj(h).to(x.dtype)

    def value_of(self, seen: dict[str, Tensor], h: Tensor) -> Tensor:
        return self.value(seen["prefix_feature"] if self.config.pi05 else h.mean(1))

    def transition(self, x: Tensor, h: Tensor, t: Tensor, t_next: Tensor) -> tuple[Tensor, ...]:
        """Flow-Noise: the ODE's step is the mean, the network's bounded answer the deviation."""
        if not self.learns_noise:
            return super().transition(x, h, t, t_next)
        step = ode_step(x, self.direction(h, x), t, t_next)
        return step, step, bounded(self.noise_head(h).to(x.dtype), self.config.noise_range)

    def imitation_loss(self, cache, real, actions, t, noise, state=None) -> Tensor:
        """Flow matching given a prefix: mean square error [] of the velocity at x_t = t·noise +
        (1 − t)·actions, whose target is noise − actions. actions and noise [n, C, A], t [n]."""
        x_t = t[:, None, None] * noise + (1.0 - t[:, None, None]) * actions
        return F.mse_loss(self.velocity(cache, real, x_t, t, state), noise - actions)

    def imitation_draw(self, n: int) -> dict[str, Tensor]:
        """Times [n] of openpi's distribution, Beta(1.5, 1), and noise [n, C, A]."""
        t = torch.distributions.Beta(1.5, 1.0).sample((n,)) * 0.999 + 0.001
        return {"t": t, "noise": torch.randn(n, self.config.chunk, self.config.action_dim)}

    def imitate(self, obs: dict[str, Tensor], actions: Tensor, draw: dict[str, Tensor]) -> Tensor:
        """Loss [] of demonstrated actions [n, C, A], given what `imitation_draw` drew. Dimensions
        that the robot lacks are learned to be 0 (openpi `PadStatesAndActions`)."""
        actions = F.pad(actions, (0, self.config.action_dim - actions.shape[2]))
        cache, _, real = self.prefix(obs["image"], obs["tokens"])
        return self.imitation_loss(cache, real, actions, draw["t"], draw["noise"], obs.get("state"))


def bounded(x: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Flow-Noise's standard deviation: tanh maps x to a log-variance between those of `bounds`
    (RLinf explore_noise_net.py)."""
    low, high = (2.0 * math.log(bound) for bound in bounds)
    return torch.exp(0.5 * (low + (high - low) * (torch.tanh(x) + 1.0) / 2.0))


def time_embedding(t: Tensor, width: int) -> Tensor:
    """Sine and cosine of t [n] in fp64, periods from 4e-3 to 4 (openpi) → [n, width] fp64."""
    fraction = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64, device=t.device)
    angle = t[:, None].double() * (2.0 * math.pi / (4e-3 * (4.0 / 4e-3) ** fraction))
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


# the family: `contract.py`
CONFIG = PiConfig
NETWORK = Pi
FORMATS = "models.formats.pi"
