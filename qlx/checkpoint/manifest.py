"""The manifest `qlx.json`: what a checkpoint is, where it came from, and which bytes belong to it.

Format version 1; `docs/format.md` is its specification. Models are frozen and refuse unknown
fields, so a file that a newer qlx wrote is never half understood. Nothing in here depends on the
clock, the host or an absolute path: the same content gives the same bytes anywhere.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from qlx.checkpoint.digest import bytes_digest
from qlx.checkpoint.strict_json import canonical_json
from qlx.errors import CorruptCheckpoint, InputRefused, UsageError

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST_FILE",
    "AdapterEntry",
    "AdapterSpec",
    "BaseRef",
    "FileEntry",
    "Kind",
    "Manifest",
    "ProbeRecord",
    "ProbeResult",
    "QuantSpec",
    "Step",
    "Task",
    "check_adapter_name",
    "parse_manifest",
]

MANIFEST_FILE = "qlx.json"
FORMAT_VERSION = 1

Kind = Literal["run", "adapter", "merged", "packed", "onnx"]
Task = Literal["image-classification", "heatmap", "causal-lm"]
Backend = Literal["bitsandbytes", "qlx", "gptq", "awq", "bitnet", "compressed-tensors", "gguf"]
Scalar = str | int | float | bool | None


def _flat_name(name: str) -> str:
    """A file name that stays in its directory on every system."""
    import re

    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}", name) or name == MANIFEST_FILE:
        raise ValueError(
            f"{name!r} is not allowed as a file name (letters, digits, '.', '_', '-'; no directories)"
        )
    return name


def _digest(value: str) -> str:
    import re

    if not re.fullmatch(r"sha256:[0-9a-f]{64}", value):
        raise ValueError(f"{value!r} is not of the form sha256:<64 hex digits>")
    return value


def check_adapter_name(name: str) -> str:
    """A name that can begin a file's name and is never taken for an option or a path.

    Raises:
        ValueError: it cannot; the message says what can.
    """
    import re

    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", name):
        raise ValueError(
            f"{name!r} is not allowed as an adapter's name (at most 100 letters, digits, '.', '_', '-')"
        )
    return name


FileName = Annotated[str, AfterValidator(_flat_name)]
AdapterName = Annotated[str, AfterValidator(check_adapter_name)]
Digest = Annotated[str, AfterValidator(_digest)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class BaseRef(_Frozen):
    """The base model: the name it was given, its revision, and the fingerprint of its weights."""

    name: str
    revision: str | None = None
    fingerprint: Digest


class QuantSpec(_Frozen):
    """How weights are, or were during training, quantized.

    `modules` are the in-memory names of the quantized modules, `tensors` the names of their weights
    in the base's files (transformers renames some on load), `fingerprint` identifies the codes and
    scales themselves. `group_size` counts input values that share a scale (the block size of NF4);
    without it a scale serves a whole row (int8, int4) or tensor (ternary). `activation_bits` is set
    where layers round their inputs as well. `backend` names whose codes and layout these are: `qlx`
    for codes that training made and did not write, the others for those in the files of a base or a
    packed checkpoint. The tensors of `gguf` have types of their own, which no `scheme` names.
    """

    method: Literal["none", "qlora", "post-training"] = "none"
    weight_bits: int | None = None
    activation_bits: int | None = None
    kv_cache_bits: int | None = None
    scheme: Literal["nf4", "fp4", "int8", "int4", "int2", "ternary"] | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    double_quant: bool = False
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    skip_modules: tuple[str, ...] = ()
    mode: Literal["manual", "hf"] = "manual"
    backend: Backend | None = None
    modules: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()
    fingerprint: Digest | None = None
    extras: dict[str, Scalar] = Field(default_factory=dict)

    @property
    def quantized(self) -> bool:
        """Whether any weight is quantized at all."""
        return self.scheme is not None


class AdapterSpec(_Frozen):
    """What was trained: adapter type, rank, scaling, targets, and how many parameters.

    `tensors` maps each adapted module (in-memory name) to its weight's name in the base's files.
    `type` is `full` when the whole model was trained and there is no adapter. `rank` and `alpha` are
    those of the stored factors. `initialized` (`gaussian`, `pissa`, `loftq`) says how they began where
    that was not LoRA's usual way; of `pissa` the trained rank is half the stored one, `trained_rank`.
    `new_tokens` are the tokens that training added to the base's vocabulary. Of type `exact` (an adapter inside
    the rounding) `learned_scales` says whether scales were trained, and `codes` is the fingerprint of all packed
    weights as training ended; `folded` says that it moves zero points instead of codes. These six are left out
    where they say nothing.
    """

    type: Literal["lora", "vera", "exact", "full"] = "lora"
    rank: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    targets: tuple[str, ...] = ()
    tensors: dict[str, str] = Field(default_factory=dict)
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    alpha_pattern: dict[str, float] = Field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    trained_parameters: int | None = None
    total_parameters: int | None = None
    initialized: Literal["gaussian", "pissa", "loftq"] | None = None
    trained_rank: int | None = None
    new_tokens: tuple[str, ...] = ()
    learned_scales: bool = False
    codes: Digest | None = None
    folded: bool = False

    @model_serializer(mode="wrap")
    def _without_what_is_usual(self, inner: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = inner(self)
        rare = ("initialized", "trained_rank", "new_tokens", "learned_scales", "codes", "folded")
        return {name: value for name, value in fields.items() if value or name not in rare}


class Step(_Frozen):
    """One command in a checkpoint's history, with the digests or fingerprints of what it read."""

    command: str
    versions: dict[str, str]
    parents: tuple[Digest, ...] = ()
    recipe_digest: Digest | None = None
    seed: int | None = None
    options: dict[str, Any] = Field(default_factory=dict)


class FileEntry(_Frozen):
    """Size in bytes and SHA-256 of one payload file.

    `of` says what was hashed: the file's `bytes`, or of a safetensors file its `tensors`
    (`qlx.checkpoint.digest.tensors_digest`); bytes are the rule and not written down.
    """

    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    of: Literal["bytes", "tensors"] = "bytes"

    @model_serializer(mode="wrap")
    def _without_the_rule(self, inner: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = inner(self)
        return {name: value for name, value in fields.items() if (name, value) != ("of", "bytes")}


class ProbeResult(_Frozen):
    """A replay that was made: by which step, against which outputs, with which distances."""

    step: str
    against: str
    metrics: dict[str, float]
    passed: bool


class ProbeRecord(_Frozen):
    """Where the probe lies, what its reference outputs are, and every distance measured so far."""

    file: FileName = "probe.safetensors"
    reference: str
    results: tuple[ProbeResult, ...] = ()


class AdapterEntry(_Frozen):
    """One adapter of several that a graph can run with: its file, and what was recorded of it.

    `tag`, `adapter`, `lineage` and `probe` are those that the directory's manifest would have if it held
    this adapter alone; `digest` is that of the checkpoint it was made of.
    """

    file: FileName
    digest: Digest
    tag: str = Field(min_length=1, max_length=200)
    adapter: AdapterSpec
    lineage: tuple[Step, ...] = ()
    probe: ProbeRecord


class Manifest(_Frozen):
    """The whole of `qlx.json`, except the digest that seals it.

    `adapters`, left out where there are none, are those that an ONNX graph can run with, by name; all
    other fields are then those of the graph without any.
    """

    format: Literal["qlx"] = "qlx"
    format_version: Literal[1] = 1
    kind: Kind
    task: Task
    tag: str = Field(min_length=1, max_length=200)
    base: BaseRef | None = None
    quantization: QuantSpec = QuantSpec()
    adapter: AdapterSpec | None = None
    lineage: tuple[Step, ...] = ()
    files: dict[FileName, FileEntry] = Field(default_factory=dict)
    probe: ProbeRecord | None = None
    adapters: dict[AdapterName, AdapterEntry] = Field(default_factory=dict)

    @model_serializer(mode="wrap")
    def _without_no_adapters(self, inner: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = inner(self)
        return {name: value for name, value in fields.items() if value or name != "adapters"}

    @model_validator(mode="after")
    def _belongs_together(self) -> Self:
        if self.probe is not None and self.files and self.probe.file not in self.files:
            raise ValueError(f"the probe file {self.probe.file!r} is not among the files")
        if self.kind == "adapter" and (self.adapter is None or self.base is None):
            raise ValueError("an adapter needs the fields adapter and base")
        typed = self.quantization.quantized or self.quantization.backend == "gguf"
        if self.kind == "packed" and not typed:
            raise ValueError("a packed checkpoint needs quantization.scheme")
        if self.adapters and self.kind != "onnx":
            raise ValueError(f"a checkpoint of kind {self.kind!r} cannot hold swappable adapters")
        for name, entry in self.adapters.items():
            for file in (entry.file, entry.probe.file):
                if self.files and file not in self.files:
                    raise ValueError(
                        f"the file {file!r} of adapter {name!r} is not among the files"
                    )
        return self

    def with_adapter(self, name: str) -> "Manifest":
        """What the manifest would be if the graph ran with this adapter alone.

        Raises:
            UsageError: there is no adapter of that name; the message lists those there are.
        """
        if name not in self.adapters:
            there = ", ".join(sorted(self.adapters))
            known = f"there are {there}" if there else "the model has no swappable adapters"
            raise UsageError(f"there is no adapter {name!r}: {known}")
        entry = self.adapters[name]
        fields = {"tag": entry.tag, "adapter": entry.adapter, "probe": entry.probe}
        return self.model_copy(update={**fields, "lineage": entry.lineage, "adapters": {}})

    def to_bytes(self) -> bytes:
        """The bytes of `qlx.json`: canonical, and sealed by a digest over all other fields."""
        content = self.model_dump(mode="json")
        return canonical_json({**content, "digest": bytes_digest(canonical_json(content))})

    def with_step(self, step: Step, **changes: Any) -> "Manifest":
        """A copy with `step` appended to the lineage and other fields changed."""
        return self.model_copy(update={**changes, "lineage": (*self.lineage, step)})

    def with_result(self, result: ProbeResult) -> "Manifest":
        """A copy that records one more replay of the probe.

        Raises:
            InputRefused: the checkpoint has no probe.
        """
        if self.probe is None:
            raise InputRefused(f"checkpoint {self.tag!r} has no probe to record a result for")
        probe = self.probe.model_copy(update={"results": (*self.probe.results, result)})
        return self.model_copy(update={"probe": probe})


def parse_manifest(value: Any, where: str) -> Manifest:
    """Validate a parsed `qlx.json`; `where` names the file in errors.

    Raises:
        CorruptCheckpoint: a field is missing, unknown or wrong; the message names it.
    """
    try:
        return Manifest.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise CorruptCheckpoint(f"{where}: field {field}: {first['msg']}") from error
