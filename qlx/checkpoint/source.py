"""Where a base model comes from: a local directory or a hub name, named by the content of its weights."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from qlx.checkpoint.digest import fingerprint_directory
from qlx.checkpoint.manifest import BaseRef, Manifest
from qlx.checkpoint.store import is_checkpoint, open_checkpoint
from qlx.errors import InputRefused, Mismatch, require

__all__ = ["Source", "hub_name", "require_base", "resolve_source"]

_USABLE_KINDS = ("run", "merged", "packed")
_RUNS = "runs"  # where `train` writes by default


@dataclass(frozen=True)
class Source:
    """A resolved base: its local directory, the name and revision it was asked for by.

    `known` is its fingerprint, where a step that reads all weights anyway has found it out.
    """

    path: Path
    name: str
    revision: str | None = None
    manifest: Manifest | None = None
    known: str | None = None

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the weights; reads every byte once."""
        return self.known or fingerprint_directory(self.path)

    def reference(self) -> BaseRef:
        """How a manifest names this base: never by an absolute path."""
        name = Path(self.name).name if Path(self.name).is_absolute() else self.name
        return BaseRef(name=name, revision=self.revision, fingerprint=self.fingerprint)


def resolve_source(name: str, revision: str | None = None) -> Source:
    """Find a base by local path or hub name (`owner/model@revision`).

    A qlx checkpoint is opened with its digests checked; it must hold whole weights.

    Raises:
        InputRefused: not found, or a checkpoint without whole weights (an adapter).
    """
    path = Path(name)
    if path.is_dir():
        if revision is not None:
            raise InputRefused(_NO_REVISION.format(path, revision))
        return _local(path, str(name))
    repo, found = hub_name(str(name), revision)
    return Source(_download(repo, found), repo, found)


_NO_REVISION = "{0}: a local directory has no revision; leave out {1!r}"


def hub_name(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """The repository and revision of a base that is not a local directory.

    What looks like a path is not looked for on the hub: it starts with `.`, `/` or `~`, has not
    exactly one slash, or lies in a directory that exists or in `runs`. A revision settles it.

    Raises:
        InputRefused: it is no hub name but a path where no directory is.
    """
    repo, _, at = name.partition("@")
    if at and Path(repo).is_dir():
        raise InputRefused(_NO_REVISION.format(repo, f"@{at}"))
    owner = Path(repo).parent
    local = not at and revision is None and (owner.is_dir() or owner.name == _RUNS)
    if local or repo.count("/") != 1 or repo.startswith((".", "/", "~")):
        raise InputRefused(
            f"{name}: no such directory (from the current one); train it first, or give another base "
            "(a hub model is named owner/model@revision)"
        )
    return repo, at or revision


def _local(path: Path, name: str) -> Source:
    if not is_checkpoint(path):
        return Source(path, name)
    manifest = open_checkpoint(path).manifest
    whole = manifest.kind != "run" or (manifest.adapter is None or manifest.adapter.type == "full")
    if manifest.kind not in _USABLE_KINDS or not whole:
        raise InputRefused(
            f"{path}: a checkpoint of kind {manifest.kind!r} without whole weights cannot be a base; merge it first"
        )
    if manifest.quantization.backend == "gguf":
        raise InputRefused(
            f"{path}: a GGUF file cannot be a base; give the checkpoint it was packed from"
        )
    return Source(path, name, manifest=manifest)


def _download(repo: str, revision: str | None) -> Path:
    hub = require("huggingface_hub", "train")
    wanted = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(hub.snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except hub.errors.LocalEntryNotFoundError as error:
        raise InputRefused(
            f"{repo}: neither a local directory nor in the local cache, and the hub cannot be reached; "
            "download it where there is a network, or give a directory"
        ) from error
    except (OSError, ValueError, hub.errors.HfHubHTTPError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputRefused(
            f"{repo}: neither a local directory nor to be had from the hub ({reason})"
        ) from error


def require_base(manifest: Manifest, source: Source) -> None:
    """Check that `source` holds the very weights the checkpoint was trained on.

    Raises:
        Mismatch: the fingerprints differ, or the checkpoint names no base.
    """
    if manifest.base is None:
        raise Mismatch(f"checkpoint {manifest.tag!r} records no base model")
    if manifest.base.fingerprint != source.fingerprint:
        raise Mismatch(
            f"{source.name}: not the base this adapter was trained on ({manifest.base.name}): "
            f"fingerprint {source.fingerprint[7:19]}…, recorded {manifest.base.fingerprint[7:19]}…; "
            "pass the right --base"
        )
