"""`qlx load-adapter`: attach an adapter to its base, replay its probe, and ask it something."""

from pathlib import Path

import click

from qlx.cli import options
from qlx.cli.session import Session


@options.command(
    "load-adapter",
    examples=(
        "qlx load-adapter --base runs/digits-base --adapter adapters/digits --input seven.png",
        "qlx load-adapter --base runs/tennis-base --adapter adapters/tennis --input 0008.jpg",
        "qlx load-adapter --base runs/python-base --adapter adapters/python --prompt 'def main'",
    ),
)
@options.base(required=True)
@click.option(
    "--adapter",
    "adapters",
    type=options.DIRECTORY,
    required=True,
    multiple=True,
    help="Adapter directory (qlx or plain PEFT); one.",
)
@click.option("--prompt", metavar="TEXT", help="Text for a language model to continue.")
@click.option("--chat", is_flag=True, help="Send --prompt as a message, by the chat template.")
@click.option(
    "--input",
    "images",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Image for a classifier or a heatmap model; of several frames, repeat it, the latest last.",
)
def command(
    session: Session,
    base: str,
    adapters: tuple[Path, ...],
    prompt: str | None,
    chat: bool,
    images: tuple[Path, ...],
) -> int:
    """Try an adapter on its base.

    Replays its probe, to see that the two still compute what training saw, and answers a prompt or
    an image. Ends with exit code 1 when they do not.
    """
    from qlx.cli import render, trial

    if len(adapters) > 1:
        raise click.UsageError(
            "--adapter: one is tried at a time; `qlx merge` combines several, `qlx serve` offers them"
        )
    if chat and prompt is None:
        raise click.UsageError("--chat is about --prompt, and none is given")
    result = trial.try_adapter(adapters[0], base, prompt=prompt, chat=chat, images=images)
    session.emit(render.trial_data(result), render.print_trial)
    return 0 if result.passed else 1
