"""Libraries that only some commands need: transformers and timm, imported when used.

They are imported by name, because their annotations are partial and differ between versions.
"""

import contextlib
import importlib
import warnings
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
        raise PlanError(
            f"this needs {package}, which is not installed or too old ({error})",
            hint=f"pip install -U {package}",
        ) from error


@contextlib.contextmanager
def quiet(*, hide_warnings: bool = False) -> Iterator[None]:
    """Transformers logs nothing and shows no progress bars inside.

    Args:
        hide_warnings: Whether Python's warnings are ignored too, whoever gives them.
    """
    logging = library("transformers.utils.logging")
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            if hide_warnings:
                warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()
