"""The merge matrix: every feature of LoRA adapters on every kind of base, and what becomes of it.

The table here is the expectation; `run` makes one cell for real with PEFT, as other people make
adapters: PEFT attaches, saves and, unmerged, computes the probe. The oracle takes PEFT's layers
apart in float64 and writes them through transformers' own save, so it shares no code with qlx.

`python -m tests.merging.matrix` writes docs/merge-matrix.md from the table.
"""

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qlx.adapters import METHODS, PRUNING, adapter_spec
from qlx.checkpoint import (
    Checkpoint,
    Manifest,
    ProbeRecord,
    new_checkpoint,
    next_step,
    open_checkpoint,
    resolve_source,
    seal,
    write_probe,
)
from qlx.errors import Unsupported
from qlx.merging.through_peft import KINDS as KINDS_THROUGH_PEFT
from qlx.merging.through_peft import NOT_MERGEABLE
from qlx.models import load_base, make_probe, tensor_names
from qlx.weights import read_tensors
from tests.adapter_support import TASKS, VOCABULARY, draw, inputs_for

DOCUMENT = Path(__file__).parents[2] / "docs" / "merge-matrix.md"
KINDS = {
    "vit": "ViT",
    "vitpose": "ViTPose",
    "llama": "Llama",
    "qwen3": "Qwen3",
    "gpt2": "GPT-2",
    "qwen3_moe": "Qwen3-MoE",
    "mixtral": "Mixtral",
}
LANGUAGE = tuple(kind for kind in KINDS if not kind.startswith("vit"))
UNTIED = tuple(kind for kind in LANGUAGE if kind != "gpt2")
EXPERTS = ("qwen3_moe", "mixtral")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIGNIFICANT = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}
EPS = 2.0**-23
NEW_TOKENS = 4

TARGETS = {kind: ["q_proj", "v_proj"] for kind in KINDS} | {
    "vit": ["q_proj", "fc1"],
    "vitpose": ["query", "fc1"],
    "gpt2": ["c_attn", "c_proj"],
}
SQUARE = dict.fromkeys(KINDS, "q_proj") | {"gpt2": "c_proj", "vitpose": "query"}
EMBEDDING = dict.fromkeys(LANGUAGE, "embed_tokens") | {"gpt2": "wte"}
HEADS = dict.fromkeys(LANGUAGE, "lm_head") | {"vit": "classifier", "vitpose": "head.conv"}
NORMS = dict.fromkeys(LANGUAGE, "model.norm") | {
    "gpt2": "ln_f",
    "vit": "vit.layernorm",
    "vitpose": "backbone.layernorm",
}


@dataclass(frozen=True)
class Refused:
    """A cell that merge must refuse: the error and words of its message."""

    reason: str
    error: type[Exception] = Unsupported


@dataclass(frozen=True)
class Feature:
    """A row of the matrix.

    `peft` gives the fields of a LoraConfig by kind of base, for all kinds where the row applies.
    `refused` is for some kinds or, under "*", for all. `edit` changes adapter_config.json after
    saving; `tied` takes a base with tied embeddings, `resized` one with new tokens; `convert` saves
    through PEFT's conversion of an initialisation that changed the base.
    """

    name: str
    peft: dict[str, dict[str, Any]]
    note: str = ""
    refused: dict[str, Refused] = field(default_factory=dict)
    edit: dict[str, Any] = field(default_factory=dict)
    tied: bool = False
    resized: bool = False
    convert: bool = False

    def expected(self, kind: str) -> Refused | None:
        """The refusal that is due for a kind of base, None if the merge must be exact."""
        return self.refused.get(kind) or self.refused.get("*")


def every(kinds=tuple(KINDS), **options):
    """The same LoraConfig fields for several kinds, on each kind's usual targets."""
    return {kind: {"target_modules": TARGETS[kind], **options} for kind in kinds}


def edited(name: str, value: Any, reason: str) -> Feature:
    """A feature that is refused by its field in adapter_config.json."""
    label = f"`{name}: {value}`" if isinstance(value, str) else f"`{name}`"
    return Feature(label, every(), edit={name: value}, refused={"*": Refused(reason)})


NO_BIAS = dict.fromkeys(UNTIED, Refused("adds a bias, but the base has none"))

FEATURES = (
    Feature("LoRA", every()),
    Feature("rsLoRA", every(use_rslora=True)),
    Feature("DoRA", every(use_dora=True)),
    Feature("DoRA with rsLoRA", every(use_dora=True, use_rslora=True)),
    Feature(
        "`rank_pattern`",
        {k: o | {"rank_pattern": {o["target_modules"][0]: 7}} for k, o in every().items()},
    ),
    Feature(
        "`alpha_pattern`",
        {k: o | {"alpha_pattern": {o["target_modules"][1]: 21}} for k, o in every().items()},
    ),
    Feature(
        "`lora_bias`",
        every(lora_bias=True),
        refused=NO_BIAS,
        note="needs a bias in the base to be added to",
    ),
    Feature("`bias: all`", every(bias="all")),
    Feature("`bias: lora_only`", every(bias="lora_only")),
    Feature(
        "`fan_in_fan_out`, as given or not",
        {k: {"target_modules": [SQUARE[k]], "fan_in_fan_out": k != "gpt2"} for k in KINDS},
        note="the flag is not trusted: which layers are stored transposed follows from the model",
    ),
    Feature(
        "transposed and plain layers together",
        {"gpt2": {"target_modules": ["c_proj", "lm_head"]}},
        note="PEFT saves the flag of whichever layer came last",
    ),
    Feature(
        "convolution (patch embedding, heatmap head)",
        {
            "vit": {"target_modules": ["projection", "v_proj"]},
            "vitpose": {"target_modules": ["projection", "head.conv", "value"]},
        },
    ),
    Feature(
        "convolution with DoRA",
        {k: {"target_modules": ["projection"], "use_dora": True} for k in ("vit", "vitpose")},
    ),
    Feature("embedding", {k: {"target_modules": [EMBEDDING[k], TARGETS[k][0]]} for k in UNTIED}),
    Feature(
        "embedding with DoRA",
        {k: {"target_modules": [EMBEDDING[k]], "use_dora": True} for k in UNTIED},
    ),
    Feature("position embedding", {"gpt2": {"target_modules": ["wpe", "c_attn"]}}),
    Feature("head", {k: {"target_modules": [HEADS[k], TARGETS[k][0]]} for k in (*UNTIED, "vit")}),
    Feature(
        "`modules_to_save`: head and norm",
        {
            k: {"target_modules": TARGETS[k], "modules_to_save": [HEADS[k], NORMS[k]]}
            for k in (*UNTIED, "vit", "vitpose")
        },
    ),
    Feature(
        "`modules_to_save`: embedding",
        {k: {"target_modules": TARGETS[k], "modules_to_save": [EMBEDDING[k]]} for k in UNTIED},
    ),
    Feature("trained tokens", every(UNTIED, trainable_token_indices=[3, 90, 7])),
    Feature(
        "trained tokens, embedding and head",
        every(UNTIED, trainable_token_indices={"embed_tokens": [3, 7], "lm_head": [5]}),
    ),
    Feature(
        "tied: embedding",
        {k: {"target_modules": [EMBEDDING[k], TARGETS[k][0]]} for k in LANGUAGE},
        tied=True,
        note="PEFT's update reaches one side only, so the merged model is untied",
    ),
    Feature(
        "tied: head",
        {k: {"target_modules": ["lm_head", TARGETS[k][0]]} for k in LANGUAGE},
        tied=True,
        note="untied",
    ),
    Feature(
        "tied: embedding and head",
        {k: {"target_modules": ["lm_head", EMBEDDING[k]]} for k in LANGUAGE},
        tied=True,
        note="untied",
    ),
    Feature(
        "tied: `modules_to_save` embedding",
        {k: {"target_modules": TARGETS[k], "modules_to_save": [EMBEDDING[k]]} for k in LANGUAGE},
        tied=True,
        note="untied",
    ),
    Feature(
        "tied: `modules_to_save` head",
        every(LANGUAGE, modules_to_save=["lm_head"]),
        tied=True,
        note="untied",
    ),
    Feature(
        "tied: trained tokens",
        every(LANGUAGE, trainable_token_indices=[3, 90, 7]),
        tied=True,
        note="PEFT ties the rows, so the model stays tied",
    ),
    Feature(
        "tied: `ensure_weight_tying`",
        {k: {"target_modules": [EMBEDDING[k]], "ensure_weight_tying": True} for k in UNTIED},
        tied=True,
        refused={"*": Refused("adapters tied to an embedding are not handled")},
    ),
    Feature(
        "resized vocabulary",
        every(UNTIED),
        resized=True,
        note="from its record; a plain PEFT directory needs a base resized alike",
    ),
    Feature(
        "tied: resized vocabulary", every(LANGUAGE), tied=True, resized=True, note="stays tied"
    ),
    Feature(
        "`target_parameters`: a layer's weight",
        {
            k: {"target_modules": [], "target_parameters": [f"{TARGETS[k][0]}.weight"]}
            for k in KINDS
        },
    ),
    Feature(
        "`target_parameters`: fused experts",
        every(EXPERTS, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
        note="taken apart into the experts that lie on disk",
    ),
    Feature(
        "`target_parameters`: one of the experts' parameters, with rsLoRA",
        {
            k: {
                "target_modules": [],
                "target_parameters": ["experts.down_proj"],
                "use_rslora": True,
            }
            for k in EXPERTS
        },
    ),
    Feature(
        "`target_parameters`: router and experts, with patterns",
        every(
            EXPERTS,
            target_parameters=["mlp.gate.weight", "mlp.experts.gate_up_proj"],
            rank_pattern={r"experts\.gate_up_proj": 3},
            alpha_pattern={r"gate\.weight": 5},
        ),
    ),
    Feature("`layers_to_transform`", every(layers_to_transform=[1])),
    Feature(
        "regular expression as target",
        {k: {"target_modules": rf".*(layers?|h)\.0\..*({'|'.join(TARGETS[k])})"} for k in KINDS},
    ),
    Feature("`target_modules: all-linear`", {k: {"target_modules": "all-linear"} for k in KINDS}),
    Feature(
        "`exclude_modules`",
        {k: o | {"exclude_modules": o["target_modules"][:1]} for k, o in every().items()},
    ),
    Feature("initialised orthogonally", every(init_lora_weights="orthogonal")),
    Feature("PiSSA, converted by PEFT", every(UNTIED, init_lora_weights="pissa"), convert=True),
    Feature(
        "OLoRA, converted by PEFT",
        every((*UNTIED, "vit", "vitpose"), init_lora_weights="olora"),
        convert=True,
    ),
    edited("init_lora_weights", "pissa", "changed the base weights at the start"),
    edited("init_lora_weights", "olora", "changed the base weights at the start"),
    edited("init_lora_weights", "loftq", "changed the base weights at the start"),
    edited("init_lora_weights", "corda", "changed the base weights at the start"),
    edited("init_lora_weights", "lora_ga", "changed the base weights at the start"),
    edited("layer_replication", [[0, 1], [0, 1]], "it repeats layers"),
    edited("alora_invocation_tokens", [1, 2], "active for some tokens only"),
    edited("use_qalora", True, "QA-LoRA"),
    edited("use_bdlora", {"nblocks": 2}, "block-diagonal"),
    edited("arrow_config", {"top_k": 2}, "routes each token"),
    edited("kasa_config", {"beta": 0.1}, "KaSA changes the base"),
    edited("something_new", 1, "does not know what it changes"),
)


@dataclass(frozen=True)
class Made:
    """An adapter checkpoint, and the tensors that merging it must give, in float64, by name on disk.

    `sizes` bounds the magnitudes that were summed for each tensor, elementwise.
    """

    adapter: Checkpoint
    wanted: dict[str, torch.Tensor]
    sizes: dict[str, torch.Tensor]


def make(base: Path, root: Path, kind: str, feature: Feature, *, oracle: bool = True) -> Made:
    """Make an adapter with PEFT on `base` under `root`, with its probe and its oracle."""
    import peft

    task = TASKS[kind]
    model: Any = load_base(base, task)
    if feature.resized:
        torch.manual_seed(3)
        model.resize_token_embeddings(VOCABULARY + NEW_TOKENS, mean_resizing=False)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 12, **feature.peft[kind]})
    adapted = peft.get_peft_model(model, config)
    if feature.convert:
        adapted.peft_config["default"].init_lora_weights = True
        adapted.save_pretrained(root / "initial")
    draw(adapted, 1.0, seed=5)
    converted = (
        {"path_initial_model_for_weight_conversion": str(root / "initial")}
        if feature.convert
        else {}
    )
    saved = root / "peft"
    adapted.save_pretrained(
        saved, save_embedding_layers=True if feature.resized else "auto", **converted
    )
    if feature.edit:
        path = saved / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | feature.edit))
    checkpoint = _checkpoint(base, root / "adapter", kind, adapted.eval(), saved)
    if not oracle:
        return Made(checkpoint, {}, {})
    wanted = _on_disk(base, root / "oracle", task, adapted, feature, sizes=False)
    sizes = _on_disk(base, root / "sizes", task, adapted, feature, sizes=True)
    if (
        feature.convert
    ):  # PEFT's model holds what is left of the base, rounded where it was taken from the whole
        sizes |= {name: sizes[name] + whole.abs() for name, whole in read_tensors(base).items()}
    return Made(checkpoint, wanted, sizes)


def _checkpoint(base: Path, target: Path, kind: str, adapted: Any, saved: Path) -> Checkpoint:
    """A qlx adapter around the files that PEFT saved, as training writes it."""
    record = adapter_spec(adapted, tensor_names(adapted, base))
    source = resolve_source(str(base))
    inputs = inputs_for(kind)
    with new_checkpoint(target) as staging:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (staging / name).write_bytes((saved / name).read_bytes())
        (staging / "config.json").write_bytes((base / "config.json").read_bytes())
        write_probe(
            staging / "probe.safetensors", make_probe(adapted, TASKS[kind], inputs, None, True)
        )
        manifest = Manifest(
            kind="adapter",
            task=TASKS[kind],
            tag="cell",
            base=source.reference(),
            adapter=record,
            lineage=(next_step("train", parents=(source.fingerprint,)),),
            probe=ProbeRecord(reference="unmerged, fp32"),
        )
        seal(staging, manifest)
    return open_checkpoint(target)


def _on_disk(
    base: Path, target: Path, task: str, adapted: Any, feature: Feature, *, sizes: bool
) -> dict[str, torch.Tensor]:
    """The unmerged model's effective weights, float64, as transformers writes them to disk."""
    plain: Any = load_base(base, task)
    if feature.resized:
        plain.resize_token_embeddings(VOCABULARY + NEW_TOKENS, mean_resizing=False)
    if hasattr(plain.config, "tie_word_embeddings") and task == "causal-lm":
        plain.config.tie_word_embeddings = False
        plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight.detach().clone())
    if feature.resized:
        for mine, theirs in zip(_tables(plain), _tables(adapted.get_base_model()), strict=True):
            mine.weight.data = theirs.weight.data.clone()
    plain.double()
    own = plain.state_dict()
    with torch.no_grad():
        for name, value in effective(adapted, sizes=sizes).items():
            own[name].copy_(value)
    plain.save_pretrained(target)
    return read_tensors(target)


def _tables(model: Any) -> tuple[Any, Any]:
    return model.get_input_embeddings(), model.get_output_embeddings()


def effective(adapted: Any, *, sizes: bool) -> dict[str, torch.Tensor]:
    """What the wrapped parts of a PEFT model compute with, float64, by parameter of the plain model.

    With `sizes` every factor is taken absolute: the magnitudes that a sum is made of.
    """
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    found: dict[str, torch.Tensor] = {}
    true = copy.deepcopy(adapted).double().eval()
    model = copy.deepcopy(true)
    if sizes:
        for parameter in model.parameters():
            parameter.data = parameter.data.abs()
    layers = dict(true.get_base_model().named_modules())
    with torch.no_grad():
        for name, parameter in adapted.get_base_model().named_parameters():  # trained biases
            own = not any(part in name for part in ("lora_", "modules_to_save"))
            if name.endswith("bias") and parameter.requires_grad and own:
                found[name.replace(".base_layer", "")] = parameter.double()
        for name, module in model.get_base_model().named_modules():
            plain = name.replace(".base_layer", "")
            if isinstance(module, ParamWrapper):
                value = module.get_param() + module.get_delta_weight("default")
                found[f"{plain}.{module.parameter_name}"] = value
            elif isinstance(module, LoraLayer):
                found |= {f"{plain}.{k}": v for k, v in _lora(module, layers[name]).items()}
            elif isinstance(module, ModulesToSaveWrapper):
                saved = module.modules_to_save["default"].state_dict()
                found |= {f"{name}.{key}": value for key, value in saved.items()}
            elif isinstance(module, TrainableTokensWrapper):
                found[f"{name}.weight"] = module.token_adapter.get_merged_weights(["default"])
    return found


def _lora(layer: Any, true: Any) -> dict[str, torch.Tensor]:
    base = layer.get_base_layer()
    values = {"weight": base.weight + layer.get_delta_weight("default")}
    if layer.lora_bias.get("default"):
        values["bias"] = base.bias + layer.lora_B["default"].bias * layer.scaling["default"]
    if "default" in layer.lora_magnitude_vector:
        whole = true.get_base_layer().weight + true.get_delta_weight("default")
        magnitude = true.lora_magnitude_vector["default"].weight
        axis = next(
            d for d, n in enumerate(whole.shape) if n == magnitude.numel() and _is_output(true, d)
        )
        others = [d for d in range(whole.dim()) if d != axis]
        norm = torch.linalg.vector_norm(whole, dim=others, keepdim=True)
        values["weight"] = values["weight"] * (magnitude.reshape(norm.shape) / norm)
    return values


def _is_output(layer: Any, axis: int) -> bool:
    transposed = getattr(layer, "fan_in_fan_out", False) or hasattr(
        layer.get_base_layer(), "num_embeddings"
    )
    return axis == (1 if transposed else 0)


def half_ulp(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half a unit in the last place of `dtype` at each float64 value."""
    exponent = torch.frexp(value).exponent.clamp(min=-13 if dtype == torch.float16 else -125)
    return torch.ldexp(torch.ones_like(value), exponent - 1 - SIGNIFICANT[dtype])


def worst_excess(made: Made, result: dict[str, torch.Tensor]) -> float:
    """The largest |error| as a share of its bound, over all values; above 1 is wrong.

    The bound is half an ulp of the tensor's dtype plus what summing in float32 may lose.
    """
    worst = 0.0
    for name, value in made.wanted.items():
        if name == "lm_head.weight" and name not in result:
            assert torch.equal(value, made.wanted[_embedding(made.wanted)])  # still tied
            continue
        stored = result[name]
        bound = half_ulp(value, stored.dtype) + 16 * EPS * made.sizes[name].abs()
        worst = max(worst, ((stored.double() - value).abs() / bound).max().item())
    assert set(result) <= set(made.wanted)
    return worst


def _embedding(names: Any) -> str:
    return next(name for name in names if name.endswith(("embed_tokens.weight", "wte.weight")))


def trained(made: Made, base: dict[str, torch.Tensor]) -> set[str]:
    """Names of the tensors that the oracle changes or adds."""
    return {
        name
        for name, value in made.wanted.items()
        if name not in base
        or base[name].shape != value.shape
        or not torch.equal(base[name].double(), value)
    }


def document() -> str:
    """The table of docs/merge-matrix.md."""
    lines = [
        "# Which adapters merge",
        "",
        "Generated by `python -m tests.merging.matrix`; `tests/merging/test_matrix.py` makes every cell",
        "for real, on bases stored in fp32, bf16 and fp16, and fails when this page is not current.",
        "",
        "**=** the merged tensors are those of a float64 oracle within half a unit in the last place of",
        "the stored dtype plus the error of summing in fp32, the merged model computes what PEFT",
        "computes unmerged, and no other tensor of the base changes by one bit. **✗** refused before",
        "anything is written, with the reason below. Blank: the base has no such part.",
        "",
        "Where a router sends each token to some experts only, rounding the weights to 16 bits may send",
        "one elsewhere; the proof then refuses the merge, and `--dtype float32` is the way out.",
        "",
        "| adapter | " + " | ".join(KINDS.values()) + " | |",
        "|---|" + "---|" * (len(KINDS) + 1),
    ]
    reasons: list[str] = []
    for feature in FEATURES:
        cells = [_mark(feature, kind, reasons) for kind in KINDS]
        lines.append(f"| {feature.name} | {' | '.join(cells)} | {feature.note} |")
    lines += ["", "Reasons:", ""]
    lines += [f"{at}. … {reason} …" for at, reason in enumerate(reasons, 1)]
    lines += [
        "",
        "## Several adapters at once",
        "",
        f"`--adapter` repeated, with `--weight` each and `--combine` {', '.join(METHODS)}. The result",
        "is the one PEFT's `add_weighted_adapter` gives; `cat`, the default, is the exact weighted sum.",
        f"{', '.join(PRUNING)} take `--density`, those with dare `--seed`; all are recorded. Refused: DoRA,",
        "biases of B, parameters saved whole, trained tokens and bare parameters, which are no product of",
        "A and B; adapters of different bases or quantizations.",
        "",
        "## Other kinds of adapters",
        "",
        "Merged through PEFT itself, in fp32, with the same proof (`tests/merging/test_through_peft.py`):",
        f"{', '.join(KINDS_THROUGH_PEFT)}.",
        "",
        "Refused:",
        "",
        *(f"- {kind}: {why}." for kind, why in NOT_MERGEABLE.items()),
    ]
    return "\n".join(lines) + "\n"


def _mark(feature: Feature, kind: str, reasons: list[str]) -> str:
    if kind not in feature.peft:
        return ""
    refused = feature.expected(kind)
    if refused is None:
        return "="
    if refused.reason not in reasons:
        reasons.append(refused.reason)
    return f"✗ {reasons.index(refused.reason) + 1}"


if __name__ == "__main__":
    DOCUMENT.write_text(document())
