"""Keeping exporters quiet: they print progress and version notes where a result may have to stand."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

__all__ = ["quiet"]

_LOGGERS = ("torch.onnx", "torch.export", "transformers", "onnxscript", "onnx_ir", "bitsandbytes")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence loggers, warnings, progress bars and output of the export libraries; errors still raise."""
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    loggers = [logging.getLogger(name) for name in _known(_LOGGERS)]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            if shown:
                bars.enable_progress_bar()
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _known(roots: tuple[str, ...]) -> list[str]:
    """The roots and those of their children that exist already (they may have levels of their own)."""
    children = [
        name
        for name in list(logging.Logger.manager.loggerDict)
        if name.startswith(tuple(f"{r}." for r in roots))
    ]
    return [*roots, *children]
