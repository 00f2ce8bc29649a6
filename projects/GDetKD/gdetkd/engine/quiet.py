"""Keep logs off the screen: `--check` prints one screen, and everything else goes to log.txt."""

import io
import logging
from contextlib import contextmanager, redirect_stdout
from typing import Iterator, List


@contextmanager
def quiet() -> Iterator[List[str]]:
    """Print nothing to stdout inside. Loggers that are set up inside still write to their files.

    Yields:
        the warnings that GDetKD logs inside, without repetitions. The list grows while the code runs.
    """
    collector = _Collector()
    logger = logging.getLogger("gdetkd")
    logger.addHandler(collector)
    logging.captureWarnings(True)
    try:
        with redirect_stdout(_Nowhere()):
            yield collector.messages
    finally:
        logging.captureWarnings(False)
        logger.removeHandler(collector)


class _Collector(logging.Handler):
    """Collect warnings without repetitions."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: List[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage() not in self.messages:
            self.messages.append(record.getMessage())


class _Nowhere(io.TextIOBase):
    """Take text and forget it. Loggers keep this stream, so unlike a file it is never closed."""

    def write(self, text: str) -> int:
        return len(text)
