"""Numbers by place, beside what mergekit makes of them."""

import random

import pytest

from streammap.errors import PlanError
from streammap.planning.merging import settings
from streammap.planning.merging.settings import Place

KEYS = ("model.layers.3.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight", "lm_head")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.5, (0.5, 0.5, 0.5)),
        ("1e-3", (1e-3, 1e-3, 1e-3)),
        ([0, 1], (0.25, 0.25, 0.25)),
        ([{"filter": "mlp", "value": [1, 3]}, 7], (1.5, 7, 7)),
        ([{"filter": "*self_attn*", "value": 2}, {"value": 4}], (4, 2, 4)),
        ({"filter": "lm_head", "value": 2}, (None, None, 2)),
    ],
)
def test_a_number_depends_on_the_key_and_the_depth(
    value: object, expected: tuple[float | None, ...]
) -> None:
    setting = settings.parse(value, what="weight")
    assert tuple(setting.at(Place(key, 0.25)) for key in KEYS) == expected


@pytest.mark.parametrize("value", ["much", [], True, [[1]], {"filter": "a"}, {"value": 1, "x": 2}])
def test_what_is_no_setting_is_refused_by_name(value: object) -> None:
    with pytest.raises(PlanError, match="alpha: "):
        settings.parse(value, what="alpha")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "nan"])
def test_numbers_are_finite(value: object) -> None:
    with pytest.raises(PlanError, match="number"):
        settings.parse(value, what="alpha")


@pytest.mark.slow
def test_mergekit_makes_the_same_of_random_settings() -> None:
    config = pytest.importorskip("mergekit.config")
    draw = random.Random(0)
    for _ in range(300):
        values = [draw.choice([0, 1, 0.3, -2]) for _ in range(draw.randrange(1, 5))]
        rules: list[dict[str, object]] = [
            {"filter": draw.choice(["mlp", "attn", "*", "lm", "none"]), "value": values},
            {"value": draw.random()},
        ]
        for value in (values, values[0], rules):
            theirs = (
                [config.ConditionalParameter(**rule) for rule in rules] if value is rules else value
            )
            depth = draw.random()
            for key in KEYS:
                expected = config.evaluate_setting(key, theirs, depth, validate=float)
                assert settings.parse(value, what="w").at(Place(key, depth)) == expected
