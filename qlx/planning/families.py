"""What a model type has that its config.json does not say: names, norms, biases, what omitted fields stand for.

All of it is as transformers builds the model; a test holds every entry beside what it builds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

ATTENTION = ("q", "k", "v", "o")
MLP = ("gate", "up", "down")

JOINED: Mapping[str, tuple[str, ...]] = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
"""The roles of maps that are several in one matrix."""


@dataclass(frozen=True)
class Family:
    """A model type.

    Attributes:
        layers: name of the list of layers.
        linears: name in a layer of each linear map, by role: q, k, v, o, gate, up, down, or one of `JOINED`.
        norms: name in a layer of each norm, and what it is as wide as: "hidden", "inner" or "head".
        layer_norms: norms have biases.
        scales: name in a layer of vectors that its outputs are multiplied with.
        embedding, positions, patches, last_norm, head: names of modules beside the layers; "" where there is none.
        vectors: how many vectors the embeddings of a picture have beside one for each patch.
        biased: roles of maps that always have a bias.
        switches: roles of maps that have one where a field of config.json is true, by field.
        defaults: what fields stand for that config.json omits.
        sparse: layers have experts and a router in place of an MLP, where config.json names no others.
    """

    layers: str
    linears: Mapping[str, str]
    norms: Mapping[str, str]
    embedding: str = ""
    positions: str = ""
    patches: str = ""
    last_norm: str = ""
    head: str = "lm_head"
    layer_norms: bool = False
    scales: tuple[str, ...] = ()
    vectors: int = 0
    biased: tuple[str, ...] = ()
    switches: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    defaults: Mapping[str, object] = field(default_factory=dict)
    sparse: bool = False


_SELF_ATTENTION = {role: f"self_attn.{role}_proj" for role in ATTENTION}
_GATED = {role: f"mlp.{role}_proj" for role in MLP}
_TWO_NORMS = {"input_layernorm": "hidden", "post_attention_layernorm": "hidden"}
_FOUR_NORMS = {
    **_TWO_NORMS,
    "pre_feedforward_layernorm": "hidden",
    "post_feedforward_layernorm": "hidden",
}
_HEAD_NORMS = {"self_attn.q_norm": "head", "self_attn.k_norm": "head"}
_SWITCHED = {"attention_bias": ATTENTION}

_LLAMA = Family(
    layers="model.layers",
    linears={**_SELF_ATTENTION, **_GATED},
    norms=_TWO_NORMS,
    embedding="model.embed_tokens",
    last_norm="model.norm",
    switches={**_SWITCHED, "mlp_bias": MLP},
)
_GEMMA = replace(
    _LLAMA,
    switches=_SWITCHED,
    defaults={"num_key_value_heads": 16, "head_dim": 256, "tie_word_embeddings": True},
)
_GEMMA2 = replace(_GEMMA, norms=_FOUR_NORMS, defaults={**_GEMMA.defaults, "num_key_value_heads": 4})
_VIT = Family(
    layers="vit.layers",
    linears={
        **{role: f"attention.{role}_proj" for role in ATTENTION}, "up": "mlp.fc1", "down": "mlp.fc2"
    },
    norms={"layernorm_before": "hidden", "layernorm_after": "hidden"},
    layer_norms=True,
    positions="vit.embeddings",
    patches="vit.embeddings.patch_embeddings.projection",
    last_norm="vit.layernorm",
    head="classifier",
    vectors=2,
    biased=("o", "up", "down"),
    switches={"qkv_bias": ("q", "k", "v")},
    defaults={"qkv_bias": True, "intermediate_size": 3072},
)  # fmt: skip
_DINOV2 = replace(
    _VIT,
    layers="dinov2.encoder.layer",
    norms={"norm1": "hidden", "norm2": "hidden"},
    scales=("layer_scale1", "layer_scale2"),
    positions="dinov2.embeddings",
    patches="dinov2.embeddings.patch_embeddings.projection",
    last_norm="dinov2.layernorm",
    vectors=3,
    defaults={"qkv_bias": True, "mlp_ratio": 4},
)

FAMILIES: Mapping[str, Family] = {
    "llama": _LLAMA,
    "mistral": replace(_LLAMA, switches={}, defaults={"num_key_value_heads": 8}),
    "qwen2": replace(
        _LLAMA, switches={}, biased=("q", "k", "v"), defaults={"num_key_value_heads": 32}
    ),
    "qwen3": replace(
        _LLAMA,
        norms={**_TWO_NORMS, **_HEAD_NORMS},
        switches=_SWITCHED,
        defaults={"num_key_value_heads": 32, "head_dim": 128},
    ),
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": replace(_GEMMA2, norms={**_FOUR_NORMS, **_HEAD_NORMS}),
    "phi3": replace(
        _LLAMA,
        linears={
            "qkv": "self_attn.qkv_proj",
            "o": "self_attn.o_proj",
            "gate_up": "mlp.gate_up_proj",
            "down": "mlp.down_proj",
        },
        switches={},
    ),
    "bitnet": replace(
        _LLAMA,
        norms={**_TWO_NORMS, "self_attn.attn_sub_norm": "hidden", "mlp.ffn_sub_norm": "inner"},
        switches=_SWITCHED,
        defaults={"num_key_value_heads": 5},
    ),
    "mixtral": replace(
        _LLAMA,
        switches={},
        defaults={"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
        sparse=True,
    ),
    "qwen3_moe": replace(
        _LLAMA,
        norms={**_TWO_NORMS, **_HEAD_NORMS},
        switches=_SWITCHED,
        defaults={
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "decoder_sparse_step": 1,
        },
        sparse=True,
    ),
    "gpt2": Family(
        layers="transformer.h",
        linears={
            "qkv": "attn.c_attn",
            "o": "attn.c_proj",
            "up": "mlp.c_fc",
            "down": "mlp.c_proj",
        },
        norms={"ln_1": "hidden", "ln_2": "hidden"},
        layer_norms=True,
        embedding="transformer.wte",
        positions="transformer.wpe",
        last_norm="transformer.ln_f",
        biased=("qkv", "o", "up", "down"),
        defaults={"n_positions": 1024, "tie_word_embeddings": True, "mlp_ratio": 4},
    ),
    "opt": Family(
        layers="model.decoder.layers",
        linears={
            **_SELF_ATTENTION,
            "o": "self_attn.out_proj",
            "up": "fc1",
            "down": "fc2",
        },
        norms={"self_attn_layer_norm": "hidden", "final_layer_norm": "hidden"},
        layer_norms=True,
        embedding="model.decoder.embed_tokens",
        positions="model.decoder.embed_positions",
        last_norm="model.decoder.final_layer_norm",
        switches={"enable_bias": (*ATTENTION, "up", "down")},
        defaults={
            "enable_bias": True,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
        },
    ),
    "vit": _VIT,
    "deit": replace(
        _VIT,
        layers="deit.layers",
        positions="deit.embeddings",
        patches="deit.embeddings.patch_embeddings.projection",
        last_norm="deit.layernorm",
        vectors=4,
    ),
    "dinov2": _DINOV2,
    "dinov2 gated": replace(_DINOV2, linears={**_VIT.linears, **_GATED}, biased=("o", *MLP)),
    "vitpose": replace(
        _VIT,
        layers="backbone.encoder.layer",
        linears={
            "q": "attention.attention.query",
            "k": "attention.attention.key",
            "v": "attention.attention.value",
            "o": "attention.output.dense",
            "up": "mlp.fc1",
            "down": "mlp.fc2",
        },
        positions="backbone.embeddings",
        patches="backbone.embeddings.patch_embeddings.projection",
        last_norm="backbone.layernorm",
        head="head.conv",
        vectors=1,
        defaults={"qkv_bias": True, "mlp_ratio": 4},
    ),
}
"""By model type; a DINOv2 with a gated MLP (`use_swiglu_ffn`) is one of its own."""
