"""Profiles of hypothesis: "ci", quick and always the same, and HYPOTHESIS_PROFILE=deep."""

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
