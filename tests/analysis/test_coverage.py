"""`streammap architectures --coverage`: transformers' model types, counted against its mappings."""

import json

import pytest

from streammap.analysis import coverage
from streammap.architectures import registry
from tests.support import typed

auto = pytest.importorskip("transformers.models.auto.modeling_auto")


def test_the_counts_are_those_of_transformers_mappings() -> None:
    found = json.loads(typed.ok("architectures", "--coverage", "--json"))
    known = set(registry.model_types())
    assert [task["task"] for task in found["tasks"]] == list(coverage.TASKS)
    for task, mapping in zip(found["tasks"], coverage.TASKS.values(), strict=True):
        types = set(getattr(auto, mapping))
        assert types, "transformers has no such mapping"
        assert set(task["served"]) == types & known
        assert set(task["unserved"]) == types - known


def test_the_table_has_a_line_for_each_task_and_each_type_without_a_spec() -> None:
    told = typed.ok("architectures", "--coverage").splitlines()
    found = coverage.coverage()
    (causal,) = [line.split() for line in told if line.startswith("causal LM")]
    n_served = len(found.tasks[0].served)
    assert causal[2:4] == [str(n_served), str(n_served + len(found.tasks[0].unserved))]
    for one in found.unserved:
        assert any(line.startswith(f"{one.model_type} ") for line in told)


def test_each_type_without_a_spec_has_a_reason_and_none_with_one() -> None:
    unserved = {one.model_type for one in coverage.coverage().unserved}
    assert sorted(unserved - coverage.reasons().keys()) == []
    assert set(coverage.reasons()) & set(registry.model_types()) == set()
    assert all(why.strip() for why in coverage.reasons().values())
