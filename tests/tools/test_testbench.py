import json
import sys
from pathlib import Path

import pytest

from streammap.errors import PlanError, SchemeError
from streammap.tools.original import testbench
from streammap.tools.original.testbench import ModelName, Sizes

pytest.importorskip("transformers")

TINY = Sizes(heads=2, head_dim=8, layers=2, vocab=64, n_tokens=16, image=32)
STEPS = (
    "L2-E16 -> L2-E32",
    "L2-E32 -> L2-E16",
    "L2-E16 -> L4-E16",
    "L2-E16 -> L4-E16 -> L2-E16",
    "alpha 0",
    "alpha 0.25",
    "alpha 0.5",
    "alpha 0.75",
    "alpha 1",
)


def rows_of(name: ModelName) -> dict[str, testbench.TableRow]:
    rows = testbench.compare(name, TINY, testbench.groups_for(TINY, None))
    assert all(row.model == name for row in rows)
    assert tuple(row.name for row in rows) == STEPS
    return {row.name: row for row in rows}


@pytest.mark.parametrize("name", testbench.MODELS)
def test_the_exact_rule_keeps_the_function_in_width(name: ModelName) -> None:
    rows = rows_of(name)
    up, down, deep, back, *blends = (rows[step] for step in STEPS)
    assert 0 <= up.exact < 1e-6
    assert 0 <= down.exact < 1e-6
    assert deep.exact == deep.reference > 1e-4
    assert back.exact == back.reference == 0
    assert blends[0].exact == blends[0].reference == 0
    figures = [row.exact for row in blends]
    assert figures == sorted(set(figures)), "the difference grows with alpha"
    if name == "GPT-2":
        assert up.reference > 100 * up.exact, "halved embeddings are another model"
        assert up.reference > 1e-4
    else:
        assert up.reference < 1e-6


def test_json_is_one_object_of_all_rows() -> None:
    echoed: list[str] = []
    testbench.main(None, as_json=True, echo=echoed.append, sizes=TINY)
    (text,) = echoed
    found = json.loads(text)
    assert found["measure"] == testbench.MEASURE
    assert [row["name"] for row in found["rows"]] == list(STEPS) * len(testbench.MODELS)
    assert set(found["rows"][0]) == {"model", "name", "reference", "exact"}


def test_the_table_has_a_column_for_each_rule() -> None:
    rows = (
        testbench.TableRow("GPT-2", "L6-E384 -> L6-E768", 9.3e-2, 1.9e-7),
        testbench.TableRow("GPT-2", "alpha 0", 0.0, 0.0),
    )
    assert testbench.as_text(rows) == (
        "GPT-2                                 reference       exact\n"
        "L6-E384 -> L6-E768                      9.3e-02     1.9e-07\n"
        "alpha 0                                 0.0e+00     0.0e+00"
    )


def test_a_scheme_of_12_to_6_is_taken(tmp_path: Path) -> None:
    neighbours = [[2 * i, 2 * i + 1] for i in range(6)]
    file = tmp_path / "scheme.json"
    file.write_text(json.dumps({"width_scheme": neighbours, "depth_scheme": neighbours}))
    found = testbench.groups_for(testbench.MANUAL, str(file))
    assert found.width == found.depth == tuple(map(tuple, neighbours))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"width_scheme": [[0, 1]]}, "width_scheme has 1 groups, .* the table is of 12 -> 6"),
        (
            {"width_scheme": [[i, i + 7] for i in range(6)]},
            "width_scheme has 6 groups, the highest index is 12; the table is of 12 -> 6",
        ),
        ({"width_scheme": [[i, i + 6] for i in range(6)]}, "depth_scheme is missing"),
    ],
)
def test_a_scheme_of_other_sizes_is_refused(
    tmp_path: Path, content: dict[str, object], message: str
) -> None:
    file = tmp_path / "scheme.json"
    file.write_text(json.dumps(content))
    with pytest.raises(SchemeError, match=message):
        testbench.main(str(file), as_json=False, echo=pytest.fail)


def test_without_transformers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.utils.logging", None)
    with pytest.raises(PlanError, match=r"pip install -U transformers"):
        testbench.main(None, as_json=True, echo=pytest.fail, sizes=TINY)
