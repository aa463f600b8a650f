"""What answers requests: one loaded checkpoint behind one small interface, whatever runs it.

ONNX checkpoints run in `qlx.runtime` without torch; other kinds in torch, which is imported only then.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from qlx.checkpoint import Checkpoint, Manifest, open_checkpoint
from qlx.errors import UsageError, require
from qlx.inputs import ImagePreprocessor, TextCodec
from qlx.runtime import (
    Classifier,
    Device,
    ImageModel,
    KeypointModel,
    Locator,
    TextGenerator,
    TextModel,
    class_labels,
    generation_limits,
    open_model,
)

__all__ = ["Engine", "LoadedEngine", "load_engine", "load_engines", "summary"]


class Engine(Protocol):
    """A model under a name; exactly one of `images`, `keypoints` and `text` is set, by its task."""

    @property
    def name(self) -> str:
        """The name requests use."""
        ...

    @property
    def manifest(self) -> Manifest:
        """The checkpoint's manifest."""
        ...

    @property
    def parent(self) -> str | None:
        """The name of the engine whose model this is with an adapter; None where it is its own."""
        ...

    @property
    def images(self) -> ImageModel | None:
        """Classifies images, if the model does."""
        ...

    @property
    def keypoints(self) -> KeypointModel | None:
        """Finds places in images, if the model does."""
        ...

    @property
    def text(self) -> TextModel | None:
        """Continues text, if the model does."""
        ...


@dataclass(frozen=True)
class LoadedEngine:
    """An engine over a checkpoint that has been opened and checked."""

    name: str
    manifest: Manifest
    images: ImageModel | None = None
    text: TextModel | None = None
    keypoints: KeypointModel | None = None
    parent: str | None = None


def load_engine(
    path: Path | str,
    *,
    name: str | None = None,
    base: Any = None,
    threads: int | None = None,
    device: Device = "cpu",
) -> LoadedEngine:
    """Open a checkpoint of any kind and make it ready to answer.

    Args:
        path: the checkpoint's directory.
        name: what requests call it; the manifest's tag by default.
        base: the base model, for a run or an adapter (see `qlx.verification.base_of`).
        threads: threads inside one operator; None leaves the choice to the engine.
        device: where an ONNX checkpoint runs; other kinds run on the CPU.

    Raises:
        InputRefused: not a checkpoint, or its base is missing.
        UsageError: a device other than the CPU for a checkpoint of another kind.
        MissingExtra: the library that runs this kind, or drives the device, is not installed.
    """
    checkpoint = open_checkpoint(Path(path))
    name = name or checkpoint.manifest.tag
    if checkpoint.manifest.kind == "onnx":
        return _onnx_engine(checkpoint, name, threads, device)
    if device != "cpu":
        raise UsageError(
            f"{path}: --device {device} is for ONNX checkpoints, this is of kind {checkpoint.manifest.kind!r}; "
            "export it first with qlx export-onnx"
        )
    return _torch_engine(checkpoint, name, base, threads)


def load_engines(
    path: Path | str,
    *,
    name: str | None = None,
    base: Any = None,
    threads: int | None = None,
    device: Device = "cpu",
) -> list[LoadedEngine]:
    """`load_engine`, and an engine for each of the checkpoint's swappable adapters under the adapter's name.

    All of them share one session.
    """
    engine = load_engine(path, name=name, base=base, threads=threads, device=device)
    return [engine, *(_with_adapter(engine, adapter) for adapter in engine.manifest.adapters)]


def _with_adapter(engine: LoadedEngine, adapter: str) -> LoadedEngine:
    manifest, parent = engine.manifest.with_adapter(adapter), engine.name
    images, keypoints, text = engine.images, engine.keypoints, engine.text
    if isinstance(images, Classifier):
        images = images.with_adapter(adapter)
    if isinstance(keypoints, Locator):
        keypoints = keypoints.with_adapter(adapter)
    if isinstance(text, TextGenerator):
        text = text.with_adapter(adapter)
    return LoadedEngine(adapter, manifest, images, text, keypoints, parent)


def _onnx_engine(
    checkpoint: Checkpoint, name: str, threads: int | None, device: Device
) -> LoadedEngine:
    manifest, model = checkpoint.manifest, open_model(checkpoint.path, threads, device)
    if manifest.task == "image-classification":
        return LoadedEngine(name, manifest, images=Classifier(model))
    if manifest.task == "heatmap":
        return LoadedEngine(name, manifest, keypoints=Locator(model))
    return LoadedEngine(name, manifest, text=TextGenerator(model))


def _torch_engine(
    checkpoint: Checkpoint, name: str, base: Any, threads: int | None
) -> LoadedEngine:
    torch = require("torch", "train")
    from qlx.models import TorchPredictor, load_model
    from qlx.models.decoding import TorchDecoder
    from qlx.verification import base_of

    if threads is not None:
        torch.set_num_threads(threads)
    manifest, path = checkpoint.manifest, checkpoint.path
    model: Any = load_model(checkpoint, base_of(checkpoint, base)).eval()
    if manifest.task != "causal-lm":
        predictor = TorchPredictor(model, manifest.task)
        parts = ImagePreprocessor.from_directory(path), predictor, class_labels(path)
        if manifest.task == "heatmap":
            return LoadedEngine(name, manifest, keypoints=KeypointModel(*parts))
        return LoadedEngine(name, manifest, ImageModel(*parts))
    length, ends = generation_limits(model.config, model.generation_config)
    text = TextModel(TextCodec.from_directory(path), length, ends, lambda: TorchDecoder(model))
    return LoadedEngine(name, manifest, text=text)


def summary(engine: Engine) -> dict[str, Any]:
    """What `GET /v1/models` says about a model: OpenAI's fields, then kind, task and verified distance."""
    manifest = engine.manifest
    results = manifest.probe.results if manifest.probe is not None else ()
    last = results[-1] if results else None
    return {
        "id": engine.name,
        "object": "model",
        "owned_by": "qlx",
        **({} if engine.parent is None else {"parent": engine.parent}),
        "tag": manifest.tag,
        "kind": manifest.kind,
        "task": manifest.task,
        "base": manifest.base.name if manifest.base is not None else None,
        "weights": manifest.quantization.scheme if manifest.kind != "merged" else None,
        "verified": None
        if last is None
        else {"passed": last.passed, "step": last.step, "against": last.against, **last.metrics},
    }
