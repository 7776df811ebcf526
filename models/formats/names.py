"""Weight names as ordered rewrite rules.

    (r"vision\\.layers\\.(\\d+)\\.(fc.*)", r"encoder.layers.\\1.mlp.\\2")

A rule is a pattern of our parameter's name and their key, in which `\\1` … are the groups of the
pattern; a tuple of keys is concatenated, and None says that they have no such tensor. The first
rule whose pattern matches in full wins, so special cases stand before general ones.
"""

import re
from collections.abc import Iterable

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]


def rename(name: str, rules: Rules) -> tuple[str, ...]:
    """Finds their keys for our parameter; none where no rule knows it."""
    for pattern, keys in rules:
        if found := re.fullmatch(pattern, name):
            return tuple(map(found.expand, (keys,) if isinstance(keys, str) else keys or ()))
    return ()


def each(key: str, parts: Iterable[str]) -> tuple[str, ...]:
    """`key` once for every part (of a word: letter), which stands in the place of `*`."""
    return tuple(key.replace("*", part) for part in parts)


def siglip(tower: str) -> Rules:
    """Rules of SigLIP as Hugging Face names it, at `tower`."""
    layer = rf"{tower}.encoder.layers.\1"
    embeddings = f"{tower}.embeddings"
    return (
        (r"vision\.position_embedding", f"{embeddings}.position_embedding.weight"),
        (r"vision\.patch_embedding\.(.*)", rf"{embeddings}.patch_embedding.\1"),
        (r"vision\.post_layernorm\.(.*)", rf"{tower}.post_layernorm.\1"),
        (r"vision\.layers\.(\d+)\.qkv\.(.*)", each(rf"{layer}.self_attn.*_proj.\2", "qkv")),
        (r"vision\.layers\.(\d+)\.(out_proj.*)", rf"{layer}.self_attn.\2"),
        (r"vision\.layers\.(\d+)\.(fc.*)", rf"{layer}.mlp.\2"),
        (r"vision\.layers\.(\d+)\.(.*)", rf"{layer}.\2"),
    )
