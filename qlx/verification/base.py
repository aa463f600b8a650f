"""Which base a checkpoint runs on, and whether the one at hand is the one that was recorded."""

from pathlib import Path

from qlx.checkpoint import Checkpoint, Manifest, Source, require_base, resolve_source
from qlx.errors import InputRefused, Mismatch

__all__ = ["base_of", "find_base", "needs_base"]


def needs_base(manifest: Manifest) -> bool:
    """Whether this checkpoint holds an adapter only, so that it runs on top of a base."""
    return (
        manifest.kind in ("run", "adapter")
        and manifest.adapter is not None
        and manifest.adapter.type != "full"
    )


def base_of(checkpoint: Checkpoint, base: Source | str | Path | None = None) -> Source | None:
    """The base to run `checkpoint` on, checked by fingerprint; None if it needs none and none is given.

    Without `base` the recorded name is tried: a hub name, or a directory relative to here.

    Raises:
        InputRefused: a base is needed and cannot be found; the message says to pass --base.
        Mismatch: the base holds other weights than those recorded.
    """
    source = find_base(checkpoint, base)
    if source is None:
        return None
    try:
        require_base(checkpoint.manifest, source)
    except Mismatch as error:
        if needs_base(checkpoint.manifest):
            raise
        recorded = checkpoint.manifest.base
        made = "records no base" if recorded is None else f"was made from another ({recorded.name})"
        raise Mismatch(
            f"{source.name}: not the base of {checkpoint.path}, which {made}; a checkpoint of kind "
            f"{checkpoint.manifest.kind!r} runs by itself, so --base can be left out"
        ) from error
    return source


def find_base(checkpoint: Checkpoint, base: Source | str | Path | None = None) -> Source | None:
    """`base_of` without the check that it holds the recorded weights, which reads all of them.

    Raises:
        InputRefused: a base is needed and cannot be found.
    """
    manifest = checkpoint.manifest
    if base is None and not needs_base(manifest):
        return None
    if base is None:
        if manifest.base is None:
            raise Mismatch(
                f"{checkpoint.path}: an adapter that records no base; make it again with save-adapter --base"
            )
        base = _recorded_base(checkpoint, manifest.base.name, manifest.base.revision)
    return base if isinstance(base, Source) else resolve_source(str(base))


def _recorded_base(checkpoint: Checkpoint, name: str, revision: str | None) -> Source:
    try:
        return resolve_source(name, revision)
    except InputRefused as error:
        raise InputRefused(
            f"{checkpoint.path}: needs its base model {name}, not found here; pass --base DIR"
        ) from error
