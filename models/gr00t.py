"""GR00T N1.5: SigLIP and the first layers of Qwen3 → vision-language features → DiT action head
(flow matching) → value.

    image [V, H, W, 3], tokens [L] ──► backbone(): features [P, D] ──► context(): LN,
    self-attention, keys and values per layer
    noise x₀ [H, A], state [S] ──► velocity(context, x_t, t) × N denoise steps ──► actions [C, A]

Of Eagle 2.5 only what N1.5 uses is here: SigLIP without its pooling head, one Linear (`mlp1`; no
pixel shuffle), 12 of Qwen3's 28 layers, causal, with its last norm.

As a stochastic policy: `models/flow.py`, whose time and velocity are this one's reversed: here t
runs from 0 (noise) to 1 (data). The value head reads the mean feature and the encoded state (RLinf
rlinf/models/embodiment/gr00t/gr00t_n1d5), without gradient.

Padding is part of the original's function: only its language model masks it, the blocks after it
attend to it. With `mask_padding` the output is that of the prompt alone.

Left out: dropout (RLinf trains without it), tiling of large images, the original's unused loss
terms. Sources: NVIDIA/Isaac-GR00T gr00t/model/action_head and backbone; `models/formats/gr00t.py`
reads its checkpoints.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from checks import Count, Length, Natural, Size
from models import layers, lora
from models.flow import FlowConfig, FlowPolicy, Shape

# in `tokens`, so that no token of a prompt can be taken for padding; `pad_token` is what the
# network embeds there
PAD = -1


@dataclass(kw_only=True, frozen=True)
class Gr00tConfig(layers.SiglipConfig, FlowConfig):
    """The defaults are the embedded model; in the comments GR00T-N1.5-3B, LIBERO as in RLinf."""

    vocabulary: Size = 400  # tokens; 151680
    image_token: Size = 399  # <IMG_CONTEXT>; 151669
    pad_token: Natural = (
        0  # what padding is embedded as: 0 in RLinf, 151643 in NVIDIA's own collation
    )
    tokens: Length = 24  # L, prompt length with one image token per view; 60, which makes P = 570
    width: Size = 128  # of the language model; 2048
    mlp: Size = 384  # 6144
    depth: Count = 4  # 12 of Qwen3-1.7B's 28
    heads: Count = 4  # 16
    kv_heads: Count = 2  # 8
    head_dim: Size = 32  # 128
    project: Natural = 0  # width after `eagle_linear`; 0: there is none, as in the released model
    vl_depth: Count = 2  # 4
    vl_heads: Count = 4  # 32
    dit_depth: Count = 4  # 16: even layers attend to the features, odd ones to themselves
    dit_heads: Count = 4  # 32
    dit_head_dim: Size = 24  # 48
    hidden: Size = 96  # of the DiT's output and of the state and action MLPs; 1024
    future_tokens: Size = 8  # 32
    positions: Size = 16  # rows of the action position table; 1024
    embodiments: Size = 2  # robots with weights of their own in the MLPs; 32
    embodiment: Natural = 0  # which of them this is; 31 ("libero_franka", "new_embodiment")
    max_state_dim: Size = 4  # 64, zero-padded
    max_action_dim: Size = 4  # 32, zero-padded
    horizon: Length = 10  # H, actions the flow produces; 16
    chunk: Length = 10  # C of them are executed, and only those count in the log-prob; 10
    action_dim: Length = 4  # A of the simulator, likewise; 7
    value_widths: tuple[Size, ...] = (128, 64)  # (1024, 512, 256)
    time_buckets: Size = 1000  # the network sees ⌊t·1000⌋
    # False: the blocks after the language model see padding, as the original's do in a padded batch
    mask_padding: bool = True
    # whether the prompt says `str([task])` or the task: `prompt` in `models/formats/gr00t.py`
    task_as_list: bool = False
    padded_rows: str = "flash"  # what attention gives a padded position: see `causal_mask`

    @property
    def image_tokens(self) -> int:
        """Tokens per view."""
        return (self.image_size // self.patch) ** 2

    @property
    def length(self) -> int:
        """P, positions of the language model."""
        return self.tokens + self.views * (self.image_tokens - 1)

    @property
    def features(self) -> int:
        """Width of the vision-language features."""
        return self.project or self.width

    @property
    def dit_width(self) -> int:
        return self.dit_heads * self.dit_head_dim

    @property
    def played(self) -> tuple[int, int]:
        """(C, A) that the robot executes."""
        return self.chunk, self.action_dim


FULL = {
    "gr00t": Gr00tConfig(
        views=2,
        **layers.SO400M,
        vocabulary=151680,
        image_token=151669,
        tokens=60,
        width=2048,
        mlp=6144,
        depth=12,
        heads=16,
        kv_heads=8,
        head_dim=128,
        vl_depth=4,
        vl_heads=32,
        dit_depth=16,
        dit_heads=32,
        dit_head_dim=48,
        hidden=1024,
        future_tokens=32,
        positions=1024,
        embodiments=32,
        embodiment=31,
        max_state_dim=64,
        max_action_dim=32,
        horizon=16,
        action_dim=7,
        value_widths=(1024, 512, 256),
        noise_level=0.5,
        sde_steps=4,
        mask_padding=False,
        prefix_dtype="bfloat16",
    )
}


def causal_mask(real: Tensor, rows: str, dtype: torch.dtype, group: int) -> tuple[Tensor, Tensor]:
    """real [n, P] bool → mask of causal attention [n, 1, group·P, P] ("eager": [n, 1, P, P]), and
    which positions keep what attention gives them [n, P, 1]. group: of `layers.additive`.

    Implementations agree on real positions and differ on padded ones, which the blocks after the
    language model may see: "flash" (the original's on a GPU) gives a padded position zero; "sdpa"
    what its real predecessors give, zero if there are none (transformers from 4.53; before, on a
    CPU, as "eager"); "eager" the same, but if there are none the mean over all positions (a large
    finite number masks, and equal numbers cancel)."""
    see = real[:, None].expand(-1, real.shape[1], -1).tril()  # [n, P, P]
    some = see.any(-1, keepdim=True)
    if rows == "eager":
        mask = torch.zeros(see.shape, dtype=dtype, device=real.device)
        return mask.masked_fill(~see, torch.finfo(dtype).min)[:, None], torch.ones_like(some)
    keep = real[..., None] if rows == "flash" else some
    # No row may mask all: softmax would give NaN.
    return layers.additive(see | ~some, dtype, group), keep


class QwenLayer(nn.Module):
    """Qwen3's decoder layer: grouped heads, a norm on each query and key, SwiGLU."""

    def __init__(self, c: Gr00tConfig):
        super().__init__()
        self.heads = c.heads
        self.kv_heads = c.kv_heads
        self.eager = c.padded_rows == "eager"
        self.sizes = (c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim)
        self.input_layernorm = layers.RMSNorm(c.width)
        self.qkv = lora.Linear(c.width, sum(self.sizes), bias=False, parts=self.sizes)
        self.q_norm = layers.RMSNorm(c.head_dim)
        self.k_norm = layers.RMSNorm(c.head_dim)
        self.o_proj = lora.Linear(self.sizes[0], c.width, bias=False)
        self.post_attention_layernorm = layers.RMSNorm(c.width)
        self.gate_up = lora.Linear(c.width, 2 * c.mlp, bias=False, parts=2 * (c.mlp,))
        self.down_proj = lora.Linear(c.mlp, c.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, keep: Tensor) -> Tensor:
        q, k, v = self.qkv(self.input_layernorm(x)).split(self.sizes, dim=-1)
        q = layers.rotate(self.q_norm(layers.split_heads(q, self.heads)), cos, sin)
        k = layers.rotate(self.k_norm(layers.split_heads(k, self.kv_heads)), cos, sin)
        v = layers.split_heads(v, self.kv_heads)
        if self.eager:  # the fused kernels' gradients lose its cancelling numbers
            with sdpa_kernel(SDPBackend.MATH):
                h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        else:
            h = layers.attention(q, k, v, mask)
        x = x + self.o_proj(layers.join_heads(h).masked_fill(~keep, 0.0))
        gate, up = self.gate_up(self.post_attention_layernorm(x)).chunk(2, dim=-1)
        return x + self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """Attention and feed-forward, each after a norm. `context` is the width attended to.

    The features' blocks have LayerNorms with weights. The DiT's (`adaptive`) have them without, and
    the first is scaled and shifted by the time (adaLN)."""

    def __init__(self, width: int, heads: int, context: int, adaptive: bool):
        super().__init__()
        self.heads = heads
        self.adaptive = adaptive
        if adaptive:
            self.ada = lora.Linear(width, 2 * width)
        else:
            self.norm1 = layers.LayerNorm(width)
            self.norm3 = layers.LayerNorm(width)
        self.q = lora.Linear(width, width)
        self.kv = lora.Linear(context, 2 * width, parts=2 * (width,))
        self.out = lora.Linear(width, width)
        self.ff_in = lora.Linear(width, 4 * width)
        self.ff_out = lora.Linear(4 * width, width)

    def keys(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """context [n, P, D'] → keys and values, each [n, heads, P, d]."""
        k, v = self.kv(context).chunk(2, dim=-1)
        return layers.split_heads(k, self.heads), layers.split_heads(v, self.heads)

    def forward(self, x: Tensor, condition=None, keys=None, mask=None, only_keys: bool = False):
        """x [n, S, D], condition [n, D], keys of `keys` (None: of x), mask [n, 1, 1, P] → [n, S,
        D]. With `only_keys` x is a context, and this is `keys`."""
        if only_keys:
            return self.keys(x)
        if self.adaptive:
            scale, shift = self.ada(F.silu(condition))[:, None].chunk(2, dim=-1)  # each [n, 1, D]
            h = F.layer_norm(x, x.shape[-1:]) * (1.0 + scale) + shift
        else:
            h = self.norm1(x)
        k, v = self.keys(h) if keys is None else keys
        q = layers.split_heads(self.q(h), self.heads)
        x = x + self.out(layers.join_heads(layers.attention(q, k, v, mask)))
        h = F.layer_norm(x, x.shape[-1:]) if self.adaptive else self.norm3(x)
        return x + self.ff_out(F.gelu(self.ff_in(h), approximate="tanh"))


class CategoryLinear(nn.Module):
    """One Linear per embodiment. `which` is an embodiment's number, or one per sample [n]."""

    def __init__(self, embodiments: int, inputs: int, outputs: int):
        super().__init__()
        self.W = layers.normal(embodiments, inputs, outputs, std=inputs**-0.5)
        self.b = nn.Parameter(torch.zeros(embodiments, outputs))

    def forward(self, x: Tensor, which: int | Tensor) -> Tensor:
        return x @ self.W[which].to(x.dtype) + self.b[which].to(x.dtype).unsqueeze(-2)


class CategoryMLP(nn.Module):
    def __init__(self, embodiments: int, inputs: int, hidden: int, outputs: int):
        super().__init__()
        self.layer1 = CategoryLinear(embodiments, inputs, hidden)
        self.layer2 = CategoryLinear(embodiments, hidden, outputs)

    def forward(self, x: Tensor, which: int | Tensor) -> Tensor:
        return self.layer2(F.relu(self.layer1(x, which)), which)


class ActionEncoder(nn.Module):
    def __init__(self, c: Gr00tConfig):
        super().__init__()
        self.W1 = CategoryLinear(c.embodiments, c.max_action_dim, c.dit_width)
        self.W2 = CategoryLinear(c.embodiments, 2 * c.dit_width, c.dit_width)
        self.W3 = CategoryLinear(c.embodiments, c.dit_width, c.dit_width)

    def forward(self, actions: Tensor, bucket: Tensor, which: int | Tensor) -> Tensor:
        """actions [n, H, A], bucket [n] → [n, H, D]."""
        x = self.W1(actions, which)
        half = x.shape[-1] // 2
        time = sine_cosine(bucket, half, half).to(x.dtype)[:, None].expand_as(x)
        return self.W3(F.silu(self.W2(torch.cat([x, time], dim=-1), which)), which)


def sine_cosine(bucket: Tensor, half: int, periods: int) -> Tensor:
    """Sine, then cosine of bucket [n] at frequencies 10⁴^(−i/periods), i < half → [n, 2·half]."""
    number = torch.arange(half, device=bucket.device, dtype=torch.float32)
    angle = bucket[:, None].float() * torch.exp(number * (-math.log(10_000.0) / periods))
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class Gr00t(FlowPolicy):
    HEADS = ("value_head",)
    FROZEN = ("vision.", "projector.", "embed_tokens.", "language", "eagle_linear.")
    WIDE = ("action_decoder.",)
    # Queries, keys and values of the action head, and of the VLM: Isaac-GR00T N1.5's
    # get_lora_model (gr00t/utils/peft.py) with and without `action_head_only`.
    ADAPTED = ("dit.*.q", "dit.*.kv", "vl_blocks.*.q", "vl_blocks.*.kv")
    ADAPTED_VLM = ("language.*.qkv", "vision.layers.*.qkv")

    def __init__(self, c: Gr00tConfig):
        super().__init__(c)
        self.vision = layers.Siglip(c)
        self.projector = lora.Linear(c.vision_width, c.width)
        self.embed_tokens = nn.Embedding(c.vocabulary, c.width)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        self.language = nn.ModuleList(QwenLayer(c) for _ in range(c.depth))
        self.language_norm = layers.RMSNorm(c.width)
        if c.project:
            self.eagle_linear = lora.Linear(c.width, c.project)
        self.vlln = layers.LayerNorm(c.features)
        self.vl_blocks = nn.ModuleList(
            Block(c.features, c.vl_heads, c.features, False) for _ in range(c.vl_depth)
        )
        self.state_encoder = CategoryMLP(c.embodiments, c.max_state_dim, c.hidden, c.dit_width)
        self.action_encoder = ActionEncoder(c)
        self.action_decoder = CategoryMLP(c.embodiments, c.hidden, c.hidden, c.max_action_dim)
        self.future_tokens = nn.Embedding(c.future_tokens, c.dit_width)
        self.position_embedding = nn.Embedding(c.positions, c.dit_width)
        nn.init.normal_(self.future_tokens.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.02)
        self.time_in = lora.Linear(256, c.dit_width)
        self.time_out = lora.Linear(c.dit_width, c.dit_width)
        contexts = [c.dit_width if i % 2 else c.features for i in range(c.dit_depth)]
        self.dit = nn.ModuleList(
            Block(c.dit_width, c.dit_heads, context, True) for context in contexts
        )
        self.proj_out_1 = lora.Linear(c.dit_width, 2 * c.dit_width)
        self.proj_out_2 = lora.Linear(c.dit_width, c.hidden)
        self.value_head = self.heads(c)["value_head"]
        lora.adapt(self, self.adapted)

    @staticmethod
    def heads(c: Gr00tConfig) -> dict[str, nn.Module]:
        """An MLP that starts at value 0, which is what nothing is known of."""
        widths = (c.features + c.dit_width, *c.value_widths, 1)
        return {"value_head": layers.silent(layers.mlp(widths, nn.ReLU))}

    def spread(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [n, L], one image token per view, → ids [n, P] and whether they are real, bool."""
        c = self.config
        flat = tokens.long().flatten()
        counts = torch.where(flat == c.image_token, c.image_tokens, 1)
        ids = flat.repeat_interleave(counts, output_size=len(tokens) * c.length)
        ids = ids.view(-1, c.length)
        return ids.masked_fill(ids == PAD, c.pad_token), ids != PAD

    def backbone(self, pixels: Tensor, ids: Tensor, real: Tensor) -> Tensor:
        """pixels [n·V, 3, H, W] in [−1, 1], ids and real [n, P] → features [n, P, D]."""
        pictures = self.projector(self.vision(pixels, self.vlm_compute))  # [n·V, I, D]
        x = self.embed_tokens(ids).to(self.vlm_compute or self.embed_tokens.weight.dtype)
        # Each takes the place of an image token. The gradient of masked_scatter, which does the
        # same, would make the host wait.
        here = ids == self.config.image_token
        place = (here.cumsum(1) - 1).clamp(min=0)[..., None].expand_as(x)
        pictures = pictures.to(x.dtype).view(len(x), -1, x.shape[-1])
        x = torch.where(here[..., None], pictures.gather(1, place), x)
        positions = torch.arange(ids.shape[1], device=x.device)[None]
        frequency = layers.frequencies(self.config.head_dim, x.device, theta=1e6)
        cos, sin = layers.rotary(positions, frequency, x.dtype)
        c = self.config
        mask, keep = causal_mask(real, c.padded_rows, x.dtype, c.heads // c.kv_heads)
        for layer in self.language:
            x = layer(x, cos, sin, mask, keep)
        x = self.language_norm(x)
        return self.eagle_linear(x) if self.config.project else x

    def context(self, features: Tensor, real: Tensor) -> tuple[Tensor, list, Tensor | None]:
        """features [n, P, D] → processed features, keys and values of each DiT layer that attends
        to them, and their mask."""
        x = self.vlln(features)
        mask = layers.additive(real[:, None], x.dtype) if self.config.mask_padding else None
        for block in self.vl_blocks:
            x = block(x, mask=mask)
        return x, [block(x, only_keys=True) for block in self.dit[::2]], mask

    def encode_state(self, state: Tensor, which: int | Tensor) -> Tensor:
        """state [n, S'] → one token [n, 1, D]."""
        return self.state_encoder(state[:, None], which)

    def velocity(
        self, context, state: Tensor, x_t: Tensor, bucket: Tensor, which: int | Tensor
    ) -> Tensor:
        """v(x_t, t | context) [n, H, A'], noise to data; state of `encode_state`, bucket [n]."""
        _, keys, mask = context
        n, horizon, _ = x_t.shape
        # Cosine comes first, unlike in the action encoder.
        waves = sine_cosine(bucket, 128, 127).roll(128, dims=-1).to(x_t.dtype)
        condition = self.time_out(F.silu(self.time_in(waves)))
        actions = self.action_encoder(x_t, bucket, which)
        actions = actions + self.position_embedding.weight[:horizon].to(x_t.dtype)
        future = self.future_tokens.weight.to(x_t.dtype).expand(n, -1, -1)
        x = torch.cat([state, future, actions], dim=1)
        for i, block in enumerate(self.dit):
            x = block(x, condition) if i % 2 else block(x, condition, keys[i // 2], mask)
        # Shift comes first, unlike in the blocks.
        shift, scale = self.proj_out_1(F.silu(condition))[:, None].chunk(2, dim=-1)
        x = self.proj_out_2(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1.0 + scale) + shift)
        return self.action_decoder(layers.wide(x[:, -horizon:]), which)

    def value(self, features: Tensor, real: Tensor, state: Tensor) -> Tensor:
        """Processed features [n, P, D], encoded state [n, 1, D'] (both detached) → value [n]."""
        seen = (real if self.config.mask_padding else torch.ones_like(real))[..., None]
        mean = (layers.wide(features) * seen).sum(1) / seen.sum(1)
        both = torch.cat([mean, state[:, 0]], dim=-1).detach()
        return self.value_head(both.to(self.value_head[0].weight.dtype))[:, 0]

    def bucket(self, step: Tensor) -> Tensor:
        """What the network sees of the time of denoise step [n]: ⌊t·1000⌋."""
        return step * self.config.time_buckets // self.config.denoise_steps

    def observation_fields(self) -> dict[str, Shape]:
        state = {"state": ((self.config.max_state_dim,), torch.float32)}
        return layers.image_and_tokens(self.config) | state

    def cache_fields(self) -> dict[str, Shape]:
        c = self.config
        return {"vl_features": ((c.length, c.features), getattr(torch, c.prefix_dtype))}

    def noise_shape(self) -> tuple[int, int]:
        return self.config.horizon, self.config.max_action_dim

    def times(self) -> list[float]:
        """Shares of noise. GR00T's own time runs from 0, which is noise, to 1 in steps of 1/N."""
        steps = self.config.denoise_steps
        return [1.0 - i / steps for i in range(steps + 1)]

    def features(self, obs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Of pictures and prompt, or what a slot keeps of them [n, P, D]; what is real [n, P]."""
        ids, real = self.spread(obs["tokens"])
        found = obs.get("vl_features")
        if found is None:
            kind = self.vlm_compute or self.projector.weight.dtype
            pixels = layers.scaled(obs["image"], kind)
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.train_vlm):
                found = self.backbone(pixels, ids, real)
        return found.to(self.compute or self.vlln.weight.dtype), real

    def kept(self, obs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Not the context, which later epochs compute anew."""
        return {"vl_features": self.features(obs)[0].to(getattr(torch, self.config.prefix_dtype))}

    def look(self, obs: dict[str, Tensor]) -> dict:
        """The context, of pictures and prompt or what a slot keeps of them, and the state."""
        c = self.config
        features, real = self.features(obs)
        return {
            "vl_features": features.to(getattr(torch, c.prefix_dtype)),
            "real": real,
            "context": self.context(features, real),
            "state": self.encode_state(obs["state"].to(features.dtype), c.embodiment),
        }

    def denoise(self, seen: dict, x: Tensor, t: Tensor, step: Tensor) -> Tensor:
        """The velocity itself, from noise to data [n, H, A']."""
        state = seen["state"]
        robot = self.config.embodiment
        return self.velocity(seen["context"], state, x.to(state.dtype), self.bucket(step), robot)

    def direction(self, h: Tensor, x: Tensor) -> Tensor:
        return -h.to(x.dtype)

    def value_of(self, seen: dict, h: Tensor) -> Tensor:
        return self.value(seen["context"][0], seen["real"], seen["state"])

    def imitation_loss(self, context, state, actions, t, noise, real, which) -> Tensor:
        """Flow matching: mean square error [] of the velocity at x_t = (1 − t)·noise + t·actions,
        whose target is actions − noise, where `real`.

        context and state from `context` and `encode_state`; actions, noise, real [n, H, A'] (real
        is False in the padding), t [n]."""
        x_t = (1.0 - t[:, None, None]) * noise + t[:, None, None] * actions
        bucket = (t * self.config.time_buckets).long()
        v = self.velocity(context, state, x_t, bucket, which)
        return (F.mse_loss(v, actions - noise, reduction="none") * real).sum() / real.sum()

    def imitation_draw(self, n: int) -> dict[str, Tensor]:
        """Times [n], (0.999 − Beta(1.5, 1))/0.999, which dwell on noise (Isaac-GR00T), and noise
        [n, H, A']."""
        t = ((0.999 - torch.distributions.Beta(1.5, 1.0).sample((n,))) / 0.999).clamp(min=0.0)
        return {"t": t, "noise": torch.randn(n, *self.noise_shape())}

    def imitate(self, obs: dict[str, Tensor], actions: Tensor, draw: dict[str, Tensor]) -> Tensor:
        """Loss [] of demonstrated actions [n, C, A], given what `imitation_draw` drew."""
        c = self.config
        room = (0, c.max_action_dim - actions.shape[2], 0, c.horizon - actions.shape[1])
        padded = F.pad(actions, room)
        shown = F.pad(torch.ones_like(actions, dtype=torch.bool), room)
        seen = self.look(obs)
        return self.imitation_loss(
            seen["context"], seen["state"], padded, draw["t"], draw["noise"], shown, c.embodiment
        )


# the family: `contract.py`
CONFIG = Gr00tConfig
NETWORK = Gr00t
FORMATS = "models.formats.gr00t"
