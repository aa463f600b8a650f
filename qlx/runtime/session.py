"""onnxruntime sessions over verified checkpoints: one place for options, digests and provider choice."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import onnxruntime as ort

from qlx.checkpoint import Checkpoint, open_checkpoint
from qlx.errors import CorruptCheckpoint, InputRefused, Unsupported
from qlx.runtime.adapters import Adapters
from qlx.runtime.devices import Device, need_device, providers_of, ran_on
from qlx.runtime.graph_guard import check_graph
from qlx.runtime.pages import in_huge_pages

__all__ = [
    "DATA_FILE",
    "FUSED_ATTENTION",
    "GRAPH_FILE",
    "OnnxModel",
    "open_model",
    "opened",
    "runtime_errors",
]

GRAPH_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
FUSED_ATTENTION = "GroupQueryAttention"


@dataclass(frozen=True)
class OnnxModel:
    """An opened ONNX checkpoint: the verified directory and a session over its graph.

    `shapes` maps each input's name to its shape; a name stands for a free dimension. `fused`: the graph's
    attention is onnxruntime's own operator, which appends to the cache in place.
    """

    checkpoint: Checkpoint
    session: ort.InferenceSession
    device: Device = "cpu"
    fused: bool = False

    @property
    def path(self) -> Path:
        """The checkpoint's directory."""
        return self.checkpoint.path

    @property
    def task(self) -> str:
        """`image-classification`, `heatmap` or `causal-lm`."""
        return self.checkpoint.manifest.task

    @property
    def shapes(self) -> dict[str, list[int | str]]:
        """Shape of every graph input."""
        return {item.name: item.shape for item in self.session.get_inputs()}

    @property
    def outputs(self) -> list[str]:
        """Names of the graph's outputs, in order."""
        return [item.name for item in self.session.get_outputs()]

    @cached_property
    def adapters(self) -> Adapters:
        """The adapters that runs can be given, by name."""
        return Adapters(self.checkpoint, self.session)

    def run(
        self,
        outputs: Sequence[str],
        inputs: Mapping[str, ort.OrtValue],
        stay: Collection[str] = (),
    ) -> list[ort.OrtValue]:
        """Run the graph; outputs come back to the CPU's memory, those in `stay` remain on the device."""
        if self.device == "cpu":
            return list(self.session.run_with_ort_values(outputs, dict(inputs)))
        return ran_on(self.session, self.device, outputs, inputs, stay)


def open_model(
    directory: Path | str, threads: int | None = None, device: Device = "cpu"
) -> OnnxModel:
    """Open an ONNX checkpoint.

    Every file's digest is checked and the graph inspected before onnxruntime reads a byte. The
    session is deterministic: sequential execution, deterministic kernels, a fixed thread count. A language
    model's weights are moved to huge pages (`in_huge_pages`), because each token reads all of them.

    Args:
        directory: a checkpoint of kind `onnx`.
        threads: threads inside one operator; None leaves the choice to onnxruntime (all cores).
        device: where to run; what `cuda` has no kernel for runs on the CPU.

    Raises:
        MissingExtra: onnxruntime cannot use the device.
        InputRefused: not an ONNX checkpoint.
        CorruptCheckpoint: a digest differs, or the graph is not readable.
        UnsafeInput: the graph names foreign operators or files.
        Unsupported: onnxruntime cannot run the graph; its reason is in the message.
    """
    need_device(device)
    checkpoint = open_checkpoint(Path(directory))
    manifest = checkpoint.manifest
    if manifest.kind != "onnx":
        raise InputRefused(
            f"{directory}: a checkpoint of kind {manifest.kind!r}; export it first with qlx export-onnx"
        )
    if GRAPH_FILE not in manifest.files:
        raise CorruptCheckpoint(f"{directory}: the manifest lists no {GRAPH_FILE}")
    graph = checkpoint.path / GRAPH_FILE
    data = graph.read_bytes()
    if hashlib.sha256(data).hexdigest() != manifest.files[GRAPH_FILE].sha256:
        raise CorruptCheckpoint(f"{graph}: changed while it was being opened")
    sizes = {name: entry.size for name, entry in manifest.files.items()}
    facts = check_graph(data, str(graph), sizes)
    often_read = manifest.task == "causal-lm" and device == "cpu"
    with in_huge_pages() if often_read else nullcontext():
        session = _session(data, graph, session_options(threads), device)
    return OnnxModel(checkpoint, session, device, FUSED_ATTENTION in facts.operators)


def opened(
    model: Path | str | OnnxModel, threads: int | None = None, device: Device = "cpu"
) -> OnnxModel:
    """The model itself where it is open already, else `open_model` of the directory."""
    return model if isinstance(model, OnnxModel) else open_model(model, threads, device)


def _session(
    data: bytes, graph: Path, options: ort.SessionOptions, device: Device
) -> ort.InferenceSession:
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(graph.parent)
    )
    try:
        session = ort.InferenceSession(data, options, providers=providers_of(device))
    except runtime_errors() as error:
        raise Unsupported(
            f"{graph}: onnxruntime {ort.__version__} cannot load it ({_first_line(error)})"
        ) from error
    need_device(device, session)
    return session


def session_options(threads: int | None = None) -> ort.SessionOptions:
    """Session options that give the same outputs for the same inputs, run after run."""
    options = ort.SessionOptions()
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.inter_op_num_threads = 1
    options.intra_op_num_threads = threads or 0
    options.use_deterministic_compute = True
    options.log_severity_level = 3
    return options


def runtime_errors() -> tuple[type[Exception], ...]:
    """What onnxruntime raises where it cannot load or run a graph."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return (
        state.Fail,
        state.InvalidGraph,
        state.InvalidProtobuf,
        state.NotImplemented,
        state.InvalidArgument,
        state.RuntimeException,
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
