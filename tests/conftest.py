"""Profiles of hypothesis: "ci", quick and always the same, and HYPOTHESIS_PROFILE=deep; --part."""

import os
from pathlib import Path

import pytest
from hypothesis import Phase, settings

_PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.target, Phase.shrink)

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50, phases=_PHASES)
settings.register_profile("deep", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all examples of a module's random tests write to."""
    return tmp_path_factory.mktemp("scratch")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--part", metavar="K/N", help="only every Nth test, from the Kth on: 1/4 ... 4/4"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part = config.getoption("--part")
    if part:
        k, n = map(int, part.split("/"))
        chosen = items[k - 1 :: n]
        del items[k - 1 :: n]
        config.hook.pytest_deselected(items=items[:])
        items[:] = chosen
