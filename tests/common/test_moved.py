"""Import paths of version 0.1 work, and say where the modules are now."""

import importlib
import subprocess
import sys
import warnings

import pytest

from streammap.common import moved


@pytest.mark.parametrize(("old", "new"), sorted(moved.MOVED.items()))
def test_an_old_path_has_what_the_new_one_has(old: str, new: str) -> None:
    parent = old.rpartition(".")[0]
    if parent in moved.MOVED:  # it warns for itself
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(parent)
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=rf"{old} is streammap\.{new} now"):
        module = importlib.import_module(old)
    target = importlib.import_module(f"streammap.{new}")
    assert module.__doc__ is None
    names = [name for name in vars(target) if not name.startswith("__")]
    assert all(getattr(module, name) is getattr(target, name) for name in names)


def test_old_imports_work_as_they_were_printed() -> None:
    code = (
        "from streammap.making import finish; from streammap.storage import disk;"
        "from streammap import replay; from streammap.progress import ProgressBar, to_logger;"
        "from streammap.testing import faults; from streammap.testing.hubserver import HubServer;"
        "print(finish.__name__, disk.using.__name__, replay.open.__name__)"
    )
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["finish", "using", "open_request"]
