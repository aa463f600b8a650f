"""What answers requests: one loaded checkpoint behind one small interface, whatever runs it.

ONNX checkpoints run in `qlx.runtime` without torch; other kinds in torch, which is imported only then.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from qlx.checkpoint import Checkpoint, Manifest, open_checkpoint
from qlx.errors import require
from qlx.inputs import ImagePreprocessor, TextCodec
from qlx.runtime import (
    Classifier,
    ImageModel,
    KeypointModel,
    Locator,
    TextGenerator,
    TextModel,
    class_labels,
    generation_limits,
)

__all__ = ["Engine", "LoadedEngine", "load_engine", "summary"]


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


def load_engine(
    path: Path | str, *, name: str | None = None, base: Any = None, threads: int | None = None
) -> LoadedEngine:
    """Open a checkpoint of any kind and make it ready to answer.

    Args:
        path: the checkpoint's directory.
        name: what requests call it; the manifest's tag by default.
        base: the base model, for a run or an adapter (see `qlx.verification.base_of`).
        threads: threads inside one operator; None leaves the choice to the engine.

    Raises:
        InputRefused: not a checkpoint, or its base is missing.
        MissingExtra: the library that runs this kind is not installed.
    """
    checkpoint = open_checkpoint(Path(path))
    name = name or checkpoint.manifest.tag
    if checkpoint.manifest.kind == "onnx":
        return _onnx_engine(checkpoint, name, threads)
    return _torch_engine(checkpoint, name, base, threads)


def _onnx_engine(checkpoint: Checkpoint, name: str, threads: int | None) -> LoadedEngine:
    manifest = checkpoint.manifest
    if manifest.task == "image-classification":
        return LoadedEngine(name, manifest, images=Classifier(checkpoint.path, threads))
    if manifest.task == "heatmap":
        return LoadedEngine(name, manifest, keypoints=Locator(checkpoint.path, threads))
    return LoadedEngine(name, manifest, text=TextGenerator(checkpoint.path, threads))


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
        "tag": manifest.tag,
        "kind": manifest.kind,
        "task": manifest.task,
        "base": manifest.base.name if manifest.base is not None else None,
        "weights": manifest.quantization.scheme if manifest.kind != "merged" else None,
        "verified": None
        if last is None
        else {"passed": last.passed, "step": last.step, "against": last.against, **last.metrics},
    }
