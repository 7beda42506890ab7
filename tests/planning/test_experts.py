"""How many experts a token takes when their number changes, and what that promises."""

from pathlib import Path
from typing import Any

import pytest

import streammap
from streammap.errors import PlanError
from streammap.planning.plan import Promise
from tests.support import truth
from tests.support.truth import Bench, replaced
from tests.support.typed import run

pytest.importorskip("transformers")

SAME, OTHER = 1e-9, 1e-3
EVERY_SECOND: list[object] = [[0], [2], [4], [6]]


@pytest.fixture(scope="module")
def bench(scratch: Path) -> Bench:
    return Bench(scratch)


def top_k_of(lazy: streammap.LazyCheckpoint) -> object:
    assert lazy.config is not None
    return lazy.config["num_experts_per_tok"]


GROWN: tuple[tuple[str, str, dict[str, Any], dict[str, Any], int, Promise], ...] = (
    # Renormalised gates.
    ("mixtral", "mixtral", {}, {"experts": 2}, 4, "exact"),
    ("mixtral", "mixtral", {}, {"experts": 2, "top_k": "scale"}, 4, "exact"),
    ("mixtral", "mixtral", {}, {"experts": 2, "top_k": "=4"}, 4, "exact"),
    ("mixtral", "mixtral", {}, {"experts": 2, "top_k": 3}, 3, "approximate"),
    ("mixtral", "mixtral", {}, {"experts": 2, "top_k": "keep"}, 2, "approximate"),
    ("mixtral", "mixtral", {}, {"experts": "=9"}, 2, "approximate"),
    # Of equal experts one is as good as the other.
    ("mixtral", "mixtral", {"num_experts_per_tok": 1}, {"experts": 2}, 2, "exact"),
    ("mixtral", "mixtral", {"num_experts_per_tok": 1}, {"experts": "=9"}, 1, "exact"),
    (
        "mixtral",
        "mixtral",
        {"num_experts_per_tok": 1},
        {"experts": 3, "top_k": "keep"},
        1,
        "exact",
    ),
    ("mixtral", "mixtral", {"num_experts_per_tok": 1}, {"experts": 3, "top_k": 2}, 2, "exact"),
    (
        "mixtral",
        "mixtral",
        {"num_experts_per_tok": 1},
        {"experts": 2, "top_k": 3},
        3,
        "approximate",
    ),
    ("qwen_moe", "qwen3_moe_renormalised", {}, {"experts": 2}, 4, "exact"),
    (
        "qwen_moe",
        "qwen3_moe_renormalised",
        {"num_experts_per_tok": 1},
        {"experts": "=10"},
        1,
        "exact",
    ),
    # Shares among all experts: fewer are chosen, and less comes out.
    ("qwen_moe", "qwen2_moe", {}, {"experts": 2}, 4, "exact"),
    ("qwen_moe", "qwen2_moe", {"num_experts_per_tok": 1}, {"experts": "=9"}, 1, "approximate"),
    (
        "qwen_moe",
        "qwen2_moe",
        {"num_experts_per_tok": 1},
        {"experts": 2, "top_k": "keep"},
        1,
        "approximate",
    ),
    # A sigmoid of each expert's own score.
    ("llama4", "llama4_text", {}, {"experts": 2}, 1, "exact"),
    ("llama4", "llama4_text", {}, {"experts": "=9"}, 1, "exact"),
    ("llama4", "llama4_text", {}, {"experts": 2, "top_k": "scale"}, 2, "approximate"),
    ("llama4", "llama4_top2", {}, {"experts": 2}, 2, "approximate"),
    # Groups of experts.
    ("deepseek", "deepseek_v3", {}, {"experts": 2}, 4, "exact"),
    ("deepseek", "deepseek_v3", {"norm_topk_prob": False}, {"experts": 2}, 2, "approximate"),
    (
        "deepseek",
        "deepseek_v3",
        {"norm_topk_prob": False, "num_experts_per_tok": 1},
        {"experts": 2},
        1,
        "exact",
    ),
    ("deepseek", "deepseek_v2", {}, {"experts": 2}, 4, "exact"),
)


@pytest.mark.parametrize(("arch", "name", "changes", "options", "top_k", "promise"), GROWN)
def test_copies_promise_what_their_router_makes_of_them(
    bench: Bench,
    arch: str,
    name: str,
    changes: dict[str, Any],
    options: dict[str, Any],
    top_k: int,
    promise: Promise,
) -> None:
    model = replaced(truth.named(arch, name), **changes)
    source = bench.source(model)
    lazy = streammap.open(source).decoalesce(**options)
    assert top_k_of(lazy) == top_k
    assert lazy.promise[0] == promise
    error = bench.error(lazy, source, model)
    assert error < SAME if promise == "exact" else error > OTHER


def test_a_selection_keeps_top_k_and_a_merge_divides_it(bench: Bench) -> None:
    model = replaced(truth.named("mixtral", "mixtral"), num_local_experts=8)
    source = bench.source(model)
    lazy = streammap.open(source)
    assert top_k_of(lazy.coalesce(experts=EVERY_SECOND)) == 2
    assert top_k_of(lazy.coalesce(experts=[[5]])) == 1
    assert top_k_of(lazy.coalesce(experts=2)) == 1
    assert top_k_of(lazy.coalesce(experts=2, top_k="keep")) == 2
    assert top_k_of(lazy.coalesce(experts=EVERY_SECOND, top_k="scale")) == 1
    assert top_k_of(lazy.coalesce(experts=EVERY_SECOND, top_k=3)) == 3
    truth.outputs(bench.saved(lazy.coalesce(experts=EVERY_SECOND)), model)


def test_a_selection_keeps_groups_of_experts_where_they_still_fit(bench: Bench) -> None:
    model = truth.named("deepseek", "deepseek_v3")
    lazy = streammap.open(bench.source(model))
    kept = lazy.coalesce(experts=[[0], [1], [4], [5]])
    assert kept.config is not None
    assert (kept.config["n_group"], kept.config["topk_group"]) == (2, 1)
    assert top_k_of(kept) == 2
    truth.outputs(bench.saved(kept), model)
    with pytest.raises(PlanError, match="7 experts do not divide into 2 groups"):
        lazy.coalesce(experts=[[i] for i in range(7)])


def test_copies_and_the_way_back_have_the_same_top_k(bench: Bench) -> None:
    lazy = streammap.open(bench.source(truth.named("mixtral", "mixtral")))
    back = streammap.open(bench.saved(lazy.decoalesce(experts=2))).coalesce()
    assert back.config == lazy.config


def test_a_top_k_that_config_json_does_not_say_is_that_of_its_class(bench: Bench) -> None:
    model = truth.named("mixtral", "mixtral")
    source = bench.source(model)
    config = truth.config_of(source)
    assert config.pop("num_experts_per_tok") == 2  # The class's own number.
    folder = truth.write(source.with_name("unsaid"), truth.state_of(source), config)
    grown = streammap.open(folder).decoalesce(experts=2)
    assert grown.promise[0] == "exact"
    assert top_k_of(grown) == 4
    assert bench.error(grown, folder, model) < 1e-9


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"experts": 2, "top_k": 15}, "can take 14 of the result's experts at most"),
        ({"experts": "=9", "top_k": "scale"}, "do not change by one whole factor"),
        ({"mlp": 2, "top_k": "keep"}, "the number of experts does not change"),
        ({"experts": 2, "top_k": "more"}, "expected keep, scale or =N"),
        ({"experts": 2, "top_k": 0}, "expected keep, scale or =N"),
    ],
)
def test_a_top_k_that_cannot_be_is_refused(
    bench: Bench, options: dict[str, Any], expected: str
) -> None:
    lazy = streammap.open(bench.source(truth.named("mixtral", "mixtral")))
    with pytest.raises(PlanError, match=expected) as refusal:
        lazy.decoalesce(**options)
    assert refusal.value.hint


def test_the_command_line_and_records_have_it(bench: Bench, tmp_path: Path) -> None:
    source = bench.source(truth.named("mixtral", "mixtral"))
    result = run("decoalesce", source, tmp_path / "out", "--experts", "2", "--top-k", "=4")
    assert result.exit_code == 0, result.output
    assert "num_experts_per_tok 2 -> 4, with the experts" in result.output
    again = run("apply", tmp_path / "out", tmp_path / "again")
    assert again.exit_code == 0, again.output
    assert truth.config_of(tmp_path / "again") == truth.config_of(tmp_path / "out")
