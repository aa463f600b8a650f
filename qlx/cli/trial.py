"""An adapter tried on its base: attached, replayed on its probe, and asked once by hand.

Goes the ways that verification and serving go, so what is seen here is what happens there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlx.checkpoint import Checkpoint, Source
from qlx.errors import UsageError
from qlx.inputs import open_image
from qlx.merging import adapter_checkpoint
from qlx.verification import Check, Comparison, base_of, probe_of, replay, verify_outputs

if TYPE_CHECKING:
    from qlx.runtime import Location

MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Trial:
    """What came of it: the adapter, its distance from training's outputs, the answer if asked."""

    adapter: Checkpoint
    comparisons: Mapping[str, Comparison]
    checks: tuple[Check, ...]
    answer: str | None

    @property
    def passed(self) -> bool:
        """Whether the adapter still computes what training saw."""
        return bool(self.checks) and all(check.passed for check in self.checks)


def try_adapter(
    directory: Path,
    base: str,
    *,
    prompt: str | None = None,
    chat: bool = False,
    images: Sequence[Path] = (),
) -> Trial:
    """Load `directory` (qlx or plain PEFT) onto `base`, replay its probe, and ask it.

    A language model continues `prompt`, or with `chat` answers it as a message; a classifier labels
    the one of `images`; a heatmap model says where its keypoints are in the last of them.

    Raises:
        Mismatch: the base is not the one that the adapter was trained on.
        UsageError: a prompt for an image model, or an image for a language model, or too many.
    """
    with adapter_checkpoint(directory, base) as (adapter, _):
        manifest = adapter.manifest
        if bool(images) if manifest.task == "causal-lm" else prompt is not None:
            wanted = "--prompt" if manifest.task == "causal-lm" else "--input"
            raise UsageError(f"{directory}: a model for {manifest.task} is asked with {wanted}")
        if len(images) > 1 and manifest.task != "heatmap":
            raise UsageError(f"{directory}: a model for {manifest.task} takes one --input")
        source, probe = base_of(adapter, base), probe_of(adapter)
        outputs = replay(adapter, source, probe)
        comparisons, checks = verify_outputs(manifest, probe, outputs)
        answer = ask(adapter, source, prompt, chat, images)
    return Trial(
        Checkpoint(directory, manifest, adapter.digest), comparisons, tuple(checks), answer
    )


def ask(
    checkpoint: Checkpoint,
    base: Source | None,
    prompt: str | None,
    chat: bool,
    images: Sequence[Path],
) -> str | None:
    """The likeliest answer to a prompt, the label of an image with its probability, or where keypoints are."""
    if prompt is None and not images:
        return None
    from qlx.runtime import SamplingOptions
    from qlx.serving import load_engine

    engine = load_engine(checkpoint.path, base=base)
    if engine.text is not None:
        greedy = SamplingOptions(max_tokens=MAX_NEW_TOKENS, temperature=0.0)
        message = [{"role": "user", "content": prompt or ""}]
        asked = engine.text.encode_chat(message) if chat else prompt or ""
        return engine.text.generate(asked, greedy).text
    if engine.keypoints is not None:
        (places,) = engine.keypoints.locate([list(images)])
        return "\n".join(map(_place, places))
    assert engine.images is not None
    (found,) = engine.images.classify([open_image(images[0])])
    return f"{found.label} ({found.probability:.1%})"


def _place(found: "Location") -> str:
    if not found.found:
        return f"{found.name}: not in the frame ({found.score:.1%})"
    return f"{found.name}: x {found.x:.1f}, y {found.y:.1f} ({found.score:.1%})"
