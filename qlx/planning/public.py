"""Shapes of public models, and the shape of a model of which only the parameter count is known."""

import math
from dataclasses import replace

from qlx.errors import Unsupported
from qlx.planning.shapes import Shape, image_shape


def _lm(
    name: str,
    layers: int,
    hidden: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    *,
    tied: bool = False,
    head_dim: int = 0,
    family: str = "llama",
) -> Shape:
    return Shape(
        name,
        layers,
        hidden,
        intermediate,
        heads,
        kv_heads,
        head_dim or hidden // heads,
        vocab,
        tied,
        family=family,
        biased=("q", "k", "v") if family == "qwen2" else (),
    )


def _vit(name: str, layers: int, hidden: int, heads: int, patches: int, patch: int = 16) -> Shape:
    shape = Shape(
        name,
        layers,
        hidden,
        4 * hidden,
        heads,
        heads,
        hidden // heads,
        family="vit",
        biased=("q", "k", "v", "o", "up", "down"),
        outputs=1000,
    )
    return image_shape(shape, patches, 3 * patch * patch)


# From each model's published config.json.
PUBLIC_SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        _lm("HuggingFaceTB/SmolLM2-135M", 30, 576, 1536, 9, 3, 49152, tied=True),
        _lm("Qwen/Qwen2.5-0.5B", 24, 896, 4864, 14, 2, 151936, tied=True, family="qwen2"),
        _lm("Qwen/Qwen3-0.6B", 28, 1024, 3072, 16, 8, 151936, tied=True, head_dim=128, family="qwen3"),
        _lm("TinyLlama/TinyLlama-1.1B", 22, 2048, 5632, 32, 4, 32000),
        _lm("meta-llama/Llama-3.2-1B", 16, 2048, 8192, 32, 8, 128256, tied=True),
        _lm("Qwen/Qwen2.5-1.5B", 28, 1536, 8960, 12, 2, 151936, tied=True, family="qwen2"),
        _lm("Qwen/Qwen3-1.7B", 28, 2048, 6144, 16, 8, 151936, tied=True, family="qwen3"),
        _lm("Qwen/Qwen-1.8B", 24, 2048, 5504, 16, 16, 151936),
        _lm("meta-llama/Llama-3.2-3B", 28, 3072, 8192, 24, 8, 128256, tied=True),
        _lm("Qwen/Qwen3-4B", 36, 2560, 9728, 32, 8, 151936, tied=True, head_dim=128, family="qwen3"),
        _lm("meta-llama/Llama-2-7b", 32, 4096, 11008, 32, 32, 32000),
        _lm("Qwen/Qwen2.5-7B", 28, 3584, 18944, 28, 4, 152064, family="qwen2"),
        _lm("Qwen/Qwen-7B", 32, 4096, 11008, 32, 32, 151936),
        _lm("meta-llama/Llama-3.1-8B", 32, 4096, 14336, 32, 8, 128256),
        _lm("meta-llama/Llama-2-13b", 40, 5120, 13824, 40, 40, 32000),
        _lm("Qwen/Qwen-14B", 40, 5120, 13696, 40, 40, 152064),
        _lm("Qwen/Qwen2.5-14B", 48, 5120, 13824, 40, 8, 152064, family="qwen2"),
        _lm("Qwen/Qwen2.5-32B", 64, 5120, 27648, 40, 8, 152064, family="qwen2"),
        _lm("huggyllama/llama-30b", 60, 6656, 17920, 52, 52, 32000),
        _lm("huggyllama/llama-65b", 80, 8192, 22016, 64, 64, 32000),
        _lm("meta-llama/Llama-3.1-70B", 80, 8192, 28672, 64, 8, 128256),
        _lm("Qwen/Qwen-72B", 80, 8192, 24576, 64, 64, 152064),
        _vit("google/vit-base-patch16-224", 12, 768, 12, 196),
        _vit("google/vit-base-patch16-224-in21k", 12, 768, 12, 196),
        _vit("google/vit-large-patch16-224", 24, 1024, 16, 196),
    )
}  # fmt: skip


def shape_from_count(count: int) -> Shape:
    """The shape of a causal language model of about `count` parameters.

    A public model within 5 % is taken as it is. Otherwise layers, width and vocabulary lie between
    the two neighbours on a logarithmic scale, and the MLP's width is what makes the count come out.

    Raises:
        Unsupported: outside the range of the public models (100 M to 80 B).
    """
    known = sorted((s for s in PUBLIC_SHAPES.values() if s.vocab), key=lambda s: s.parameters)
    nearest = min(known, key=lambda s: abs(math.log(s.parameters / count)))
    if abs(nearest.parameters / count - 1) <= 0.05:
        return nearest
    if not 1e8 <= count <= 8e10:
        raise Unsupported(
            f"no public model is near {count:,} parameters (100M to 80B are known); "
            "plan a recipe whose base has a config.json instead"
        )
    below = max((s for s in known if s.parameters < count), default=known[0], key=_size)
    above = min((s for s in known if s.parameters > count), default=known[-1], key=_size)
    return _between(below, above, count)


def _size(shape: Shape) -> int:
    return shape.parameters


def _between(below: Shape, above: Shape, count: int) -> Shape:
    span = math.log(above.parameters / below.parameters)
    weight = math.log(count / below.parameters) / span if span else 0.0

    def mix(low: int, high: int, multiple: int) -> int:
        value = math.exp((1 - weight) * math.log(low) + weight * math.log(high))
        return max(multiple, multiple * round(value / multiple))

    closer = below if weight < 0.5 else above
    hidden = mix(below.hidden, above.hidden, 128)
    heads = max(1, hidden // closer.head_dim)
    guess = replace(
        closer,
        name=f"between {below.name} and {above.name}",
        layers=mix(below.layers, above.layers, 1),
        hidden=hidden,
        heads=heads,
        kv_heads=max(1, heads * closer.kv_heads // closer.heads),
        intermediate=0,
    )
    missing = max(0, count - guess.parameters)
    return replace(guess, intermediate=max(128, round(missing / (3 * hidden * guess.layers))))
