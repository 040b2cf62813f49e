"""diffusers and transformers, kept quiet."""

import contextlib
import logging
from collections.abc import Iterator

NOISY = ("torchao", "torch.utils._pytree", "py.warnings")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' loading bars and notices, torchao's at its import among them, off the terminal."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", *NOISY)]
    levels = [logger.level for logger in loggers]
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    shown = [library.is_progress_bar_enabled() for library in libraries]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, was_shown in zip(libraries, shown, strict=True):
            if was_shown:
                library.enable_progress_bar()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
