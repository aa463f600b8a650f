"""The checkpoint format: manifest, digests, fingerprint, lineage, probe, migration, durable writes.

Nothing heavy is imported here; `qlx inspect` needs only this package.
"""

from qlx.checkpoint.digest import (
    bytes_digest,
    file_sha256,
    fingerprint,
    fingerprint_directory,
    fingerprint_line,
    fingerprint_of_lines,
    fingerprint_weights,
    tensors_digest,
    tensors_sha256,
)
from qlx.checkpoint.durable import held, naming, new_checkpoint, replace_file
from qlx.checkpoint.known import Stamp, known_hashes, remember_hashes
from qlx.checkpoint.lineage import next_step
from qlx.checkpoint.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    AdapterEntry,
    AdapterSpec,
    BaseRef,
    FileEntry,
    Kind,
    Manifest,
    ProbeRecord,
    ProbeResult,
    QuantSpec,
    Step,
    Task,
    check_adapter_name,
)
from qlx.checkpoint.model_config import CONFIG_FILE, KNOWN, read_config
from qlx.checkpoint.outputs import check_apart, check_file, check_output
from qlx.checkpoint.probe import PROBE_FILE, Probe, read_probe, write_probe
from qlx.checkpoint.source import Source, hub_name, require_base, resolve_source
from qlx.checkpoint.store import Checkpoint, is_checkpoint, open_checkpoint, read_manifest, seal
from qlx.checkpoint.strict_json import canonical_json, load_json, load_object, parse_json

__all__ = [
    "CONFIG_FILE",
    "FORMAT_VERSION",
    "KNOWN",
    "MANIFEST_FILE",
    "PROBE_FILE",
    "AdapterEntry",
    "AdapterSpec",
    "BaseRef",
    "Checkpoint",
    "FileEntry",
    "Kind",
    "Manifest",
    "Probe",
    "ProbeRecord",
    "ProbeResult",
    "QuantSpec",
    "Source",
    "Stamp",
    "Step",
    "Task",
    "bytes_digest",
    "canonical_json",
    "check_adapter_name",
    "check_apart",
    "check_file",
    "check_output",
    "file_sha256",
    "fingerprint",
    "fingerprint_directory",
    "fingerprint_line",
    "fingerprint_of_lines",
    "fingerprint_weights",
    "held",
    "hub_name",
    "is_checkpoint",
    "known_hashes",
    "load_json",
    "load_object",
    "naming",
    "new_checkpoint",
    "next_step",
    "open_checkpoint",
    "parse_json",
    "read_config",
    "read_manifest",
    "read_probe",
    "remember_hashes",
    "replace_file",
    "require_base",
    "resolve_source",
    "seal",
    "tensors_digest",
    "tensors_sha256",
    "write_probe",
]
