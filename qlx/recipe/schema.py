"""The typed recipe: every field a recipe may have, its unit, its default and its bounds.

Unknown fields are refused. `docs/recipes.md` explains the fields; `recipes/` holds complete examples.
"""

from typing import Annotated, Any, Literal, Self, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)
from pydantic_core import PydanticCustomError

from qlx.checkpoint import Task, bytes_digest, canonical_json
from qlx.recipe.patterns import refused_pattern

__all__ = [
    "AdapterSection",
    "ArchitectureSection",
    "BaseSection",
    "DataSection",
    "ProbeSection",
    "QuantizationSection",
    "Recipe",
    "TrainingSection",
    "json_schema",
]

Dtype = Literal["float32", "bfloat16", "float16"]
Positive = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "sgd"]


def _regular_expression(text: str) -> str:
    if (why := refused_pattern(text)) is not None:
        raise ValueError(f"{text[:80]!r}: {why}")
    return text


def misfit(field: str, why: str) -> PydanticCustomError:
    """The error of a field, by its path from the section, that does not go with others in the recipe."""
    return PydanticCustomError("misfit", "{why}", {"why": why, "field": field})


Pattern = Annotated[str, AfterValidator(_regular_expression)]
Token = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^\S+$")]
Initialisation = Annotated[
    Literal["default", "gaussian", "pissa", "loftq"]
    | Annotated[str, Field(pattern=r"^pissa_niter_[1-9][0-9]?$")],
    BeforeValidator(lambda value: "default" if value is True else value),
]
_BLOCKED = ("nf4", "fp4")
_BUILT: dict[Task, str] = {
    "image-classification": "vit",
    "heatmap": "vitpose",
    "causal-lm": "llama",
}


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=()
    )


class ArchitectureSection(_Section):
    """A model built from nothing: for pretraining a small base. Widths must be multiples of 64 to be packed.

    `image_size` is one side, or [height, width]. `vitpose` makes heatmaps with four cells to a side of a
    patch; its patches are at least 5 pixels wide, and its `intermediate_size` is a multiple of `hidden_size`.
    """

    model_type: Literal["vit", "vitpose", "llama"]
    hidden_size: Positive = 128
    layers: Positive = 4
    heads: Positive = 4
    kv_heads: Positive | None = None
    intermediate_size: Positive = 256
    image_size: Positive | tuple[Positive, Positive] = 16
    patch_size: Positive = 4
    vocab_size: Positive = 2048
    max_length: Positive = 256

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.hidden_size % self.heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of heads {self.heads}"
            )
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if self.model_type != "llama" and any(side % self.patch_size for side in self.image_shape):
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        return self

    @model_validator(mode="after")
    def _fits_vitpose(self) -> Self:
        if self.model_type == "vitpose" and self.patch_size < 5:
            raise ValueError(
                f"patch_size {self.patch_size} is too small: vitpose pads images by 2 pixels on each side, "
                "which would make one patch too many below 5"
            )
        if self.model_type == "vitpose" and self.intermediate_size % self.hidden_size:
            raise ValueError(
                f"intermediate_size {self.intermediate_size} is not a multiple of hidden_size "
                f"{self.hidden_size}, as vitpose needs it"
            )
        return self

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        size = self.image_size
        return size if isinstance(size, tuple) else (size, size)


class BaseSection(_Section):
    """The frozen model: a local directory or hub name in `path`, or an architecture to train from scratch.

    With `offload` its weights wait in memory beside the device (`cpu`) or in their files (`disk`), and are lent
    to each layer while it runs.
    """

    path: str | None = None
    revision: str | None = None
    dtype: Dtype = "float32"
    offload: Literal["none", "cpu", "disk"] = "none"
    from_scratch: ArchitectureSection | None = None

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.path is None) == (self.from_scratch is None):
            raise ValueError("give exactly one of path and from_scratch")
        for field, unused in (("dtype", self.dtype != "float32"), ("revision", self.revision)):
            if self.from_scratch is not None and unused:
                raise misfit(field, "a model from scratch is made in float32: leave it out")
        return self


class DataSection(_Section):
    """Where examples come from.

    Built in: `digits` (scikit-learn), `python-text` and `python-docstrings` (the running Python's own
    standard library). Yours, with `path`: `images` (a directory with one directory per class, or parquet), `text`
    (jsonl, csv or parquet with prompt/completion, messages or text columns), `tracknet` (video frames with the
    place of a ball, `game*/Clip*/Label.csv`; held out clip by clip).

    Of messages, `answers` says which of the assistant's are learned; `chat_template` is a file with the Jinja template
    that turns them into text, in place of the tokenizer's own.

    For `tracknet`: `frames` is how many consecutive frames the model sees, the labelled one last; `sigma` the
    standard deviation of the Gaussian it learns, in cells of the heatmap.
    """

    source: Literal["digits", "python-text", "python-docstrings", "images", "text", "tracknet"]
    path: str | None = None
    variant: Literal["plain", "shifted"] = "plain"
    train_limit: Positive | None = None
    eval_limit: Positive | None = None
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    max_length: Positive = 128
    chat_template: str | None = None
    answers: Literal["last", "all"] = "last"
    frames: Literal[1, 3] = 1
    sigma: Annotated[float, Field(gt=0, le=16)] = 1.0
    seed: Seed = 0

    @model_validator(mode="after")
    def _path_given(self) -> Self:
        if (self.path is not None) != (self.source in ("images", "text", "tracknet")):
            raise ValueError(
                f"source {self.source!r} {'takes no' if self.path is not None else 'needs a'} path"
            )
        if self.variant != "plain" and self.source != "digits":
            raise ValueError("variant is for source 'digits' only")
        if (self.frames, self.sigma) != (1, 1.0) and self.source != "tracknet":
            raise ValueError("frames and sigma are for source 'tracknet' only")
        if (self.chat_template, self.answers) != (None, "last") and self.task != "causal-lm":
            raise ValueError("chat_template and answers are for texts only")
        return self

    @property
    def task(self) -> Task:
        """The task that these examples are for."""
        vision: dict[str, Task] = {"tracknet": "heatmap", "digits": "image-classification"}
        vision["images"] = "image-classification"
        return vision.get(self.source, "causal-lm")


class AdapterSection(_Section):
    """Low-rank adapter. scaling = alpha / rank, or alpha / sqrt(rank) with `use_rslora`.

    Of a `vera` adapter all layers share two frozen random matrices of `rank`, drawn with
    `projection_prng_key`; two vectors a layer are trained, the inner one beginning at `d_initial`.
    `exact` puts a LoRA inside the rounding of a quantized base: what is trained is what the packed format holds, so
    that merging and packing change nothing; scales and zero points of integer codes learn with it
    (`learned_scales`). `exact: fold` leaves the codes, and what it learns goes into zero points that are no whole
    numbers (QA-LoRA).
    `init_lora_weights` are PEFT's names (`true` is `default`). `new_tokens` are texts that become single
    tokens of a language model; their rows in embedding and head are trained with the adapter.
    """

    type: Literal["lora", "vera"] = "lora"
    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    dropout: Fraction = 0.0
    target_modules: Literal["auto"] | tuple[str, ...] = "auto"
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    use_dora: bool = False
    exact: bool | Literal["fold"] = False
    learned_scales: bool = True
    init_lora_weights: Initialisation = "default"
    rank_pattern: dict[Pattern, Positive] = Field(default_factory=dict)
    alpha_pattern: dict[Pattern, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    new_tokens: tuple[Token, ...] = ()
    d_initial: Annotated[float, Field(gt=0)] = 0.1
    projection_prng_key: Seed = 0

    @model_validator(mode="before")
    @classmethod
    def _wide_vera(cls, value: Any) -> Any:
        """VeRA trains rank + outputs values a layer, so its rank is of another size: PEFT's 256."""
        if isinstance(value, dict) and value.get("type") == "vera":
            return {"rank": 256, **value}
        return value

    @model_validator(mode="after")
    def _fits_type(self) -> Self:
        fields = type(self).model_fields
        for name in _LORA_ONLY if self.type == "vera" else _VERA_ONLY:
            if getattr(self, name) != fields[name].get_default(call_default_factory=True):
                raise misfit(name, f"does not apply to an adapter of type {self.type!r}")
        if self.use_dora and self.initialisation in ("pissa", "loftq"):
            raise misfit(
                "init_lora_weights",
                f"{self.initialisation} does not work with use_dora, whose magnitudes are those of the base "
                "without an adapter; leave one of them out",
            )
        if len(set(self.new_tokens)) != len(self.new_tokens):
            raise misfit("new_tokens", "names a token twice")
        if not self.learned_scales and not self.exact:
            raise misfit(
                "learned_scales", "is for exact adapters; add exact: true, or leave it out"
            )
        for name in _NOT_EXACT if self.exact else ():
            if getattr(self, name) != fields[name].get_default(call_default_factory=True):
                raise misfit(
                    name,
                    "does not apply to an exact adapter; leave one of the two out",
                )
        return self

    @property
    def folded(self) -> bool:
        """Whether it moves zero points instead of codes."""
        return self.exact == "fold"

    @property
    def initialisation(self) -> Literal["default", "gaussian", "pissa", "loftq"]:
        """How A and B begin, without the number of iterations that PiSSA may take."""
        name = self.init_lora_weights.partition("_niter_")[0]
        return cast(Literal["default", "gaussian", "pissa", "loftq"], name)

    @property
    def svd_iterations(self) -> int | None:
        """Iterations of PiSSA's fast singular value decomposition; None: the exact one."""
        _, fast, count = self.init_lora_weights.partition("_niter_")
        return int(count) if fast else None


_LORA_ONLY = (
    "alpha", "use_rslora", "use_dora", "init_lora_weights", "rank_pattern", "alpha_pattern", "new_tokens", "exact",
)  # fmt: skip
_NOT_EXACT = ("dropout", "bias", "use_dora", "init_lora_weights", "new_tokens")
_VERA_ONLY = ("d_initial", "projection_prng_key")


class QuantizationSection(_Section):
    """Quantization of the frozen base; absent means the base stays as it is.

    `double_quant`, `block_size` and mode `hf` are for nf4 and fp4; `group_size` (`whole`: one scale
    a row, for ternary one a tensor) and `scale_dtype` for int8, int4, int2 and ternary; `symmetric` for int8 and
    int4 (false gives them zero points, which int2 always has); `activation_bits` for ternary, whose layers then
    round their inputs as BitNet does.
    """

    quant_type: Literal["nf4", "fp4", "int8", "int4", "int2", "ternary"] = "nf4"
    double_quant: bool = True
    compute_dtype: Dtype = "float32"
    block_size: Literal[64, 128, 256, 512] = 64
    group_size: Positive | Literal["whole"] | None = None
    symmetric: bool = True
    scale_dtype: Dtype = "float32"
    activation_bits: Literal[8] | None = None
    skip_modules: tuple[str, ...] = ()
    mode: Literal["manual", "hf"] = "manual"

    @model_validator(mode="before")
    @classmethod
    def _no_double_integers(cls, value: Any) -> Any:
        """Double quantization is the default of nf4 and fp4 only, and int2 is never symmetric."""
        if isinstance(value, dict) and value.get("quant_type", "nf4") not in _BLOCKED:
            usual = {"symmetric": False} if value.get("quant_type") == "int2" else {}
            return {"double_quant": False, **usual, **value}
        return value

    @model_validator(mode="after")
    def _fits_type(self) -> Self:
        fields = type(self).model_fields
        given = {name for name in fields if getattr(self, name) != fields[name].default}
        wrong = {"group_size", "symmetric", "scale_dtype", "activation_bits"} & given
        if self.quant_type not in _BLOCKED:
            wrong = {"block_size"} & given
            wrong |= {"double_quant"} if self.double_quant else set()
            wrong |= {"mode"} if self.mode == "hf" else set()
            rounds = self.activation_bits and self.quant_type != "ternary"
            wrong |= {"activation_bits"} if rounds else set()
            never = {"ternary": False, "int2": True}.get(self.quant_type)
            wrong |= {"symmetric"} if self.symmetric == never else set()
        if wrong:
            raise ValueError(f"{min(wrong)} does not apply to quant_type {self.quant_type!r}")
        return self

    @property
    def weight_bits(self) -> int:
        """Bits that the code of one weight takes."""
        return {"int8": 8, "int2": 2, "ternary": 2}.get(self.quant_type, 4)

    @property
    def values_per_scale(self) -> int | None:
        """Input values that share a scale; None for a whole row or, for ternary, the whole tensor."""
        if self.quant_type in _BLOCKED:
            return self.block_size
        if self.group_size is None:
            return None if self.quant_type == "int8" else 128
        return None if self.group_size == "whole" else self.group_size

    @property
    def backend(self) -> Literal["bitsandbytes", "qlx"]:
        """Whose layers hold the codes in training."""
        return "bitsandbytes" if self.quant_type in _BLOCKED else "qlx"


class TrainingSection(_Section):
    """How long and how fast; `epochs` or `max_steps`, the latter wins.

    With `eval_every` the held-out examples are scored every so many steps and at the end; the weights with the
    lowest held-out loss are the result (`keep_best`), and the training ends once that loss was not lower for
    `early_stopping_patience` evaluations. `compile` lets torch.compile make kernels of the model, which takes its
    time before the first steps and pays on a GPU.
    """

    epochs: Annotated[float, Field(gt=0)] = 1.0
    max_steps: Positive | None = None
    batch_size: Positive = 16
    gradient_accumulation: Positive = 1
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    optimizer: Optimizer = "adamw"
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    warmup_ratio: Fraction = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    gradient_checkpointing: bool = False
    packing: bool = False
    completion_only: bool = True
    compile: bool = False
    log_every: Positive = 10
    save_every: Positive = 200
    eval_every: Positive | None = None
    early_stopping_patience: Positive | None = None
    keep_best: bool = True
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    seed: Seed = 0

    @model_validator(mode="after")
    def _looks_at_held_out(self) -> Self:
        if self.eval_every is None and (self.early_stopping_patience or not self.keep_best):
            field = "early_stopping_patience" if self.early_stopping_patience else "keep_best"
            raise ValueError(f"{field} needs eval_every: how many steps apart the evaluations are")
        return self


class ProbeSection(_Section):
    """How many held-out inputs are kept for replay, and how long a text one may be (tokens)."""

    count: Annotated[int, Field(ge=2, le=256)] = 16
    max_length: Positive = 48


class Recipe(_Section):
    """One training, completely described.

    With `merge_after_train` the adapter is merged into its base as soon as it is trained, beside the run;
    `keep_lm_head_fp16` stores a language model's head in float16 there, whatever the other weights are in.
    """

    name: Annotated[
        str, Field(min_length=1, max_length=80, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    ]
    task: Task
    base: BaseSection
    data: DataSection
    adapter: AdapterSection | None = None
    quantization: QuantizationSection | None = None
    training: TrainingSection = TrainingSection()
    probe: ProbeSection = ProbeSection()
    merge_after_train: bool = False
    keep_lm_head_fp16: bool = False

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.quantization is not None and self.adapter is None:
            raise ValueError(
                "a quantized base cannot be trained without an adapter; add the section adapter"
            )
        if self.base.from_scratch is not None and self.adapter is not None:
            raise ValueError(
                "an adapter needs a pretrained base; give base.path instead of base.from_scratch"
            )
        self._check_adapter()
        self._check_offload()
        if self.keep_lm_head_fp16 and not (self.merge_after_train and self.task == "causal-lm"):
            raise ValueError(
                "keep_lm_head_fp16 is about the merged language model; set merge_after_train, or leave it out"
            )
        if self.training.packing and self.task != "causal-lm":
            raise misfit("training.packing", "joins texts; it is for task 'causal-lm'")
        if self.data.answers == "all" and not self.training.completion_only:
            raise misfit("data.answers", "has no effect where training.completion_only is false")
        if self.data.task != self.task:
            raise ValueError(f"data.source {self.data.source!r} does not fit task {self.task!r}")
        scratch = self.base.from_scratch
        if scratch is not None and scratch.model_type != _BUILT[self.task]:
            raise ValueError(
                f"base.from_scratch.model_type for task {self.task!r} is {_BUILT[self.task]!r}, "
                f"not {scratch.model_type!r}"
            )
        return self

    def _check_adapter(self) -> None:
        adapter = self.adapter
        if adapter is None:
            return
        if adapter.initialisation == "loftq" and self.quantization is None:
            raise misfit(
                "adapter.init_lora_weights",
                "loftq makes up for what quantization takes from the base; add the section quantization (a base that "
                "comes as codes has no other weights to compare with)",
            )
        if adapter.new_tokens and self.task != "causal-lm":
            raise misfit("adapter.new_tokens", f"are for language models, not for {self.task}")
        if adapter.exact and self.quantization is not None:
            self._check_exact(self.quantization, folded=adapter.folded)

    @staticmethod
    def _check_exact(section: QuantizationSection, *, folded: bool) -> None:
        kind, zeros = section.quant_type, not section.symmetric
        if kind == "fp4":
            raise misfit("adapter.exact", "takes nf4, int8, int4, int2 or ternary codes, not fp4")
        if kind == "int8" and zeros:
            raise misfit("adapter.exact", "takes symmetric int8 codes; leave out symmetric: false")
        if folded and (not zeros or section.values_per_scale is None):
            raise misfit(
                "adapter.exact",
                "fold takes int2, or int4 with symmetric: false, in groups; its zero points are what learns",
            )
        if folded and section.scale_dtype != "float32":
            raise misfit("quantization.scale_dtype", "is float32 with adapter.exact: fold")

    def _check_offload(self) -> None:
        """Offloaded weights are read twice a step and never written, nor looked at between layers."""
        adapter = self.adapter
        if self.base.offload == "none":
            return
        if adapter is None:
            raise misfit("base.offload", "is for a frozen base; add the section adapter")
        if not self.training.gradient_checkpointing:
            why = "needs training.gradient_checkpointing: true, or every weight would be kept until the backward pass"
            raise misfit("base.offload", why)
        asked = {"use_dora": adapter.use_dora, "new_tokens": adapter.new_tokens}
        asked |= {"init_lora_weights": adapter.initialisation == "pissa", "exact": adapter.exact}
        wrong = [name for name, value in asked.items() if value]
        if wrong:
            raise misfit(f"adapter.{wrong[0]}", "needs the base in memory; leave out base.offload")

    @property
    def digest(self) -> str:
        """`sha256:…` of the validated content; comments and layout of the file do not matter."""
        return bytes_digest(canonical_json(self.content()))

    def content(self) -> dict[str, Any]:
        """The recipe as plain JSON values, defaults filled in."""
        return self.model_dump(mode="json")


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors; what fields mean to each other is checked on reading."""
    dialect = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": dialect, **Recipe.model_json_schema()}
