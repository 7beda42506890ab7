"""A config.json that transformers would refuse is refused before anything is written."""

import subprocess
import sys
from pathlib import Path

import pytest

from streammap.errors import PlanError
from streammap.output import config_check

GOOD = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}
BAD = {**GOOD, "hidden_size": 66}
"""66 is no multiple of 4 heads."""


@pytest.mark.parametrize("imported", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_config_that_transformers_refuses_is_refused(
    imported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if imported:
        import transformers  # noqa: F401
    else:
        monkeypatch.delitem(sys.modules, "transformers", raising=False)
    with pytest.raises(PlanError, match=r"transformers would refuse the result.*hidden size"):
        config_check.check(GOOD, BAD, nbytes=2 * 10**10)
    config_check.check(GOOD, {**GOOD, "hidden_size": 128}, nbytes=2 * 10**10)
    config_check.check(BAD, {**BAD, "num_hidden_layers": 2}, nbytes=2 * 10**10)


def test_the_process_that_asks_does_not_import_transformers(tmp_path: Path) -> None:
    code = (
        "import sys; from streammap.output import config_check\n"
        f"config_check.check({GOOD}, {{**{GOOD}, 'hidden_size': 128}}, nbytes=2 * 10**10)\n"
        "sys.exit('transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_a_small_result_is_not_worth_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    config_check.check(GOOD, BAD, nbytes=10**6)
