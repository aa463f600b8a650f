"""The memory model: bytes of each part of a training, from a shape and a setup.

Sources: weights and constants from the storage layouts (bitsandbytes, grouped integers, packed
ternary); activations with checkpointing from the layer inputs kept, 2 L h T B bytes in bf16, and the
larger of two peaks: the logits (c_V V T B bytes: bf16 logits, their fp32 copy and its gradient) or
one layer recomputed (2 T B (8 h + 3 f)). c_V = 8 and the runtime's constant are fitted to the 24
QLoRA measurements published with Qwen 1.8B to 72B; docs/memory.md shows them beside this model.
Without checkpointing a gated layer keeps 2 T B (12 h + 4 f), on a GPU whose LoRA products are joined
2 T B (8.5 h + 4 f), a plain one 2 T B (8 h + 2 f). A loss that never builds the logits needs a tile of
them, and the gradient of the last hidden states in fp32.
"""

from dataclasses import dataclass, field, fields, replace

from qlx.errors import UsageError
from qlx.planning.shapes import ATTENTION, Shape, shape_from_count

LOGIT_BYTES = 8  # c_V: bytes per logit at the peak of the loss
LOGIT_TILE = (4096, 32768)  # positions and words that a fused loss looks at together
RUNTIME_BYTES = {  # context, kernels, libraries, allocator slack: both fitted, see docs/memory.md
    "cuda": 2.5e9,
    "cpu": 0.87e9,
}
OPTIMIZER_BYTES = {  # by training.optimizer; adafactor keeps sums of rows and columns, 4 / rank at most
    "adamw": 8,
    "adamw_8bit": 2,
    "paged_adamw_8bit": 2,
    "adafactor": 0.25,
    "sgd": 0,
}


@dataclass(frozen=True)
class WeightFormat:
    """How the layers' linear weights are stored.

    Attributes:
        code_bits: bits per weight in the packed codes.
        constant_bytes: bytes per weight of scales, zeros and second-level scales.
    """

    name: str
    code_bits: float
    constant_bytes: float

    @property
    def quantized(self) -> bool:
        """Whether weights are materialized before use."""
        return self.name not in ("float32", "bfloat16", "float16")


def weight_format(
    name: str, *, group_size: int = 64, double_quant: bool = False, scale_bytes: int = 2
) -> WeightFormat:
    """The storage of `name`: float32, bfloat16, float16, nf4, fp4, int8, int4, int2 or ternary.

    NF4 and FP4 keep one fp32 scale a group, or with double quantization one byte a group and one
    fp32 scale for 256 groups (Dettmers et al. 2023, §3). int8, int4 and int2 keep a scale of `scale_bytes`
    and a zero of the codes' width a group; ternary a scale a group.

    Raises:
        UsageError: a name outside that list.
    """
    floats = {"float32": 32, "bfloat16": 16, "float16": 16}
    integers = {"int8": 8, "int4": 4, "int2": 2}
    if name in floats:
        return WeightFormat(name, floats[name], 0.0)
    if name in ("nf4", "fp4"):
        scale = 1 + 4 / 256 if double_quant else 4
        return WeightFormat(name, 4, scale / group_size)
    if name in integers:
        return WeightFormat(name, integers[name], (scale_bytes + integers[name] / 8) / group_size)
    if name == "ternary":
        return WeightFormat(name, 2, scale_bytes / group_size)
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
        adapter: "lora", "pissa" (a frozen half beside the trained one), "vera" or "exact" (inside the rounding).
        roles: parts of a layer that get an adapter.
        tokens, batch: sequence length T and sequences B of one step on one device.
        checkpointing: activations are recomputed layer by layer in the backward pass.
        optimizer: a recipe's `training.optimizer`: "adamw" keeps two fp32 moments.
        compute_bytes: width of activations and of unquantized weights, 2 (bf16, fp16) or 4 (fp32).
        trained_bytes: bytes kept per trained parameter: 4 (fp32), or 6 (bf16 and an fp32 master).
        attention_scores: the T × T scores are stored (no fused attention kernel).
        device: "cuda" or "cpu".
        offloaded: linear weights wait off the device and are there one at a time.
        joined: adapters add into the base's outputs instead of beside them, as qlx trains LoRA.
        fused_loss: the loss of a language model is computed without its logits, as TRL does.
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
    trained_bytes: int = 4
    attention_scores: bool = False
    device: str = "cuda"
    offloaded: bool = False
    joined: bool = False
    fused_loss: bool = False


@dataclass(frozen=True)
class Parts:
    """Bytes of each part; their sum is the peak."""

    weights: float
    constants: float
    adapter: float
    gradients: float
    optimizer: float
    activations: float
    dequantized_layer: float
    runtime: float

    @property
    def total(self) -> float:
        """Peak bytes."""
        return float(sum(getattr(self, part.name) for part in fields(self)))


@dataclass(frozen=True)
class Plan:
    """A shape, a setup, and the memory that they need together."""

    shape: Shape
    setup: Setup
    trained_parameters: int
    parts: Parts
    activations_with_checkpointing: float
    activations_without: float

    @property
    def total(self) -> float:
        """Peak bytes of the training."""
        return self.parts.total

    def fits(self, available: float) -> bool:
        """Whether the peak stays within `available` bytes."""
        return self.total <= available

    def to_json(self) -> dict[str, object]:
        """Plain values: bytes as integers, names as the attributes have them."""
        setup = {f.name: getattr(self.setup, f.name) for f in fields(self.setup)}
        return {
            "shape": {
                **{f.name: getattr(self.shape, f.name) for f in fields(self.shape)},
                "parameters": self.shape.parameters,
            },
            "setup": {**setup, "weights": self.setup.weights.name, "roles": list(self.setup.roles)},
            "trained_parameters": self.trained_parameters,
            "parts": {f.name: round(getattr(self.parts, f.name)) for f in fields(self.parts)},
            "total": round(self.total),
            "activations_with_checkpointing": round(self.activations_with_checkpointing),
            "activations_without_checkpointing": round(self.activations_without),
        }


def activation_bytes(shape: Shape, setup: Setup) -> float:
    """Peak bytes of activations of one step (see the module's docstring for the formula)."""
    width = setup.compute_bytes
    positions = (shape.tokens or setup.tokens) * setup.batch
    outputs = _logit_bytes(shape, setup, positions) + LOGIT_BYTES * shape.outputs * setup.batch
    mlp = (3 if shape.gated else 2) * shape.intermediate
    layer = width * positions * (8 * shape.hidden + mlp)
    kept: float = layer  # of a plain MLP
    if shape.gated:
        # norms' inputs in fp32, rotated heads, the MLP's product; unless joined, what LoRA takes and gives once more.
        # CPUs' allocators keep what is freed.
        more = 0.5 if setup.joined and setup.device == "cuda" else 4
        kept += width * positions * (more * shape.hidden + shape.intermediate)
    scores = 2 * width * shape.heads * positions * (shape.tokens or setup.tokens)
    if setup.attention_scores:
        layer, kept = layer + scores, kept + scores
    if setup.checkpointing:
        return width * shape.layers * shape.hidden * positions + max(outputs, layer)
    return shape.layers * kept + outputs


def _logit_bytes(shape: Shape, setup: Setup, positions: int) -> float:
    """Peak bytes of a language model's loss."""
    if not setup.fused_loss or not shape.vocab:
        return LOGIT_BYTES * shape.vocab * positions
    tile = min(positions, LOGIT_TILE[0]) * min(shape.vocab, LOGIT_TILE[1])
    return setup.compute_bytes * tile + positions * shape.hidden * (4 + 2 * setup.compute_bytes)


def adapter_parameters(shape: Shape, setup: Setup) -> tuple[int, int]:
    """Parameters of the adapter that are trained, and fp32 ones of it that are frozen."""
    if setup.adapter == "vera":
        return shape.vera_parameters(setup.rank, setup.roles)
    trained = shape.adapter_parameters(setup.rank, setup.roles)
    if setup.adapter == "exact":  # the fraction of each adapted weight takes a byte
        return trained, shape.adapted_parameters(setup.roles) // 4
    return trained, trained if setup.adapter == "pissa" else 0


def _made_bytes(setup: Setup) -> int:
    """Bytes of one value of a weight while it is made: as it is computed with, or with what moves its codes.

    Those are the correction in float64 and float32, its place, code and value, and their gradients.
    """
    return 32 if setup.adapter == "exact" else setup.compute_bytes


def plan_shape(shape: Shape, setup: Setup) -> Plan:
    """The plan of training `shape` as `setup` says."""
    full = setup.rank == 0
    trained, beside = (shape.parameters, 0) if full else adapter_parameters(shape, setup)
    frozen_linear = 0 if full else shape.linear_parameters
    frozen_other = 0 if full else shape.other_parameters
    largest = max(d_in * d_out for d_in, d_out in shape.linears.values())
    materialized = setup.weights.quantized and not full
    kept = trained * setup.trained_bytes
    present = largest if setup.offloaded and not full else frozen_linear
    frozen = present * setup.weights.code_bits / 8 + frozen_other * setup.compute_bytes
    parts = Parts(
        weights=kept if full else frozen,
        constants=frozen_linear * setup.weights.constant_bytes,
        adapter=0 if full else kept + beside * 4,
        gradients=trained * 4,
        optimizer=trained * OPTIMIZER_BYTES[setup.optimizer],
        activations=activation_bytes(shape, setup),
        dequantized_layer=largest * _made_bytes(setup) if materialized else 0,
        runtime=RUNTIME_BYTES[setup.device],
    )
    return Plan(
        shape=shape,
        setup=setup,
        trained_parameters=trained,
        parts=parts,
        activations_with_checkpointing=activation_bytes(shape, replace(setup, checkpointing=True)),
        activations_without=activation_bytes(shape, replace(setup, checkpointing=False)),
    )


def check_rank(shape: Shape, rank: int) -> None:
    """Refuse a rank that no matrix of the shape has; such an adapter is larger than what it changes.

    Raises:
        UsageError: it is above the full rank of every linear map.
    """
    full = max(min(sizes) for sizes in shape.linears.values())
    if rank > full:
        raise UsageError(
            f"rank {rank} is more than any matrix of {shape.name} has ({full}); give a smaller --rank"
        )


def plan_size(parameters: int, setup: Setup | None = None) -> Plan:
    """The plan of a causal language model of about `parameters` parameters.

    Raises:
        Unsupported: no public model is near that size.
    """
    return plan_shape(shape_from_count(parameters), setup or Setup())
