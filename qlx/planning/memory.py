"""The memory model: bytes of each part of a training, from a shape and a setup.

Sources: weights and constants from the storage layouts (bitsandbytes, grouped integers, packed
ternary); activations with checkpointing from the layer inputs kept, 2 L h T B bytes in bf16, and the
larger of two peaks: the logits (c_V V T B bytes: bf16 logits, their fp32 copy and its gradient) or
one layer recomputed (2 T B (8 h + 3 f)). c_V = 8 and the runtime's constant are fitted to the 24
QLoRA measurements published with Qwen 1.8B to 72B; docs/memory.md shows them beside this model.
Without checkpointing a gated layer keeps 2 T B (12 h + 4 f), on a GPU whose LoRA products are joined
2 T B (8.5 h + 4 f), a plain one 2 T B (8 h + 2 f). A loss that never builds the logits needs a tile of
them, and the gradient of the last hidden states in fp32. Where k experts of width f see a token, 3 f is k (3 f + 2 h),
and of frozen experts nothing else is kept.
"""

from dataclasses import dataclass, fields, replace

from qlx.errors import UsageError
from qlx.planning.public import shape_from_count
from qlx.planning.setup import Setup
from qlx.planning.shapes import Shape
from qlx.planning.trained import Trained, trained_parameters

LOGIT_BYTES = 8  # c_V: bytes per logit at the peak of the loss
LOGIT_TILE = (4096, 32768)  # positions and words that a fused loss looks at together
RUNTIME_BYTES = {  # context, kernels, libraries, allocator slack: both fitted, see docs/memory.md
    "cuda": 2.5e9,
    "cpu": 0.87e9,
}
OPTIMIZER_BYTES = {  # of an fp32 parameter; adafactor keeps sums of rows and columns, 4 / rank at most
    "adamw": 8,
    "adamw_8bit": 2,
    "paged_adamw_8bit": 2,
    "adafactor": 0.25,
    "sgd": 0,
}


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
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> float:
        """Peak bytes of the training."""
        return self.parts.total

    def fits(self, available: float) -> bool:
        """Whether the peak stays within `available` bytes."""
        return self.total <= available

    def to_json(self) -> dict[str, object]:
        """Plain values: bytes as integers, names as the attributes have them."""
        weights = self.setup.weights
        return {
            "shape": {
                **_plain(self.shape),
                "gated": self.shape.gated,
                "parameters": self.shape.parameters,
            },
            "setup": {
                **_plain(self.setup),
                "weights": weights.name,
                "group_size": weights.group_size,
                "double_quant": weights.double_quant,
            },
            "trained_parameters": self.trained_parameters,
            "parts": {f.name: round(getattr(self.parts, f.name)) for f in fields(self.parts)},
            "total": round(self.total),
            "activations_with_checkpointing": round(self.activations_with_checkpointing),
            "activations_without_checkpointing": round(self.activations_without),
            "notes": list(self.notes),
        }


def _plain(record: Shape | Setup) -> dict[str, object]:
    """The fields of a record, as JSON has them."""
    values = {f.name: getattr(record, f.name) for f in fields(record)}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def activation_bytes(shape: Shape, setup: Setup) -> float:
    """Peak bytes of activations of one step (see the module's docstring for the formula)."""
    positions = (shape.tokens or setup.tokens) * setup.batch
    outputs = _logit_bytes(shape, setup, positions) + LOGIT_BYTES * shape.outputs * setup.batch
    sparse = shape.sparse_layers
    counts = {True: sparse, False: shape.layers - sparse}
    layers = {kind: _layer_bytes(shape, setup, sparse=kind) for kind in counts if counts[kind]}
    if setup.checkpointing:
        largest = max(recomputed for recomputed, _ in layers.values())
        kept = setup.compute_bytes * shape.layers * shape.hidden * positions
        return kept + max(outputs, largest)
    return sum(counts[kind] * kept for kind, (_, kept) in layers.items()) + outputs


def _layer_bytes(shape: Shape, setup: Setup, *, sparse: bool) -> tuple[float, float]:
    """Bytes of one layer recomputed, and of what it keeps for the backward pass."""
    width = setup.compute_bytes
    positions = (shape.tokens or setup.tokens) * setup.batch
    inner = shape.experts_used * shape.expert_width if sparse else shape.intermediate
    mlp = (3 if shape.gated else 2) * inner
    if sparse:  # each of a token's experts takes a row of its own, and gives one
        mlp += 2 * shape.experts_used * shape.hidden
    layer = width * positions * (8 * shape.hidden + mlp)
    kept: float = layer  # of a plain MLP
    if shape.gated:
        # norms' inputs in fp32, rotated heads, the MLP's product; unless joined, what LoRA takes and gives once more.
        # CPUs' allocators keep what is freed.
        more = 0.5 if setup.joined and setup.device == "cuda" else 4
        product = (
            0 if sparse and setup.rank else inner
        )  # which only a map that is trained looks at again
        kept += width * positions * (more * shape.hidden + product)
    scores = 2 * width * shape.heads * positions * (shape.tokens or setup.tokens)
    return (layer + scores, kept + scores) if setup.attention_scores else (layer, kept)


def _logit_bytes(shape: Shape, setup: Setup, positions: int) -> float:
    """Peak bytes of a language model's loss."""
    if not setup.fused_loss or not shape.vocab:
        return LOGIT_BYTES * shape.vocab * positions
    tile = min(positions, LOGIT_TILE[0]) * min(shape.vocab, LOGIT_TILE[1])
    return setup.compute_bytes * tile + positions * shape.hidden * (4 + 2 * setup.compute_bytes)


def _made_bytes(setup: Setup) -> int:
    """Bytes of one value of a weight while it is made: as it is computed with, or with what moves its codes.

    Those are the correction in float64 and float32, its place, code and value, and their gradients.
    """
    if setup.adapter in ("exact", "fold"):
        return 32
    return setup.made_bytes or setup.compute_bytes


def _optimizer_bytes(trained: Trained, setup: Setup) -> float:
    """Bytes of the optimizer's state.

    Torch's Adam keeps its moments in the dtype of the parameter. transformers asks bitsandbytes for the moments
    of an embedding in fp32, whatever those of the rest are in.
    """
    per = OPTIMIZER_BYTES[setup.optimizer]
    whole = per * setup.whole_bytes / 4 if setup.optimizer == "adamw" else per
    state = trained.added * per + (trained.whole + trained.biases) * whole
    if setup.optimizer.endswith("8bit"):
        state += trained.table * (OPTIMIZER_BYTES["adamw"] - per)
    return state


def _frozen_bytes(shape: Shape, setup: Setup) -> float:
    """Bytes of the base's weights that are on the device, scales and zeros left out."""
    width, code = setup.compute_bytes, setup.weights.code_bits / 8
    if not setup.offloaded:
        return shape.linear_parameters * code + shape.other_parameters * width
    experts = shape.expert_parameters / max(shape.sparse_layers, 1)
    stay = shape.other_parameters - shape.expert_parameters
    return max(_largest(shape) * code, experts * width) + stay * width


def _largest(shape: Shape) -> int:
    return max(d_in * d_out for d_in, d_out in shape.linears.values())


def plan_shape(shape: Shape, setup: Setup) -> Plan:
    """The plan of training `shape` as `setup` says."""
    full, trained = setup.rank == 0, trained_parameters(shape, setup)
    materialized = setup.weights.quantized and not full
    whole = trained.whole * setup.whole_bytes
    adapter = (trained.added * setup.trained_bytes, trained.frozen * 4, whole)
    parts = Parts(
        weights=whole if full else _frozen_bytes(shape, setup),
        constants=0 if full else shape.linear_parameters * setup.weights.constant_bytes,
        adapter=0 if full else sum(adapter),
        gradients=trained.added * 4 + (trained.whole + trained.biases) * setup.whole_bytes,
        optimizer=_optimizer_bytes(trained, setup),
        activations=activation_bytes(shape, setup),
        dequantized_layer=_largest(shape) * _made_bytes(setup) if materialized else 0,
        runtime=RUNTIME_BYTES[setup.device],
    )
    return Plan(
        shape=shape,
        setup=setup,
        trained_parameters=trained.count,
        parts=parts,
        activations_with_checkpointing=activation_bytes(shape, replace(setup, checkpointing=True)),
        activations_without=activation_bytes(shape, replace(setup, checkpointing=False)),
        notes=trained.notes,
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
