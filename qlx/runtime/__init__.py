"""Running exported models: onnxruntime sessions, classification, places, text generation. Never torch.

Needs numpy, onnxruntime, tokenizers (text) and Pillow (images). Files are checked against the
manifest before onnxruntime reads them.
"""

from qlx.runtime.adapters import ADAPTER_PARTS, ADAPTER_SUFFIX, AdapterChoice, Adapters
from qlx.runtime.classify import (
    Classification,
    Classifier,
    ImageModel,
    class_labels,
    classification,
)
from qlx.runtime.decoder import CausalDecoder, positions
from qlx.runtime.devices import DEVICES, Device
from qlx.runtime.generate import (
    GENERATION_FILE,
    FinishReason,
    Generation,
    TextGenerator,
    TextModel,
    TextPiece,
    TokenDecoder,
    generation_limits,
)
from qlx.runtime.graph_guard import check_graph
from qlx.runtime.locate import KeypointModel, Location, Locator
from qlx.runtime.predictor import OnnxPredictor
from qlx.runtime.sampling import Sampler, SamplingOptions, next_distribution
from qlx.runtime.session import DATA_FILE, GRAPH_FILE, OnnxModel, open_model, session_options
from qlx.runtime.text import TextStream

__all__ = [
    "ADAPTER_PARTS",
    "ADAPTER_SUFFIX",
    "DATA_FILE",
    "DEVICES",
    "GENERATION_FILE",
    "GRAPH_FILE",
    "AdapterChoice",
    "Adapters",
    "CausalDecoder",
    "Classification",
    "Classifier",
    "Device",
    "FinishReason",
    "Generation",
    "ImageModel",
    "KeypointModel",
    "Location",
    "Locator",
    "OnnxModel",
    "OnnxPredictor",
    "Sampler",
    "SamplingOptions",
    "TextGenerator",
    "TextModel",
    "TextPiece",
    "TextStream",
    "TokenDecoder",
    "check_graph",
    "class_labels",
    "classification",
    "generation_limits",
    "next_distribution",
    "open_model",
    "positions",
    "session_options",
]
