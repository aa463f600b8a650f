"""An adapter tried on its base: attached, replayed on its probe, and asked once by hand.

Goes the ways that verification and serving go, so what is seen here is what happens there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qlx.checkpoint import Checkpoint, Source
from qlx.errors import UsageError
from qlx.inputs import open_image
from qlx.merging import adapter_checkpoint
from qlx.verification import Check, Comparison, base_of, probe_of, replay, verify_outputs

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
    image: Path | None = None,
) -> Trial:
    """Load `directory` (qlx or plain PEFT) onto `base`, replay its probe, and ask it.

    A language model continues `prompt`, or with `chat` answers it as a message; an image model
    labels `image`.

    Raises:
        Mismatch: the base is not the one that the adapter was trained on.
        UsageError: a prompt for an image model, or an image for a language model.
    """
    with adapter_checkpoint(directory, base) as (adapter, _):
        manifest = adapter.manifest
        if (image if manifest.task == "causal-lm" else prompt) is not None:
            wanted = "--prompt" if manifest.task == "causal-lm" else "--input"
            raise UsageError(f"{directory}: a model for {manifest.task} is asked with {wanted}")
        source, probe = base_of(adapter, base), probe_of(adapter)
        outputs = replay(adapter, source, probe)
        comparisons, checks = verify_outputs(manifest, probe, outputs)
        answer = ask(adapter, source, prompt, chat, image)
    return Trial(
        Checkpoint(directory, manifest, adapter.digest), comparisons, tuple(checks), answer
    )


def ask(
    checkpoint: Checkpoint,
    base: Source | None,
    prompt: str | None,
    chat: bool,
    image: Path | None,
) -> str | None:
    """The likeliest answer to a prompt, or the label of an image with its probability."""
    if prompt is None and image is None:
        return None
    from qlx.runtime import SamplingOptions
    from qlx.serving import load_engine

    engine = load_engine(checkpoint.path, base=base)
    if engine.text is not None:
        greedy = SamplingOptions(max_tokens=MAX_NEW_TOKENS, temperature=0.0)
        message = [{"role": "user", "content": prompt or ""}]
        asked = engine.text.encode_chat(message) if chat else prompt or ""
        return engine.text.generate(asked, greedy).text
    assert engine.images is not None
    (found,) = engine.images.classify([open_image(image)])
    return f"{found.label} ({found.probability:.1%})"
