"""Every attention of every family at full size has arguments that a fused kernel of CUDA takes.

The rules are torch 2.13's (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, sdp_utils_cpp.h
and attention.cpp), written down here because `torch.backends.cuda.can_use_flash_attention` and its
like say False wherever there is no GPU."""

import importlib
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

import allocations
from models import layers

HALF = (torch.bfloat16, torch.float16)
# What differs from FULL, where another call comes of it.
VARIANTS = {
    "pi0": {"train_vlm": True, "cache_prefix": False},
    "pi05": {"train_vlm": True, "cache_prefix": False},
    "gr00t": {"train_vlm": True, "cache_prefix": False},
    "gr00t that masks padding": {"train_vlm": True, "cache_prefix": False, "mask_padding": True},
    "oft": {"train": "full"},
    "oft of grouped heads": {"kv_heads": 8, "views": 2},
}


def fused(q, k, v, attn_mask=None, enable_gqa=False) -> set[str]:
    """The fused kernels that take a call."""
    heads, kv = q.shape[1], k.shape[1]
    grouped = heads != kv
    inputs = [q, k, v] if attn_mask is None else [q, k, v, attn_mask]
    if any(x.dim() != 4 or x.stride(-1) != 1 or 0 in x.shape for x in inputs):
        return set()
    if len({x.dtype for x in (q, k, v)}) > 1 or len({len(x) for x in (q, k, v)}) > 1:
        return set()
    if v.shape[1] != kv or (grouped and not (enable_gqa and heads % kv == 0)):
        return set()
    if attn_mask is not None:
        shape = (len(q), heads, q.shape[2], k.shape[2])
        fits = [size in (1, wanted) for size, wanted in zip(attn_mask.shape, shape, strict=True)]
        if not all(fits) or attn_mask.requires_grad:
            return set()
    d = q.shape[-1]
    half = q.dtype in HALF
    found = set()
    if half and attn_mask is None and d <= 256:
        found.add("flash")
    if half and d <= 128 and d % 8 == 0 and k.shape[2] > 1:
        found.add("cudnn")
    if (half or q.dtype is torch.float32) and not grouped and d % (8 if half else 4) == 0:
        found.add("efficient")
    return found


def calls_of(name: str, dtype: torch.dtype) -> list[tuple]:
    """Arguments of all attentions of an inference of three samples, and of an update of as many."""
    family = name.split()[0]
    module = importlib.import_module(f"models.{'pi' if family.startswith('pi') else family}")
    # All layers of a kind ask the same.
    short = {"depth": 1, "vision_depth": 1, "dit_depth": 2, "vl_depth": 1}
    short |= {"dino_depth": 1, "siglip_depth": 1}
    full = module.FULL[family]
    short = {key: value for key, value in short.items() if hasattr(full, key)}
    config = replace(full, prefix_dtype="float32") if hasattr(full, "prefix_dtype") else full
    with torch.device("meta"):
        model = module.NETWORK(replace(config, **short, **VARIANTS[name]))
    model.to("meta").compute = dtype  # over masters in fp32
    calls = []

    def note(q, k, v, attn_mask=None, **more):
        calls.append((q, k, v, attn_mask, more.get("enable_gqa", False)))
        return allocations.attention(q, k, v)

    drawn = model.draw([(0, 0, 0, 0)], [True])
    noise = {name: (x.shape[1:], x.dtype) for name, x in drawn.items()}
    with patch.object(F, "scaled_dot_product_attention", note):
        obs = allocations.empty(model.observation_fields(), 3)
        out = model.act(obs, allocations.empty(noise, 3))
        fields = allocations.empty(model.observation_fields() | model.slot_fields(), 3)
        out = model.evaluate(fields)
        (out["logprob"].sum() + out["value"].sum()).backward()
    return calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_fused_kernel_takes_every_attention(name, dtype):
    calls = calls_of(name, dtype)
    assert len(calls) > 4
    for q, k, v, mask, enable_gqa in calls:
        about = f"q {q.shape}, k {k.shape}, mask {None if mask is None else mask.shape}"
        kernels = fused(q, k, v, mask, enable_gqa)
        assert "efficient" in kernels, about
        if mask is None:
            assert dtype is torch.float32 or "flash" in kernels, about
        else:
            # Else every call would convert it or copy it (`preprocess_mask`).
            assert mask.dtype is q.dtype, about
            assert all(step % 8 == 0 for step in mask.stride()[:-1]), (about, mask.stride())


def test_a_mask_and_grouped_heads_leave_fp32_to_no_fused_kernel():
    q = torch.zeros(2, 4, 5, 64)
    k = torch.zeros(2, 2, 5, 64)
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    assert fused(q, k, k, mask, enable_gqa=True) == set()
    assert fused(*(x.bfloat16() for x in (q, k, k)), mask, enable_gqa=True) == {"cudnn"}
    assert fused(*(x.bfloat16() for x in (q, k, k)), enable_gqa=True) == {"flash", "cudnn"}
    assert fused(q, k.repeat(1, 2, 1, 1), k.repeat(1, 2, 1, 1), mask) == {"efficient"}


@pytest.mark.parametrize("rows", [1, 6])
def test_folded_groups_attend_as_torch_has_it(rows):
    """Bit for bit, with a mask that hides much of what there is."""
    torch.manual_seed(0)
    q = torch.randn(3, 4, 6, 16)
    k = torch.randn(3, 2, 11, 16)
    v = torch.randn(3, 2, 11, 16)
    see = torch.rand(3, rows, 11) > 0.5
    see[..., 0] = True
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=see[:, None], enable_gqa=True)
    mask = layers.additive(see, torch.float32, group=2)
    assert torch.equal(layers.attention(q, k, v, mask), want)


def test_what_kernels_of_cuda_return_lies_in_another_order(monkeypatch):
    """[n, S, heads, d] in memory, which grouped heads cannot be viewed through."""
    q, k, v = torch.randn(2, 8, 6, 16), torch.randn(2, 4, 5, 16), torch.randn(2, 4, 5, 16)
    expected = layers.attention(q, k, v)
    plain = F.scaled_dot_product_attention

    def as_on_cuda(*given, **named):
        return plain(*given, **named).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(F, "scaled_dot_product_attention", as_on_cuda)
    assert torch.equal(layers.attention(q, k, v), expected)
