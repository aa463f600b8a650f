"""GPTQ, AWQ and BitNet directories made of tiny models, packed by the published descriptions alone."""

import json
from pathlib import Path

import numpy as np
import torch

from qlx.weights import read_tensors, write_tensors
from tests.adapter_support import make_base

AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)
GROUP = 32
SECTIONS = {
    "gptq": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "sym": False,
        "desc_act": True,
    },
    "gptq_v2": {
        "quant_method": "gptq",
        "bits": 8,
        "group_size": GROUP,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq_v2",
    },
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"},
    "bitnet": {"quant_method": "bitnet", "linear_class": "bitlinear"},
}


def words(table, bits, places=None):
    """A table [rows, n] of codes in 32-bit words along its rows; code `places[i]` comes i-th."""
    per = 32 // bits
    places = list(range(per)) if places is None else places
    rows, columns = table.shape
    packed = np.zeros((rows, columns // per), dtype=np.uint64)
    for i in range(per):
        packed |= table[:, places[i] :: per].astype(np.uint64) << np.uint64(bits * i)
    return torch.from_numpy(packed.astype(np.uint32).view(np.int32).copy())


def coded_base(directory: Path, kind: str, seed: int = 0) -> tuple[Path, dict[str, torch.Tensor]]:
    """A tiny Llama whose linear layers are codes of `kind`; also their values, in float64 at first."""
    return directory, encode(make_base(directory, "llama", seed=seed), kind, seed)


def encode(directory: Path, kind: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Turn the linear layers of a plain Llama directory into codes of `kind`; returns their values."""
    plain = read_tensors(directory)
    state, values = {}, {}
    random = np.random.default_rng(seed)
    for name, tensor in sorted(plain.items()):
        if ".layers." in name and name.endswith("proj.weight"):
            parts, value = _MAKERS[kind](tensor.double().numpy(), random)
            stem = name.removesuffix(".weight")
            state |= {f"{stem}.{part}": content for part, content in parts.items()}
            values[name] = torch.from_numpy(value).float()
        else:
            state[name] = tensor
    write_tensors(directory / "model.safetensors", state, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = SECTIONS[kind]
    (directory / "config.json").write_text(json.dumps(config))
    return values


def _grid(w, bits, groups, symmetric):
    """Unsigned codes [out, in], zeros [groups, out] and fp16 scales [groups, out] of a weight."""
    top, count = (1 << bits) - 1, groups.max() + 1
    codes = np.empty(w.shape, dtype=np.int64)
    zeros = np.empty((count, len(w)), dtype=np.int64)
    scales = np.empty((count, len(w)), dtype=np.float16)
    for group in range(count):
        block = w[:, groups == group]
        low, high = block.min(1), block.max(1)
        if symmetric:
            high = np.maximum(high, -low)
            low = -high
        scales[group] = (high - low) / top
        step = scales[group].astype(np.float64)
        zeros[group] = (top + 1) // 2 if symmetric else np.clip(np.rint(-low / step), 1, top - 1)
        block = np.rint(block / step[:, None]) + zeros[group][:, None]
        codes[:, groups == group] = np.clip(block, 0, top)
    values = scales.astype(np.float64)[groups].T * (codes - zeros[groups].T)
    return codes, zeros, scales, values


def _gptq(w, random):
    groups = random.permutation(w.shape[1]) // GROUP
    codes, zeros, scales, values = _grid(w, 4, groups, symmetric=False)
    return {
        "qweight": words(codes, 4).T.contiguous(),
        "qzeros": words(zeros - 1, 4),
        "scales": torch.from_numpy(scales),
        "g_idx": torch.from_numpy(groups.astype(np.int32)),
    }, values


def _gptq_v2(w, random):
    groups = np.arange(w.shape[1]) // GROUP
    codes, zeros, scales, values = _grid(w, 8, groups, symmetric=True)
    return {
        "qweight": words(codes, 8).T.contiguous(),
        "qzeros": words(zeros, 8),
        "scales": torch.from_numpy(scales),
        "g_idx": torch.from_numpy(groups.astype(np.int32)),
    }, values


def _awq(w, random):
    groups = np.arange(w.shape[1]) // GROUP
    codes, zeros, scales, values = _grid(w, 4, groups, symmetric=False)
    return {
        "qweight": words(codes.T, 4, AWQ_PLACES),
        "qzeros": words(zeros, 4, AWQ_PLACES),
        "scales": torch.from_numpy(scales),
    }, values


def _bitnet(w, random):
    codes = np.clip(np.rint(w / np.abs(w).mean()), -1, 1)
    divisor = torch.tensor([1 / np.abs(w).mean()], dtype=torch.float32)
    quarters = np.split((codes + 1).astype(np.uint8), 4)
    packed = sum(quarter << (2 * at) for at, quarter in enumerate(quarters))
    parts = {"weight": torch.from_numpy(packed.astype(np.uint8)), "weight_scale": divisor}
    return parts, codes * (1 / divisor).double().numpy()


_MAKERS = {"gptq": _gptq, "gptq_v2": _gptq_v2, "awq": _awq, "bitnet": _bitnet}
