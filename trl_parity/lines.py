"""Lines for people on stderr: each says who speaks, and none is glued to a progress bar."""

from __future__ import annotations

import logging
import sys

__all__ = ["LastResort", "say"]

_WHO = "trl-parity"


def say(text: str) -> None:
    """Write lines to stderr, above the bars that tqdm draws there. They begin with who speaks."""
    if not text.lstrip().startswith(_WHO):
        text = f"{_WHO}: {text}"
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)  # who draws a bar has imported it
    if tqdm is None:
        print(text, file=sys.stderr, flush=True)
    else:
        tqdm.write(text, file=sys.stderr)


class LastResort(logging.Handler):
    """Says this package's warnings where nobody has set up logging; its own last resort would not say who speaks."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        """Say it, unless somebody else takes it."""
        loggers = (logging.getLogger(), logging.getLogger(__package__))
        if not any(handler is not self for logger in loggers for handler in logger.handlers):
            say(self.format(record))
