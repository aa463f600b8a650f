"""`qlx save-adapter`: the adapter of a run, or a plain PEFT directory, as an adapter checkpoint."""

from pathlib import Path
from typing import Literal

from qlx.adapters import EXACT_FILE, adapter_spec, read_recorded
from qlx.adapters import load_adapter as attach_from
from qlx.adapters import save_adapter as write_adapter
from qlx.checkpoint import (
    PROBE_FILE,
    Checkpoint,
    Manifest,
    ProbeRecord,
    QuantSpec,
    Source,
    check_output,
    fingerprint_directory,
    is_checkpoint,
    new_checkpoint,
    next_step,
    open_checkpoint,
    require_base,
    resolve_source,
    seal,
    write_probe,
)
from qlx.errors import InputRefused, Unsupported, UsageError
from qlx.inputs import PREPROCESSOR_FILE, TOKENIZER_FILES
from qlx.models import (
    CONFIG_FILE,
    GGUF_ADAPTER_FILE,
    STORED_DTYPE,
    empty_model,
    gguf_layout,
    load_base,
    make_probe,
    model_config,
    stored_codes,
    synthetic_inputs,
    task_of,
    tensor_names,
    with_quantized_names,
    write_gguf_adapter,
)
from qlx.training.material import GENERATION_FILE
from qlx.training.small import store_in_int8

__all__ = ["save_adapter"]

_CARRIED = (*TOKENIZER_FILES, PREPROCESSOR_FILE, GENERATION_FILE)
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_SYNTHETIC = "the unmerged model on its base, in fp32, on synthetic inputs"


def save_adapter(
    source: Path,
    output: Path,
    *,
    base: str | None = None,
    gguf: bool = False,
    dtype: Literal["int8"] | None = None,
    force: bool = False,
) -> Checkpoint:
    """Write an adapter checkpoint, which plain PEFT loads as it is.

    A run's adapter is copied byte for byte, with its probe. A plain PEFT directory needs `base`: the
    adapter is attached to it, a probe is made from synthetic inputs, and the lineage starts here.

    Args:
        source: a run with an adapter, an adapter checkpoint, or a PEFT directory.
        output: the directory to make.
        base: directory or hub name of the base; checked against the record of a run.
        gguf: also write it as `adapter.gguf`, which llama.cpp takes.
        dtype: store the factors of linear layers in 8 bits, if the outputs stay (see `store_in_int8`).
        force: replace an existing checkpoint.

    Raises:
        InputRefused: `source` holds no adapter.
        Unsupported: `gguf`, and llama.cpp has no place for such an adapter.
        Mismatch: `base` is not what the run was trained on, or the PEFT adapter does not fit it.
        UsageError: a plain PEFT directory without `base`.
    """
    source = Path(source)
    check_output(Path(output), (source, base), force=force)
    if is_checkpoint(source):
        return _from_run(open_checkpoint(source), Path(output), base, gguf, dtype, force)
    if not (source / _ADAPTER_FILES[0]).is_file():
        raise InputRefused(
            f"{source}: neither a qlx checkpoint nor a PEFT adapter (no {_ADAPTER_FILES[0]})"
        )
    if base is None:
        raise UsageError(
            f"{source}: a plain PEFT directory does not name its base by content; give --base"
        )
    if dtype is not None:
        raise UsageError(
            f"{source}: a plain PEFT directory; save it without --dtype first, then the result with it"
        )
    return _from_peft(source, resolve_source(base), Path(output), gguf, force)


def _from_run(
    run: Checkpoint,
    output: Path,
    base: str | None,
    gguf: bool,
    dtype: Literal["int8"] | None,
    force: bool,
) -> Checkpoint:
    manifest = run.manifest
    if (
        manifest.kind not in ("run", "adapter")
        or manifest.adapter is None
        or manifest.adapter.type == "full"
    ):
        raise InputRefused(
            f"{run.path}: a checkpoint of kind {manifest.kind!r} without an adapter of its own"
        )
    if base is not None:
        require_base(manifest, resolve_source(base))
    options = {} if dtype is None else {"dtype": dtype}
    step = next_step("save-adapter", parents=(run.digest,), options=options)
    wanted = {*_ADAPTER_FILES, EXACT_FILE, *_CARRIED, CONFIG_FILE, PROBE_FILE}
    with new_checkpoint(output, force=force) as staging:
        for name in sorted(wanted & manifest.files.keys()):
            (staging / name).write_bytes((run.path / name).read_bytes())
        if dtype is not None:
            manifest = store_in_int8(staging, manifest, base)
        if gguf:
            _write_gguf(staging, manifest)
        seal(staging, manifest.with_step(step, kind="adapter", files={}))
    return open_checkpoint(output)


def _from_peft(source: Path, base: Source, output: Path, gguf: bool, force: bool) -> Checkpoint:
    task = task_of(base)
    loaded = {STORED_DTYPE: "float32"}
    stored = stored_codes(base.path)
    quantization = QuantSpec(extras=loaded) if stored is None else stored.spec(extras=loaded)
    names = tensor_names(model := load_base(base.path, task, quant=quantization), base.path)
    if quantization.quantized:
        quantization = with_quantized_names(model, quantization, base.path)
    adapted = attach_from(model, source)
    inputs = synthetic_inputs(task, adapted.config)
    manifest = Manifest(
        kind="adapter",
        task=task,
        tag=f"{base.reference().name.rstrip('/').rpartition('/')[2]}_{source.resolve().name}"[:200],
        base=base.reference(),
        quantization=quantization,
        adapter=adapter_spec(adapted, names),
        lineage=(
            next_step(
                "save-adapter",
                parents=(fingerprint_directory(source), base.fingerprint),
                options={"imported": "a plain PEFT directory"},
            ),
        ),
        probe=ProbeRecord(reference=_SYNTHETIC),
    )
    with new_checkpoint(output, force=force) as staging:
        write_adapter(adapted, staging, base_name=base.reference().name)
        _carry(staging, source, base)
        write_probe(staging / PROBE_FILE, make_probe(adapted, task, inputs, None, True))
        if gguf:
            _write_gguf(staging, manifest)
        seal(staging, manifest)
    return open_checkpoint(output)


def _write_gguf(staging: Path, manifest: Manifest) -> None:
    """Add `adapter.gguf` to an adapter's directory.

    Raises:
        Unsupported: it is no language model's, or not one that llama.cpp has a place for.
    """
    if manifest.task != "causal-lm" or manifest.adapter is None:
        raise Unsupported("--gguf is for adapters of language models; leave it out")
    write_gguf_adapter(
        staging / GGUF_ADAPTER_FILE,
        read_recorded(staging, manifest.adapter),
        manifest.adapter.tensors,
        empty_model(staging, manifest.task),
        gguf_layout(model_config(staging, manifest.task)),
        manifest.tag,
    )


def _carry(staging: Path, source: Path, base: Source) -> None:
    """Tokenizer and preprocessing files, the adapter's own before the base's; the base's config."""
    for name in (*_CARRIED, CONFIG_FILE):
        places = (base.path / name,) if name == CONFIG_FILE else (source / name, base.path / name)
        found = next((path for path in places if path.is_file()), None)
        if found is not None:
            (staging / name).write_bytes(found.read_bytes())
