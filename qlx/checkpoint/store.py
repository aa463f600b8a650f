"""Opening and sealing checkpoints: the manifest, and the digests of the files beside it."""

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlx.checkpoint.digest import bytes_digest, file_sha256, tensors_sha256
from qlx.checkpoint.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    FileEntry,
    Manifest,
    parse_manifest,
)
from qlx.checkpoint.migrate import migrate_value
from qlx.checkpoint.strict_json import MAX_BYTES, canonical_json, load_json, parse_json
from qlx.errors import CorruptCheckpoint, InputRefused, UnsafeInput, Unsupported, UsageError

__all__ = ["Checkpoint", "is_checkpoint", "open_checkpoint", "read_manifest", "seal"]


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its directory, its manifest, and the digest of the manifest's bytes.

    The digest names the checkpoint as a whole, because the manifest holds every file's digest.
    `adapter` is the one of its swappable adapters that is meant, None for the model without any.
    """

    path: Path
    manifest: Manifest
    digest: str
    adapter: str | None = None

    def with_adapter(self, name: str | None) -> "Checkpoint":
        """The same files with one of the swappable adapters, and the manifest as it is for that one.

        Raises:
            UsageError: there is no adapter of that name.
        """
        if name is None:
            return self
        try:
            return replace(self, manifest=self.manifest.with_adapter(name), adapter=name)
        except UsageError as error:
            raise UsageError(f"{self.path}: {error}") from error


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a directory with a manifest."""
    return (Path(path) / MANIFEST_FILE).is_file()


def read_manifest(path: Path) -> tuple[Manifest, str]:
    """The manifest of a checkpoint directory and its digest, without looking at the other files.

    Raises:
        InputRefused: no directory or no manifest there.
        Unsupported: a newer format version.
        CorruptCheckpoint: the manifest does not parse or validate.
    """
    file = Path(path) / MANIFEST_FILE
    if not file.is_file():
        raise InputRefused(f"{path}: {_other_than_checkpoint(Path(path))}")
    with open(file, "rb") as stream:
        data = stream.read(MAX_BYTES + 1)
    return _parse(data, str(file)), bytes_digest(data)


def _parse(data: bytes, where: str) -> Manifest:
    value = parse_json(data, where)
    version = value.get("format_version") if isinstance(value, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise Unsupported(
            f"{where}: format version {version} is newer than this qlx reads ({FORMAT_VERSION}); upgrade qlx"
        )
    if not isinstance(value, dict) or not _is_sealed(value, data):
        raise CorruptCheckpoint(
            f"{where}: not as it was written (its digest does not match); restore it, or make the checkpoint again"
        )
    content = {name: field for name, field in value.items() if name != "digest"}
    return parse_manifest(migrate_value(content), where)


def _is_sealed(value: dict[str, Any], data: bytes) -> bool:
    """Whether the bytes are the canonical ones and the digest is that of all other fields."""
    content = {name: field for name, field in value.items() if name != "digest"}
    sealed = {**content, "digest": bytes_digest(canonical_json(content))}
    return canonical_json(sealed) == data


def _other_than_checkpoint(path: Path) -> str:
    """What a path without a manifest is, and what takes it in."""
    if not path.is_dir():
        return "is not a directory"
    what = "has no qlx.json, so it is not a qlx checkpoint"
    config = path / "adapter_config.json"
    if not config.is_file():
        return what
    fields = load_json(config)
    kind = fields.get("peft_type") if isinstance(fields, dict) else None
    if kind not in (None, "LORA"):
        return f"{what} but a plain PEFT adapter of type {kind}; fold it into its base with `qlx merge`"
    return f"{what} but a plain PEFT adapter; take it in with `qlx save-adapter`"


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint and check that its files are exactly those of the manifest, byte for byte.

    Raises:
        InputRefused: not a checkpoint.
        CorruptCheckpoint: a file is changed, missing, added or renamed; the message names it.
        UnsafeInput: the directory holds links or anything that is not a plain file.
    """
    path = Path(path)
    manifest, digest = read_manifest(path)
    present = _plain_files(path)
    for name in sorted(set(manifest.files) - set(present)):
        raise CorruptCheckpoint(f"{path / name}: the manifest lists this file, but it is missing")
    for name in sorted(set(present) - set(manifest.files)):
        raise CorruptCheckpoint(
            f"{path / name}: this file is not in the manifest; it was added or renamed"
        )
    for name, entry in sorted(manifest.files.items()):
        _check_file(path / name, entry)
    return Checkpoint(path, manifest, digest)


def _plain_files(path: Path) -> list[str]:
    names = []
    for item in os.scandir(path):
        if not stat.S_ISREG(item.stat(follow_symlinks=False).st_mode):
            raise UnsafeInput(
                f"{item.path}: a checkpoint holds plain files only, no links or directories"
            )
        if item.name != MANIFEST_FILE:
            names.append(item.name)
    return names


def _check_file(path: Path, entry: FileEntry) -> None:
    size = path.stat().st_size
    if size != entry.size:
        raise CorruptCheckpoint(
            f"{path}: {size} bytes long, the manifest says {entry.size}; restore or rebuild it"
        )
    found = tensors_sha256(path) if entry.of == "tensors" else file_sha256(path)
    if found != entry.sha256:
        raise CorruptCheckpoint(
            f"{path}: the content is not what the manifest recorded; restore or rebuild it"
        )


def seal(
    directory: Path, manifest: Manifest, known: Mapping[str, FileEntry] | None = None
) -> Manifest:
    """Record every file of `directory` in the manifest and write `qlx.json`, last.

    `known` holds entries of files that were hashed while they were written; a file whose size is
    no longer the recorded one is hashed again.

    Returns:
        The manifest as written, with `files` filled in.

    Raises:
        UnsafeInput: something in the directory is not a plain file.
        CorruptCheckpoint: a file name the format does not allow.
    """
    directory = Path(directory)
    entries = {
        name: _entry(directory / name, (known or {}).get(name))
        for name in sorted(_plain_files(directory))
    }
    dump = manifest.model_dump(mode="json") | {
        "files": {k: v.model_dump() for k, v in entries.items()}
    }
    sealed = parse_manifest(dump, str(directory / MANIFEST_FILE))
    (directory / MANIFEST_FILE).write_bytes(sealed.to_bytes())
    return sealed


def _entry(path: Path, known: FileEntry | None) -> FileEntry:
    size = path.stat().st_size
    if known is not None and known.size == size:
        return known
    return FileEntry(size=size, sha256=file_sha256(path))
