"""What a training is set up to do, as far as memory depends on it, and how a base is stored."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from qlx.errors import UsageError
from qlx.planning.families import ATTENTION


@dataclass(frozen=True)
class WeightFormat:
    """How the layers' linear weights are stored.

    Attributes:
        code_bits: bits per weight in the packed codes.
        constant_bytes: bytes per weight of scales, zeros and second-level scales.
        group_size: weights that share a scale; 0 where there is none.
        double_quant: scales are themselves quantized.
    """

    name: str
    code_bits: float
    constant_bytes: float
    group_size: int = 0
    double_quant: bool = False

    @property
    def quantized(self) -> bool:
        """Whether weights are materialized before use."""
        return self.name not in ("float32", "bfloat16", "float16")


def weight_format(
    name: str,
    *,
    group_size: int = 64,
    double_quant: bool = False,
    scale_bytes: int = 2,
    symmetric: bool = False,
) -> WeightFormat:
    """The storage of `name`: float32, bfloat16, float16, nf4, fp4, int8, int4, int2 or ternary.

    NF4 and FP4 keep one fp32 scale a group, or with double quantization one byte a group and one
    fp32 scale for 256 groups (Dettmers et al. 2023, §3). int8, int4 and int2 keep a scale of `scale_bytes`
    and, unless they are symmetric, a zero point of one byte a group; ternary a scale a group.

    Raises:
        UsageError: a name outside that list.
    """
    floats = {"float32": 32, "bfloat16": 16, "float16": 16}
    integers = {"int8": 8, "int4": 4, "int2": 2, "ternary": 2}
    if name in floats:
        return WeightFormat(name, floats[name], 0.0)
    if name in ("nf4", "fp4"):
        scale = 1 + 4 / 256 if double_quant else 4
        return WeightFormat(name, 4, scale / group_size, group_size, double_quant)
    if name in integers:
        zero = 0 if symmetric or name == "ternary" else 1
        return WeightFormat(name, integers[name], (scale_bytes + zero) / group_size, group_size)
    raise UsageError(
        f"unknown weight format {name!r}: "
        "float32, bfloat16, float16, nf4, fp4, int8, int4, int2 and ternary are known"
    )


@dataclass(frozen=True)
class Setup:
    """What is trained, and how.

    Attributes:
        weights: storage of the linear weights.
        rank: rank of the adapter; 0 trains all parameters.
        adapter: "lora", "pissa" (a frozen half beside the trained one), "vera", "exact" (inside the rounding) or
            "fold" (inside the zero points).
        roles: parts of a layer that get an adapter.
        tokens, batch: sequence length T and sequences B of one step on one device.
        checkpointing: activations are recomputed layer by layer in the backward pass.
        optimizer: a recipe's `training.optimizer`: "adamw" keeps two fp32 moments.
        compute_bytes: width of activations and of unquantized weights, 2 (bf16, fp16) or 4 (fp32).
        made_bytes: width of a weight that is made from its codes; None: `compute_bytes`.
        trained_bytes: bytes kept per parameter of the adapter: 4 (fp32), or 6 (bf16 and an fp32 master).
        whole_bytes: width of the model's own weights that are trained, of their gradients and of each moment.
        attention_scores: the T × T scores are stored (no fused attention kernel).
        device: "cuda" or "cpu".
        offloaded: linear weights and experts wait off the device and are there one at a time.
        joined: adapters add into the base's outputs instead of beside them, as qlx trains LoRA.
        fused_loss: the loss of a language model is computed without its logits, as TRL does.
        saved: modules that are trained whole, by the ending of their names.
        new_tokens: how many tokens get rows of their own.
        bias: which biases are trained beside the adapter: "none", "lora_only" or "all".
        rank_pattern: other ranks by a regular expression for the name of a module or its ending.
        dora: each output of an adapted map has a magnitude that is trained.
        learned_scales: values that an exact adapter trains for each group of weights.
    """

    weights: WeightFormat = field(default_factory=lambda: weight_format("nf4", double_quant=True))
    rank: int = 16
    adapter: str = "lora"
    roles: tuple[str, ...] = ATTENTION
    tokens: int = 2048
    batch: int = 1
    checkpointing: bool = True
    optimizer: str = "adamw"
    compute_bytes: int = 2
    made_bytes: int | None = None
    trained_bytes: int = 4
    whole_bytes: int = 4
    attention_scores: bool = False
    device: str = "cuda"
    offloaded: bool = False
    joined: bool = False
    fused_loss: bool = False
    saved: tuple[str, ...] = ()
    new_tokens: int = 0
    bias: str = "none"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    dora: bool = False
    learned_scales: int = 0
