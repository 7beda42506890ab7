"""Libraries that only some commands need: transformers and timm, imported by name when used.

By name, for their annotations are partial and differ from version to version.
"""

import contextlib
import importlib
from collections.abc import Iterator
from types import ModuleType

from streammap.errors import PlanError


def library(module: str) -> ModuleType:
    """A module of transformers or timm.

    Raises:
        PlanError: it is not installed, or too old to have the module.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        extra = "'streammap[transformers]'" if package == "transformers" else package
        raise PlanError(
            f"this needs {package}, which is not installed or too old ({error})",
            hint=f"pip install -U {extra}",
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No word from transformers inside, and as many as before after it."""
    logging = library("transformers.utils.logging")
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()
