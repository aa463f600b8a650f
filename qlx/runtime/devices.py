"""Where a session runs: the CPU, or a CUDA device where onnxruntime was built and installed for one."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, get_args

import onnxruntime as ort

from qlx.errors import MissingExtra, UsageError

__all__ = ["DEVICES", "Device", "need_device", "providers_of", "ran_on"]

Device = Literal["cpu", "cuda"]
DEVICES: tuple[Device, ...] = get_args(Device)

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_CUDA_OPTIONS = {
    "use_tf32": "0",  # onnxruntime's default rounds float32 products to 10 bits
    "cudnn_conv_algo_search": "HEURISTIC",  # the default times the choices anew in each process
}
_LEAVE_OUT = "or run on the CPU (leave out the device)"


def need_device(device: str, session: ort.InferenceSession | None = None) -> None:
    """Refuse a device that this onnxruntime lacks or that `session` did not get.

    onnxruntime itself falls back to the CPU, with a line in its log.

    Raises:
        UsageError: there is no such device in `DEVICES`.
        MissingExtra: onnxruntime was built without it, or cannot start it here.
    """
    if device not in DEVICES:
        raise UsageError(f"device {device!r} is not one of {', '.join(DEVICES)}")
    if device == "cpu":
        return
    if _CUDA not in ort.get_available_providers():
        raise MissingExtra(
            f"onnxruntime {ort.__version__} has no {_CUDA} here; install onnxruntime-gpu in its place, {_LEAVE_OUT}"
        )
    if session is not None and _CUDA not in session.get_providers():
        raise MissingExtra(
            f"onnxruntime {ort.__version__} could not start its {_CUDA}: no CUDA device answers, or CUDA's or cuDNN's "
            f"libraries are not found; install them, {_LEAVE_OUT}"
        )


def providers_of(device: Device) -> list[Any]:
    """The execution providers of a session, the preferred one first; float32 stays float32 on each."""
    if device == "cpu":
        return [_CPU]
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # CUDA's libraries from Python packages, where they are installed as such
    return [(_CUDA, _CUDA_OPTIONS), _CPU]


def ran_on(
    session: ort.InferenceSession,
    device: Device,
    outputs: Sequence[str],
    inputs: Mapping[str, ort.OrtValue],
    stay: Collection[str] = (),
) -> list[ort.OrtValue]:
    """A run whose outputs in `stay` are left in the device's memory; the others come back to the CPU's.

    Inputs may lie on either.
    """
    binding = session.io_binding()
    for name, value in inputs.items():
        binding.bind_ortvalue_input(name, value)
    for name in outputs:
        binding.bind_output(name, device if name in stay else "cpu")
    session.run_with_iobinding(binding)
    return list(binding.get_outputs())
