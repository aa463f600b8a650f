"""Shapes of transformer models: from a config.json, a public model's name, or a parameter count."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from qlx.errors import Unsupported

ATTENTION = ("q", "k", "v", "o")
MLP = ("gate", "up", "down")

# Names that adapters use for their targets, by the part of the layer that each stands for.
ROLES_OF_TARGET: dict[str, tuple[str, ...]] = {
    "all-linear": (*ATTENTION, *MLP),
    "q_proj": ("q",),
    "k_proj": ("k",),
    "v_proj": ("v",),
    "o_proj": ("o",),
    "query": ("q",),
    "key": ("k",),
    "value": ("v",),
    "query_key_value": ("q", "k", "v"),
    "c_attn": ("q", "k", "v"),
    "c_proj": ("o", "down"),
    "dense": ("o", "up", "down"),
    "out_proj": ("o",),
    "gate_proj": ("gate",),
    "up_proj": ("up",),
    "down_proj": ("down",),
    "w1": ("gate",),
    "w2": ("up",),
    "c_fc": ("up",),
    "fc1": ("up",),
    "fc2": ("down",),
}


@dataclass(frozen=True)
class Shape:
    """The dimensions that memory depends on.

    Attributes:
        layers, hidden, intermediate: depth L, width h, inner width f of the MLP (one matrix of it).
        heads, kv_heads, head_dim: attention; queries are heads × head_dim wide, keys and values
            kv_heads × head_dim.
        vocab: rows of the token embedding; 0 for a vision model.
        tied: the output head shares the embedding.
        gated: the MLP has a gate matrix beside up and down (Llama); otherwise two matrices (ViT).
        outputs: classes of a classification head.
        other: parameters beside layers, token embedding and head (patch and position embeddings).
        tokens: fixed sequence length of a vision model; 0 where the caller chooses it.
    """

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int = 0
    tied: bool = False
    gated: bool = True
    outputs: int = 0
    other: int = 0
    tokens: int = 0

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(d_in, d_out) of each linear map of one layer, by role."""
        h, f, q, kv = (
            self.hidden,
            self.intermediate,
            self.heads * self.head_dim,
            self.kv_heads * self.head_dim,
        )
        maps = {"q": (h, q), "k": (h, kv), "v": (h, kv), "o": (q, h), "up": (h, f), "down": (f, h)}
        return {**maps, "gate": (h, f)} if self.gated else maps

    @property
    def linear_parameters(self) -> int:
        """Weights of all layers' linear maps: what quantization applies to."""
        return self.layers * sum(d_in * d_out for d_in, d_out in self.linears.values())

    @property
    def other_parameters(self) -> int:
        """Embeddings, head and norms (two vectors a layer and one at the end): never quantized."""
        tables = self.vocab * self.hidden * (1 if self.tied else 2) + self.outputs * self.hidden
        return tables + (2 * self.layers + 1) * self.hidden + self.other

    @property
    def parameters(self) -> int:
        """All parameters, biases left out (under 0.1 % of a model)."""
        return self.linear_parameters + self.other_parameters

    def adapter_parameters(self, rank: int, roles: tuple[str, ...]) -> int:
        """Parameters of LoRA at `rank` on `roles`: Σ r (d_in + d_out) (Hu et al. 2021, §4.2)."""
        return self.layers * sum(rank * sum(self.linears[r]) for r in roles if r in self.linears)

    def adapted_parameters(self, roles: tuple[str, ...]) -> int:
        """Weights of the layers that get an adapter on `roles`: Σ d_in d_out."""
        sizes = (self.linears[role] for role in roles if role in self.linears)
        return self.layers * sum(inputs * outputs for inputs, outputs in sizes)

    def vera_parameters(self, rank: int, roles: tuple[str, ...]) -> tuple[int, int]:
        """Parameters of VeRA that are trained, Σ (r + d_out), and those that all layers share.

        Kopiczko et al. 2024, §3.2; the shared matrices are as large as the largest of them needs.
        """
        sizes = [self.linears[role] for role in roles if role in self.linears]
        trained = self.layers * sum(rank + outputs for _, outputs in sizes)
        return trained, rank * sum(max(sides, default=0) for sides in zip(*sizes, strict=True))


def roles_of(targets: tuple[str, ...]) -> tuple[str, ...]:
    """The parts of a layer that target module names stand for, each once.

    Raises:
        Unsupported: a name that no known architecture uses.
    """
    roles: dict[str, None] = {}
    for target in targets:
        known = ROLES_OF_TARGET.get(target.rpartition(".")[2])
        if known is None:
            raise Unsupported(
                f"cannot plan for target module {target!r}: its size is not known; "
                f"known names are {', '.join(sorted(ROLES_OF_TARGET))}"
            )
        roles.update(dict.fromkeys(known))
    return tuple(roles)


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
    )


def _vit(name: str, layers: int, hidden: int, heads: int, patches: int, patch: int = 16) -> Shape:
    embeddings = 3 * patch * patch * hidden + (patches + 2) * hidden
    return Shape(
        name,
        layers,
        hidden,
        4 * hidden,
        heads,
        heads,
        hidden // heads,
        gated=False,
        outputs=1000,
        other=embeddings,
        tokens=patches + 1,
    )


# From each model's published config.json.
PUBLIC_SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        _lm("HuggingFaceTB/SmolLM2-135M", 30, 576, 1536, 9, 3, 49152, tied=True),
        _lm("Qwen/Qwen2.5-0.5B", 24, 896, 4864, 14, 2, 151936, tied=True),
        _lm("Qwen/Qwen3-0.6B", 28, 1024, 3072, 16, 8, 151936, tied=True, head_dim=128),
        _lm("TinyLlama/TinyLlama-1.1B", 22, 2048, 5632, 32, 4, 32000),
        _lm("meta-llama/Llama-3.2-1B", 16, 2048, 8192, 32, 8, 128256, tied=True),
        _lm("Qwen/Qwen2.5-1.5B", 28, 1536, 8960, 12, 2, 151936, tied=True),
        _lm("Qwen/Qwen3-1.7B", 28, 2048, 6144, 16, 8, 151936, tied=True),
        _lm("Qwen/Qwen-1.8B", 24, 2048, 5504, 16, 16, 151936),
        _lm("meta-llama/Llama-3.2-3B", 28, 3072, 8192, 24, 8, 128256, tied=True),
        _lm("Qwen/Qwen3-4B", 36, 2560, 9728, 32, 8, 151936, tied=True, head_dim=128),
        _lm("meta-llama/Llama-2-7b", 32, 4096, 11008, 32, 32, 32000),
        _lm("Qwen/Qwen2.5-7B", 28, 3584, 18944, 28, 4, 152064),
        _lm("Qwen/Qwen-7B", 32, 4096, 11008, 32, 32, 151936),
        _lm("meta-llama/Llama-3.1-8B", 32, 4096, 14336, 32, 8, 128256),
        _lm("meta-llama/Llama-2-13b", 40, 5120, 13824, 40, 40, 32000),
        _lm("Qwen/Qwen-14B", 40, 5120, 13696, 40, 40, 152064),
        _lm("Qwen/Qwen2.5-14B", 48, 5120, 13824, 40, 8, 152064),
        _lm("Qwen/Qwen2.5-32B", 64, 5120, 27648, 40, 8, 152064),
        _lm("huggyllama/llama-30b", 60, 6656, 17920, 52, 52, 32000),
        _lm("huggyllama/llama-65b", 80, 8192, 22016, 64, 64, 32000),
        _lm("meta-llama/Llama-3.1-70B", 80, 8192, 28672, 64, 8, 128256),
        _lm("Qwen/Qwen-72B", 80, 8192, 24576, 64, 64, 152064),
        _vit("google/vit-base-patch16-224", 12, 768, 12, 196),
        _vit("google/vit-base-patch16-224-in21k", 12, 768, 12, 196),
        _vit("google/vit-large-patch16-224", 24, 1024, 16, 196),
    )
}


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


def _field(config: Mapping[str, object], *names: str) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, (list, tuple)) and value:
            value = value[0]
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    raise Unsupported(f"there is no positive integer {' or '.join(names)}; this model is not known")


def shape_from_config(config: Mapping[str, object], name: str = "config.json") -> Shape:
    """The shape that a transformers config.json describes.

    Raises:
        Unsupported: a field that every known architecture has is missing; the message begins with `name`.
    """
    try:
        return _described_shape(config, name)
    except Unsupported as error:
        raise Unsupported(f"{name}: {error}") from error


def _described_shape(config: Mapping[str, object], name: str) -> Shape:
    backbone = config.get("backbone_config")  # ViTPose describes its ViT apart
    if isinstance(backbone, Mapping):
        config = {**backbone, "id2label": config.get("id2label"), "heatmaps": True}
    hidden = _field(config, "hidden_size", "n_embd")
    heads = _field(config, "num_attention_heads", "n_head")
    vision = "image_size" in config
    shape = Shape(
        name=name,
        layers=_field(config, "num_hidden_layers", "n_layer"),
        hidden=hidden,
        intermediate=_intermediate(config, hidden),
        heads=heads,
        kv_heads=_field({"kv": heads, **config}, "num_key_value_heads", "kv"),
        head_dim=_field({"dim": hidden // heads, **config}, "head_dim", "dim"),
        gated=not vision and config.get("model_type") != "gpt2",
    )
    return _with_image(shape, config) if vision else _with_vocabulary(shape, config)


def _intermediate(config: Mapping[str, object], hidden: int) -> int:
    ratio = config.get("mlp_ratio")  # DINOv2 states the ratio, GPT-2 nothing (then it is 4)
    default = int(hidden * ratio) if isinstance(ratio, (int, float)) else 4 * hidden
    return _field({"default": default, **config}, "intermediate_size", "n_inner", "default")


def _with_vocabulary(shape: Shape, config: Mapping[str, object]) -> Shape:
    tied = config.get("tie_word_embeddings", config.get("model_type") == "gpt2")
    return replace(shape, vocab=_field(config, "vocab_size"), tied=bool(tied))


def _area(size: object) -> int:
    sides = (size, size) if isinstance(size, int) else size
    if not isinstance(sides, (list, tuple)) or not all(isinstance(n, int) and n > 0 for n in sides):
        raise Unsupported(f"image_size or patch_size {size!r} is no size")
    return math.prod(sides)


def _with_image(shape: Shape, config: Mapping[str, object]) -> Shape:
    patch = _field(config, "patch_size")
    patches = _area(config["image_size"]) // _area(config["patch_size"])
    channels = _field({"rgb": 3, **config}, "num_channels", "rgb")
    labels, heatmaps = config.get("id2label"), "heatmaps" in config  # made by a 3×3 convolution
    return replace(
        shape,
        outputs=(len(labels) if isinstance(labels, Mapping) else 2) * (9 if heatmaps else 1),
        other=channels * patch * patch * shape.hidden + (patches + 2) * shape.hidden,
        tokens=patches + 1,
    )
