"""Shapes of transformer models: the modules with parameters that a config.json describes, and their sizes."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from qlx.errors import Unsupported
from qlx.planning.families import ATTENTION, FAMILIES, JOINED, MLP, Family

# Names that adapters use for their targets, by the part of the layer that each stands for.
ROLES_OF_TARGET: dict[str, tuple[str, ...]] = {
    "all-linear": (*ATTENTION, *MLP),
    "q_proj": ("q",),
    "k_proj": ("k",),
    "v_proj": ("v",),
    "o_proj": ("o",),
    "qkv_proj": ("q", "k", "v"),
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
    "gate_up_proj": ("gate", "up"),
    "down_proj": ("down",),
    "w1": ("gate",),
    "w2": ("up",),
    "c_fc": ("up",),
    "fc1": ("up",),
    "fc2": ("down",),
}
_EXPERTS = "mlp.experts"
_MOST_LAYERS = 10_000  # parts are counted one by one, and a config.json can say anything
_CLASSIC_WIDTH = 256  # of the deconvolutions, 4 × 4, in ViTPose's classic head


class Part(NamedTuple):
    """A module with parameters: its name, its weight's two sides, its biases.

    `role` is a linear map's part of a layer, "" for what is never quantized. A `shared` weight is another module's.
    """

    name: str
    inputs: int
    outputs: int
    biases: int = 0
    role: str = ""
    shared: bool = False

    @property
    def weights(self) -> int:
        """Parameters of its weight."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Shape:
    """The dimensions that memory depends on.

    Attributes:
        layers, hidden, intermediate: depth L, width h, inner width f of the MLP (one matrix of it).
        heads, kv_heads, head_dim: attention; queries are heads × head_dim wide, keys and values
            kv_heads × head_dim.
        vocab: rows of the token embedding; 0 for a vision model.
        tied: the output head shares the embedding.
        outputs: classes of a classification head, or keypoints.
        other: parameters beside those of the family's modules.
        tokens: fixed sequence length of a vision model; 0 where the caller chooses it.
        family: the model type, a key of `FAMILIES`: names of modules, and which there are.
        biased: roles of the linear maps that have biases.
        positions: vectors of learned positions and class tokens.
        patch: pixels times channels of a patch.
        head_width: inputs of the head, where not h; a language model's embedding is as wide.
        experts, experts_used, expert_width: experts of a layer, those that see one token, the inner width of one.
        dense: layers that have an MLP although the others have experts.
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
    outputs: int = 0
    other: int = 0
    tokens: int = 0
    family: str = "llama"
    biased: tuple[str, ...] = ()
    positions: int = 0
    patch: int = 0
    head_width: int = 0
    experts: int = 0
    experts_used: int = 0
    expert_width: int = 0
    dense: tuple[int, ...] = ()

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(d_in, d_out) of each linear map of one layer, by role; experts are none."""
        h, f, q, kv = (
            self.hidden,
            self.intermediate,
            self.heads * self.head_dim,
            self.kv_heads * self.head_dim,
        )
        sides = {
            "q": (h, q), "k": (h, kv), "v": (h, kv), "qkv": (h, q + 2 * kv), "o": (q, h),
            "gate": (h, f), "up": (h, f), "gate_up": (h, 2 * f), "down": (f, h),
        }  # fmt: skip
        without = () if self.dense or not self.experts else ("gate_up", *MLP)
        return {role: sides[role] for role in self._family.linears if role not in without}

    @property
    def _family(self) -> Family:
        return FAMILIES[self.family]

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate matrix beside up and down (Llama); otherwise it has two matrices (ViT)."""
        return not self._family.linears.keys().isdisjoint({"gate", "gate_up"})

    @property
    def sparse_layers(self) -> int:
        """How many layers have experts."""
        return self.layers - len(self.dense) if self.experts else 0

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """Every module with parameters, by the name that transformers gives it."""
        dense, sparse = tuple(self._layer(sparse=False)), tuple(self._layer(sparse=True))
        found, without = [], {*self.dense} if self.experts else range(self.layers)
        for at in range(self.layers):
            inside = dense if at in without else sparse
            stem = f"{self._family.layers}.{at}."
            found += [part._replace(name=stem + part.name) for part in inside]
        return (*found, *self._beside())

    def _layer(self, *, sparse: bool) -> Iterator[Part]:
        family, hidden = self._family, self.hidden
        for role, (inputs, outputs) in self.linears.items():
            if not (sparse and role in ("gate_up", *MLP)):
                biases = outputs if role in self.biased else 0
                yield Part(family.linears[role], inputs, outputs, biases, role)
        if sparse:
            yield Part("mlp.gate", hidden, self.experts)
            yield Part(_EXPERTS, 3 * hidden, self.experts * self.expert_width)
        widths = {"hidden": hidden, "inner": self.intermediate, "head": self.head_dim}
        for name, kind in family.norms.items():
            yield self._norm(name, widths[kind])
        yield from (Part(name, 1, hidden) for name in family.scales)

    def _norm(self, name: str, width: int) -> Part:
        return Part(name, 1, width, width if self._family.layer_norms else 0)

    def _beside(self) -> Iterator[Part]:
        """What is not in a layer."""
        family, hidden, width = self._family, self.hidden, self.head_width or self.hidden
        if self.vocab:
            yield Part(family.embedding, self.vocab, width)
        if self.positions:
            yield Part(family.positions, self.positions, hidden)
        if self.patch:
            yield Part(family.patches, self.patch, hidden, hidden)
        yield self._norm(family.last_norm, hidden)
        if self.vocab:
            yield Part(family.head, width, self.vocab, shared=self.tied)
        elif self.outputs:
            yield Part(family.head, width, self.outputs, self.outputs)

    @cached_property
    def linear_parameters(self) -> int:
        """Weights of all layers' linear maps: what quantization applies to."""
        return sum(part.weights for part in self.parts if part.role)

    @property
    def expert_parameters(self) -> int:
        """Weights of all experts, which lie stacked in one parameter of a layer and are not quantized."""
        return self.sparse_layers * 3 * self.hidden * self.experts * self.expert_width

    @property
    def other_parameters(self) -> int:
        """All others, never quantized: embeddings, head, norms, biases, routers and experts."""
        return self.parameters - self.linear_parameters

    @cached_property
    def parameters(self) -> int:
        """All parameters."""
        own = (part for part in self.parts if not part.shared)
        return self.other + sum(part.weights + part.biases for part in own)

    @property
    def table_parameters(self) -> int:
        """Weights of the token embedding, which are also the head's where it is tied."""
        return self.vocab * (self.head_width or self.hidden)

    def adapted(self, roles: tuple[str, ...]) -> Iterator[Part]:
        """The linear maps that an adapter on `roles` is for."""
        chosen = {role for role in self.linears if {*JOINED.get(role, (role,))} & {*roles}}
        return (part for part in self.parts if part.role in chosen)


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
        Unsupported: an architecture whose parts are not known, or a size is missing; the message begins with `name`.
    """
    try:
        return _described_shape(config, name)
    except Unsupported as error:
        raise Unsupported(f"{name}: {error}") from error


def _described_shape(config: Mapping[str, object], name: str) -> Shape:
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        raise Unsupported(
            f"model_type {kind!r} is not one whose parts are known to a plan; "
            "plan by size instead (qlx plan --params 7B)"
        )
    backbone = config.get("backbone_config")  # ViTPose describes its ViT apart
    if isinstance(backbone, Mapping):
        kept = ("id2label", "use_simple_decoder")
        config = {**backbone, **{key: config[key] for key in kept if key in config}}
    if kind == "dinov2" and config.get("use_swiglu_ffn"):
        kind = "dinov2 gated"
    family = FAMILIES[kind]
    config = {**family.defaults, **config}
    hidden = _field(config, "hidden_size", "n_embd")
    heads = _field(config, "num_attention_heads", "n_head")
    layers = _field(config, "num_hidden_layers", "n_layer")
    if layers > _MOST_LAYERS:
        raise Unsupported(f"{layers:,} layers are more than a plan counts ({_MOST_LAYERS:,})")
    switched = (roles for key, roles in family.switches.items() if config.get(key))
    shape = Shape(
        name=name,
        layers=layers,
        hidden=hidden,
        intermediate=_intermediate(config, hidden, family),
        heads=heads,
        kv_heads=_field({"kv": heads, **config}, "num_key_value_heads", "kv"),
        head_dim=_field({"dim": hidden // heads, **config}, "head_dim", "dim"),
        family=kind,
        biased=(*family.biased, *(role for roles in switched for role in roles)),
    )
    if family.sparse:
        shape = _with_experts(shape, config)
    return _with_image(shape, config) if family.patches else _with_vocabulary(shape, config)


def _intermediate(config: Mapping[str, object], hidden: int, family: Family) -> int:
    ratio = config.get("mlp_ratio")  # which DINOv2 and ViTPose state, and GPT-2 implies
    wide = {"intermediate_size": int(hidden * ratio)} if isinstance(ratio, (int, float)) else {}
    found = _field({**wide, **config}, "ffn_dim", "n_inner", "intermediate_size")
    # DINOv2 cuts its gated MLP to two thirds, and rounds up to a multiple of 8
    return (found * 2 // 3 + 7) // 8 * 8 if wide and "gate" in family.linears else found


def _with_experts(shape: Shape, config: Mapping[str, object]) -> Shape:
    """The shape with experts in place of the MLP, in all layers but those that config.json names."""
    step = _field({"every": 1, **config}, "decoder_sparse_step", "every")
    only = config.get("mlp_only_layers")
    named = only if isinstance(only, (list, tuple)) else ()
    return replace(
        shape,
        experts=_field(config, "num_local_experts", "num_experts"),
        experts_used=_field(config, "num_experts_per_tok"),
        expert_width=_field(config, "moe_intermediate_size", "intermediate_size"),
        dense=tuple(at for at in range(shape.layers) if at in named or (at + 1) % step),
    )


def _with_vocabulary(shape: Shape, config: Mapping[str, object]) -> Shape:
    width = _field({"h": shape.hidden, **config}, "word_embed_proj_dim", "h")  # OPT's
    narrow = width != shape.hidden
    positions = 0
    if FAMILIES[shape.family].positions:
        positions = _field(config, "n_positions", "max_position_embeddings")
        positions += 2 * (shape.family == "opt")  # which leaves the first two places free
    return replace(
        shape,
        vocab=_field(config, "vocab_size"),
        tied=bool(config.get("tie_word_embeddings")),
        positions=positions,
        head_width=width if narrow else 0,
        other=2 * width * shape.hidden if narrow else 0,  # from that width to h, and back
    )


def _area(size: object) -> int:
    sides = (size, size) if isinstance(size, int) else size
    if not isinstance(sides, (list, tuple)) or not all(isinstance(n, int) and n > 0 for n in sides):
        raise Unsupported(f"image_size or patch_size {size!r} is no size")
    return math.prod(sides)


def image_shape(shape: Shape, patches: int, pixels: int) -> Shape:
    """The shape with the embeddings of pictures of so many patches, each of `pixels` values."""
    vectors = FAMILIES[shape.family].vectors
    return replace(shape, positions=patches + vectors, patch=pixels, tokens=patches + 1)


def _with_image(shape: Shape, config: Mapping[str, object]) -> Shape:
    area = _area(config.get("patch_size"))
    patches = _area(config.get("image_size")) // area
    channels = _field({"rgb": 3, **config}, "num_channels", "rgb")
    labels = config.get("id2label")
    shape = image_shape(shape, patches, channels * area)
    width, other = _image_head(shape, config)
    outputs = len(labels) if isinstance(labels, Mapping) else 2
    return replace(shape, outputs=outputs, head_width=width, other=other)


def _image_head(shape: Shape, config: Mapping[str, object]) -> tuple[int, int]:
    """Inputs of a vision model's head, and parameters before it."""
    if shape.family == "vitpose" and config.get("use_simple_decoder", True):
        return 9 * shape.hidden, 0  # a 3 × 3 convolution
    if shape.family == "vitpose":
        wide = _CLASSIC_WIDTH
        return wide, 16 * wide * (shape.hidden + wide) + 4 * wide
    return shape.hidden * (2 if shape.family.startswith("dinov2") else 1), 0  # class token and mean
