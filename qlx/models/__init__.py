"""Torch models: known architectures, loading (plain, quantized, with adapter), tensor names, outputs, probes."""

from qlx.models.architectures import (
    CONFIG_FILE,
    KNOWN,
    Labels,
    auto_class,
    build_config,
    build_model,
    heatmap_grid,
    image_shape,
    read_config,
    stores_transposed,
    task_of,
)
from qlx.models.coded import logical_names, stored_codes
from qlx.models.from_vit import config_from_vit, is_plain_vit, vitpose_from_vit
from qlx.models.gguf_adapter import GGUF_ADAPTER_FILE, write_gguf_adapter
from qlx.models.llama_cpp import GGUF_FILE, ROPE_FACTORS, GgufLayout, gguf_layout
from qlx.models.loading import (
    STORED_DTYPE,
    computing_in,
    empty_model,
    load_as_trained,
    load_base,
    load_model,
    model_config,
    original_weights,
    quantized_fingerprint,
    torch_float,
    with_quantized_names,
)
from qlx.models.names import plain_names, tensor_names
from qlx.models.offload import lend_layers
from qlx.models.predict import TorchPredictor, device_of, forward_logits
from qlx.models.probing import MAX_LOGITS_BYTES, make_probe, probe_texts, synthetic_inputs
from qlx.models.streamed import streamed_bytes, streamed_model

__all__ = [
    "CONFIG_FILE",
    "GGUF_ADAPTER_FILE",
    "GGUF_FILE",
    "KNOWN",
    "MAX_LOGITS_BYTES",
    "ROPE_FACTORS",
    "STORED_DTYPE",
    "GgufLayout",
    "Labels",
    "TorchPredictor",
    "auto_class",
    "build_config",
    "build_model",
    "computing_in",
    "config_from_vit",
    "device_of",
    "empty_model",
    "forward_logits",
    "gguf_layout",
    "heatmap_grid",
    "image_shape",
    "is_plain_vit",
    "lend_layers",
    "load_as_trained",
    "load_base",
    "load_model",
    "logical_names",
    "make_probe",
    "model_config",
    "original_weights",
    "plain_names",
    "probe_texts",
    "quantized_fingerprint",
    "read_config",
    "stored_codes",
    "stores_transposed",
    "streamed_bytes",
    "streamed_model",
    "synthetic_inputs",
    "task_of",
    "tensor_names",
    "torch_float",
    "vitpose_from_vit",
    "with_quantized_names",
    "write_gguf_adapter",
]
