"""Import paths of version 0.1 that pages named, for as long as 0.x lasts."""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, final

MOVED = {
    "streammap.making": "output.transaction",
    "streammap.replay": "tools.replay",
    "streammap.storage": "io.storage",
    "streammap.storage.disk": "io.storage.disk",
}
"""Old name -> where it is now, below streammap."""


@final
class _Finder:
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A module with what the moved one has."""
        if fullname not in MOVED:
            return None
        is_package = any(name.startswith(f"{fullname}.") for name in MOVED)
        loader: Any = _Loader()  # importlib.abc would cost as much as click
        return ModuleSpec(fullname, loader, is_package=is_package)


@final
class _Loader:
    def create_module(self, spec: ModuleSpec) -> None:
        """The usual kind of module."""

    def exec_module(self, module: ModuleType) -> None:
        """Take over all names."""
        new = f"streammap.{MOVED[module.__name__]}"
        warnings.warn(f"{module.__name__} is {new} now", DeprecationWarning, stacklevel=2)
        public = vars(import_module(new)).items()
        vars(module).update({name: value for name, value in public if not name.startswith("__")})


def install() -> None:
    """Let old names be imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
