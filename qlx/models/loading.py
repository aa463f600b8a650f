"""Loading models into torch: a base, plain or quantized and guarded; any checkpoint that torch can run."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlx.checkpoint import (
    Checkpoint,
    Manifest,
    QuantSpec,
    Source,
    Task,
    require_base,
    resolve_source,
)
from qlx.errors import CorruptCheckpoint, InputRefused, Mismatch, Unsupported, require
from qlx.models.architectures import CONFIG_FILE, Labels, auto_class, quiet_head, read_config
from qlx.models.coded import load_codes, stored_codes, without_report
from qlx.models.llama_cpp import load_gguf
from qlx.models.names import tensor_names
from qlx.models.offload import MappedWeights, lend_layers
from qlx.models.unfilled import fill, parameters_on_meta, without_tensor
from qlx.quant import (
    StoredQuantization,
    bnb_config,
    guard_bitsandbytes,
    packed_fingerprint,
    packed_modules,
    packed_of_module,
    quantize_model,
    set_compute_dtype,
)
from qlx.weights import open_weights, read_tensor, read_tensors, torch_dtype

__all__ = [
    "STORED_DTYPE",
    "computing_in",
    "empty_model",
    "load_as_trained",
    "load_base",
    "load_model",
    "model_config",
    "original_weights",
    "quantized_fingerprint",
    "torch_float",
    "with_quantized_names",
]

_FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HEADS = ("classifier.", "score.", "head.")
STORED_DTYPE = "stored_dtype"
"""Key in `QuantSpec.extras`: the dtype the base was loaded in before it was quantized."""


def torch_float(name: str) -> torch.dtype:
    """The torch dtype of a float type's name in recipes and manifests.

    Raises:
        Unsupported: not float32, bfloat16 or float16.
    """
    if name not in _FLOATS:
        raise Unsupported(f"dtype {name!r} is not one of {', '.join(_FLOATS)}")
    return _FLOATS[name]


def load_base(
    source_path: Path,
    task: Task,
    *,
    dtype: torch.dtype = torch.float32,
    quant: QuantSpec | None = None,
    config_from: Path | None = None,
    new_head: Labels | None = None,
    folder: Path | None = None,
) -> nn.Module:
    """Load a model directory, quantized and guarded if `quant` has a scheme, in evaluation mode.

    Args:
        source_path: directory with `config.json` and safetensors weights.
        task: what the model is for.
        dtype: of the weights that are not quantized, and of the values before quantization.
        quant: how to quantize (`mode` manual: layer by layer afterwards; hf: while loading).
        config_from: take `config.json` from this directory instead (an adapter's own).
        new_head: replace the classification head by a fresh one for these classes.
        folder: leave the weights on disk, mapped from the directory's files, and from copies in this
            folder where they are quantized or of another dtype (see `qlx.models.offload`).

    Raises:
        InputRefused: files are missing, or weights the model needs are not in them.
        UnsafeInput, Unsupported: see `read_config`.
    """
    source_path = Path(source_path)
    described = Path(config_from or source_path)
    config = _config(described, task, new_head)
    stored = _codes_to_load(source_path, quant)
    if folder is not None:
        if new_head is not None:
            raise Unsupported(
                f"{source_path}: a new head is made with the weights in memory only; leave out the offloading"
            )
        mapped = _mapped(
            source_path, task, config, dtype, stored, quant, folder,
            head_may_differ=config_from is not None,
        )  # fmt: skip
        return mapped.eval()
    theirs = stored is not None and stored.method == "bitsandbytes"
    if theirs:
        require("bitsandbytes", "train")
        config.quantization_config = read_config(source_path)["quantization_config"]
    ours = None if theirs else stored
    if ours is not None and config_from is None and new_head is None:
        model = _from_codes(source_path, task, config, dtype, ours, quant)
        if model is not None:
            return model.eval()
    on_load = stored is None and quant is not None and quant.quantized and quant.mode == "hf"
    options = {"quantization_config": bnb_config(quant)} if on_load and quant else {}
    if theirs or on_load:
        options["device_map"] = {"": "cpu"}  # else transformers takes a GPU where there is one
    with without_report(ours is not None):
        try:
            with _described_by(described):
                model, info = _from_pretrained(source_path, task, config, dtype, options)
        except RuntimeError:
            empty_model(described, task)  # refuses it, if its sizes are what went wrong
            raise
    names = tensor_names(model, source_path) if ours is not None else {}
    coded = load_codes(model, source_path, names, ours, quant) if ours is not None else []
    _check_loaded(
        source_path, info, coded, head_may_differ=new_head is not None or config_from is not None
    )
    if new_head is not None and task == "heatmap":
        quiet_head(model)
    if theirs or on_load:
        _guard(model, quant)
    elif stored is None and quant is not None and quant.quantized:
        quantize_model(model, quant)
    return model.eval()


def _from_codes(
    path: Path,
    task: Task,
    config: Any,
    dtype: torch.dtype,
    stored: StoredQuantization,
    quant: QuantSpec | None,
) -> nn.Module | None:
    """A model of packed layers, none of which was ever in memory unpacked.

    None where parameters are not tensors of the files one by one (fused experts), or are missing:
    transformers can tell which.
    """
    with parameters_on_meta(), _described_by(path, RuntimeError):
        model: nn.Module = auto_class(task).from_config(config, dtype=dtype)
    names, weights = tensor_names(model, path), open_weights(path)
    coded = frozenset(stored.weight_names(weights))
    if without_tensor(model, names, weights, coded):
        return None
    plain = {name: disk for name, disk in names.items() if disk not in coded}

    def read(name: str) -> torch.Tensor:
        tensor = read_tensor(weights, name)
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    fill(model, plain, read)
    load_codes(model, path, names, stored, quant)
    return model


def _mapped(
    path: Path,
    task: Task,
    config: Any,
    dtype: torch.dtype,
    stored: StoredQuantization | None,
    quant: QuantSpec | None,
    folder: Path,
    *,
    head_may_differ: bool,
) -> nn.Module:
    """A model whose weights stay in its files, or in `folder` where they are converted or quantized.

    Raises:
        Unsupported: a parameter is not one tensor of the files (fused experts).
    """
    with torch.random.fork_rng(devices=[]), parameters_on_meta(), _described_by(path, RuntimeError):
        model: nn.Module = auto_class(task).from_config(config, dtype=dtype)
    names, files = tensor_names(model, path), MappedWeights(open_weights(path), folder)
    coded = frozenset(stored.weight_names(files.weights)) if stored else frozenset()
    lost = without_tensor(model, names, files.weights, coded)
    foreign = [name for name in lost if not (head_may_differ and name.startswith(_HEADS))]
    if foreign:
        raise Unsupported(
            f"{path}: the parameter {foreign[0]!r} is not one tensor of these files, so its layer cannot be "
            "read from them as it runs; leave out the offloading"
        )
    plain = {name: disk for name, disk in names.items() if disk not in coded and name not in lost}
    fill(model, plain, lambda name: files.tensor(name, dtype))
    fill(model, {name: name for name in lost}, _zeros_like(model, dtype))
    if stored is not None:
        load_codes(model, path, names, stored, quant, files.keep)
    elif quant is not None and quant.quantized:
        quantize_model(model, quant, files.keep)
    return model


def _zeros_like(model: nn.Module, dtype: torch.dtype) -> Callable[[str], torch.Tensor]:
    """Zeros for a parameter by its name: a head that an adapter brings along."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return lambda name: torch.zeros(shapes[name], dtype=dtype)


def empty_model(directory: Path, task: Task) -> nn.Module:
    """The plain architecture of a directory, without weights (on torch's meta device)."""
    config = model_config(directory, task)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"), _described_by(Path(directory), RuntimeError):
        model: nn.Module = auto_class(task).from_config(config)
    return model.eval()


def model_config(directory: Path, task: Task) -> Any:
    """The transformers configuration of a directory's model.

    Raises:
        CorruptCheckpoint, UnsafeInput, Unsupported: `config.json` cannot be used.
    """
    return _config(Path(directory), task, None)


def _config(directory: Path, task: Task, new_head: Labels | None) -> Any:
    raw = read_config(directory, task)
    raw = {key: value for key, value in raw.items() if key != "quantization_config"}
    transformers = require("transformers", "train")
    with _described_by(directory):
        config = transformers.CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    if new_head is not None:
        for name, value in new_head.as_config().items():
            setattr(config, name, value)
    return config


def _codes_to_load(directory: Path, quant: QuantSpec | None) -> StoredQuantization | None:
    """How `directory` stores its weights as codes, if it does and `quant` means the same."""
    open_weights(directory)
    stored = stored_codes(directory)
    if (
        stored is not None
        and quant is not None
        and quant.quantized
        and quant.backend != stored.method
    ):
        raise Unsupported(
            f"{directory}: its weights are {stored.method} codes already and cannot be quantized to {quant.scheme}; "
            "leave out the section quantization, or start from the plain model"
        )
    return stored


def _guard(model: nn.Module, quant: QuantSpec | None) -> None:
    """Make the layers of bitsandbytes exact, and let them compute as `quant` says, if it does."""
    guard_bitsandbytes(model)
    if quant is not None and quant.quantized:
        set_compute_dtype(model, torch_float(quant.compute_dtype))


def _from_pretrained(
    path: Path, task: Task, config: Any, dtype: torch.dtype, options: Mapping[str, Any]
) -> tuple[nn.Module, Any]:
    with torch.random.fork_rng(devices=[]), _no_progress_bar():
        torch.manual_seed(0)
        model, info = auto_class(task).from_pretrained(
            path,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    return model, info


@contextmanager
def _described_by(directory: Path, *more: type[Exception]) -> Iterator[None]:
    """Take errors of transformers, and `more`, as the fault of a directory's configuration; name both.

    Raises:
        CorruptCheckpoint: in place of what transformers raised.
    """
    strict = require("huggingface_hub.errors", "train").StrictDataclassError
    try:
        yield
    except UnicodeError:  # a path, not the configuration
        raise
    except (
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        ArithmeticError,
        strict,
        *more,
    ) as error:
        what = " ".join(str(error).split())
        raise CorruptCheckpoint(
            f"{directory / CONFIG_FILE}: transformers cannot use it ({what}); correct the field"
        ) from error


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Transformers draws a bar for each loading; commands report in lines."""
    logging = require("transformers.utils.logging", "train")
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _check_loaded(
    path: Path, info: Any, coded: Iterable[str] = (), *, head_may_differ: bool
) -> None:
    """Transformers fills what the files lack with random numbers; only a new head may be that."""
    wrong = {*info["missing_keys"], *(item[0] for item in info["mismatched_keys"])}
    wrong -= {f"{module}.weight" for module in coded}
    if head_may_differ:
        wrong = {name for name in wrong if not name.startswith(_HEADS)}
    if wrong:
        raise InputRefused(
            f"{path}: tensor {min(wrong)!r} ({len(wrong)} in all) is missing or of another shape, so the model would "
            "have random weights there; give a directory whose weights fit its config.json"
        )


def with_quantized_names(model: nn.Module, spec: QuantSpec, directory: Path) -> QuantSpec:
    """`spec` completed with what became of it: modules, their tensors in the base's files, fingerprint.

    Raises:
        Unsupported: a quantized weight has no tensor of its own in the base's files.
    """
    modules = sorted(name for name, _ in packed_modules(model))
    stored = tensor_names(model, directory)
    missing = [name for name in modules if f"{name}.weight" not in stored]
    if missing:
        raise Unsupported(
            f"{directory}: the weight of {missing[0]!r} is not a tensor of its own in these files"
        )
    tensors = tuple(stored[f"{name}.weight"] for name in modules)
    fingerprint = quantized_fingerprint(model, stored)
    return spec.model_copy(
        update={"modules": tuple(modules), "tensors": tensors, "fingerprint": fingerprint}
    )


def quantized_fingerprint(model: nn.Module, stored: Mapping[str, str]) -> str:
    """Fingerprint of all codes and scales, by the names `stored` gives the weights on disk."""
    return packed_fingerprint(
        (stored[f"{name}.weight"], packed_of_module(layer)) for name, layer in packed_modules(model)
    )


def load_model(
    checkpoint: Checkpoint,
    base: Source | None = None,
    *,
    compute_dtype: torch.dtype = torch.float32,
    folder: Path | None = None,
) -> nn.Module:
    """Any checkpoint torch can run, in evaluation mode, computing in `compute_dtype`.

    A run or adapter is its base, quantized as recorded, with the adapter attached; merged weights
    and full runs are loaded as they are; packed ones stay packed, except those in GGUF, which
    become fp32. With `folder` weights stay on disk and are lent to each layer while it runs; what
    has to be quantized for that is written there, and the folder is to outlive the model.

    Raises:
        Mismatch: `base` is not the recorded one, or quantizes to other codes than training saw.
        InputRefused: the base is not to be had, or an ONNX checkpoint was given.
    """
    manifest = checkpoint.manifest
    if manifest.kind == "onnx":
        raise InputRefused(
            f"{checkpoint.path}: an ONNX checkpoint runs in onnxruntime, not in torch"
        )
    if (
        manifest.adapter is not None
        and manifest.adapter.type != "full"
        and manifest.kind in ("run", "adapter")
    ):
        return _adapted(checkpoint, base, compute_dtype, folder)
    if manifest.quantization.backend == "gguf":
        if folder is not None:
            raise Unsupported(
                f"{checkpoint.path}: a GGUF file is unpacked, so it cannot be offloaded"
            )
        return load_gguf(checkpoint.path, model_config(checkpoint.path, manifest.task))
    rounds_inputs = manifest.kind == "packed" and manifest.quantization.activation_bits is not None
    quant = manifest.quantization if rounds_inputs else None
    dtype = compute_dtype if folder is None else _main_dtype(checkpoint.path, compute_dtype)
    model = load_base(checkpoint.path, manifest.task, dtype=dtype, quant=quant, folder=folder)
    if folder is not None:
        lend_layers(model.requires_grad_(False), model.parameters())
    return computing_in(model, compute_dtype)


def _main_dtype(directory: Path, otherwise: torch.dtype) -> torch.dtype:
    """The float type that most weights of a directory are stored in: mapped, they need no copies."""
    sizes: dict[str, int] = {}
    for info in open_weights(directory).values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    floats = {name: size for name, size in sizes.items() if name in ("F32", "BF16", "F16")}
    return torch_dtype(max(floats, key=floats.__getitem__)) if floats else otherwise


def _adapted(
    checkpoint: Checkpoint, base: Source | None, compute_dtype: torch.dtype, folder: Path | None
) -> nn.Module:
    from qlx.adapters import load_adapter

    source = base or _recorded_base(checkpoint.manifest, checkpoint.path)
    if checkpoint.manifest.adapter is not None and checkpoint.manifest.adapter.type == "exact":
        return computing_in(_moved(checkpoint, source, folder), compute_dtype).eval()
    model = load_as_trained(checkpoint, source, config_from=checkpoint.path, folder=folder)
    weights = list(model.parameters())
    adapted: nn.Module = load_adapter(model, checkpoint.path)
    if folder is not None:
        lend_layers(adapted.requires_grad_(False), weights)
    return computing_in(adapted, compute_dtype).eval()


def _moved(checkpoint: Checkpoint, source: Source, folder: Path | None) -> nn.Module:
    """The base with the codes that an exact adapter was trained to.

    Raises:
        Unsupported: it is to be offloaded.
        Mismatch: the codes are others than those of the training.
    """
    from qlx.adapters import put_exact, read_exact, require_exact_codes

    manifest, path = checkpoint.manifest, checkpoint.path
    assert manifest.adapter is not None
    if folder is not None:
        raise Unsupported(
            f"{path}: an exact adapter makes its codes from the base's weights in memory, so it cannot be offloaded; "
            "pack it, and offload that"
        )
    model = load_as_trained(checkpoint, source, config_from=path)
    names = tensor_names(model, source.path)
    stored = torch_float(str(manifest.quantization.extras.get(STORED_DTYPE, "float32")))
    original = original_weights(source.path, names, stored)
    put_exact(model, read_exact(path, manifest.adapter), original, path)
    require_exact_codes(manifest.adapter, quantized_fingerprint(model, names), str(path))
    return model


def load_as_trained(
    checkpoint: Checkpoint,
    source: Source,
    *,
    config_from: Path | None = None,
    folder: Path | None = None,
) -> nn.Module:
    """The base of a run or adapter as training saw it, without the adapter; see `load_base`.

    Raises:
        Mismatch: it is not the recorded one, or quantizes to other codes.
    """
    manifest = checkpoint.manifest
    require_base(manifest, source)
    stored = torch_float(str(manifest.quantization.extras.get(STORED_DTYPE, "float32")))
    model = load_base(
        source.path,
        manifest.task,
        dtype=stored,
        quant=manifest.quantization,
        config_from=config_from,
        folder=folder,
    )
    _require_same_codes(model, manifest, source)
    return model


def original_weights(
    base: Path, names: Mapping[str, str], dtype: torch.dtype
) -> Callable[[str], torch.Tensor | None]:
    """A module's weight before it was quantized, as training loads it: from the base's files, one at a time.

    None where the base's files hold codes. `names` maps parameters in memory to tensors in the files.
    """
    coded = stored_codes(base) is not None

    def read(module: str) -> torch.Tensor | None:
        name = names[f"{module}.weight"]
        return None if coded else read_tensors(base, [name])[name].to(dtype)

    return read


def _recorded_base(manifest: Manifest, path: Path) -> Source:
    if manifest.base is None:
        raise Mismatch(f"{path}: the checkpoint records no base model")
    try:
        return resolve_source(manifest.base.name, manifest.base.revision)
    except InputRefused as error:
        raise InputRefused(
            f"{path}: needs its base model {manifest.base.name}; give it with --base ({error})"
        ) from error


def _require_same_codes(model: nn.Module, manifest: Manifest, source: Source) -> None:
    recorded = manifest.quantization.fingerprint
    if recorded is None:
        return
    found = quantized_fingerprint(model, tensor_names(model, source.path))
    if found != recorded:
        raise Mismatch(
            f"{source.name}: quantizes to other codes than training saw ({found[7:19]}…, recorded {recorded[7:19]}…); "
            "the quantization or the library that made it differs"
        )


def computing_in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast the unquantized weights to `dtype` and let quantized layers compute in it, in place.

    Codes, scales and buffers (rotary frequencies, for one) stay as they are.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    set_compute_dtype(model, dtype)
    return model
