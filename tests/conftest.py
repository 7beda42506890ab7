"""Profiles of hypothesis: "ci", quick and always the same, and HYPOTHESIS_PROFILE=deep."""

import os

from hypothesis import Phase, settings

_PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.target, Phase.shrink)

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50, phases=_PHASES)
settings.register_profile("deep", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
