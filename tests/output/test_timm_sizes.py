"""timm builds what `architecture` names; sizes of a result that differ stand in `model_args`."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import streammap
from streammap.architectures import registry
from streammap.errors import PlanError
from streammap.planning import config_json
from tests.support import tiny

SIZES = tiny.Sizes(heads=3, head_dim=64, layers=4, mlp_per_head=64)
TIMM = {
    "architecture": "vit_tiny_patch16_224",
    "num_classes": 5,
    "num_features": SIZES.embed,
    "pretrained_cfg": {"input_size": [3, 160, 160], "fixed_input_size": True, "num_classes": 5},
}


def source(folder: Path, more: dict[str, object]) -> Path:
    state = tiny.timm_deit(SIZES, distilled=False)
    return tiny.write(folder, state, {**TIMM, **more})


ARGUMENTS: tuple[dict[str, object], ...] = (
    {},
    {"model_args": None},
    {"model_args": {}},
    {"model_args": {"num_classes": 5, "mlp_ratio": 1}},
    {"model_args": {"embed_dim": 192, "depth": 4, "num_heads": 3, "mlp_ratio": 1.0}},
)
CHANGES: tuple[tuple[str, dict[str, Any], dict[str, object]], ...] = (
    ("decoalesce", {"width": 2}, {"embed_dim": 384, "num_heads": 6, "mlp_ratio": 1}),
    ("decoalesce", {"depth": 2}, {"depth": 8}),
    ("decoalesce", {"axes": {"mlp": 3}}, {"mlp_ratio": 3}),
    ("coalesce", {"axes": {"mlp": 4}}, {"mlp_ratio": 0.25}),
    ("coalesce", {"width": 3, "depth": 2}, {"embed_dim": 64, "num_heads": 1, "depth": 2}),
)


@pytest.mark.parametrize("more", ARGUMENTS)
@pytest.mark.parametrize(("how", "options", "expected"), CHANGES)
def test_sizes_that_change_are_written_as_arguments(
    tmp_path: Path,
    more: dict[str, object],
    how: str,
    options: dict[str, Any],
    expected: dict[str, object],
) -> None:
    lazy = getattr(streammap.open(source(tmp_path, more)), how)(**options)
    arguments = lazy.config["model_args"]
    assert {name: arguments[name] for name in expected} == expected
    given_ones = more.get("model_args")
    kept = {k: v for k, v in (given_ones or {}).items() if k not in expected}  # type: ignore[attr-defined]
    assert {name: arguments[name] for name in kept} == kept
    assert lazy.config["num_features"] == lazy.sizes["embed"]


def test_nothing_is_written_where_nothing_changes(tmp_path: Path) -> None:
    lazy = streammap.open(source(tmp_path, {}))
    assert lazy.permute(seed=1).config == lazy.config


@given(st.integers(1, 2**20), st.integers(1, 2**20))
def test_a_ratio_gives_the_size_that_it_was_made_of(part: int, whole: int) -> None:
    ratio = config_json.ratio(part, whole, None)
    assert int(whole * json.loads(json.dumps(ratio))) == part


def test_a_ratio_that_still_holds_stays() -> None:
    assert config_json.ratio(6144, 1408, 48 / 11) == 48 / 11
    assert config_json.ratio(8, 2, 4) == 4
    assert config_json.ratio(8, 2, 3) == 4.0


@pytest.mark.parametrize(
    ("name", "embed", "heads"),
    [
        ("vit_base_patch16_224", 768, 12),
        ("vit_huge_patch14_clip_224", 1280, 16),
        ("deit3_huge_patch14_224", 1280, 16),
        ("vit_giant_patch14_clip_224", 1408, 16),
        ("vit_giant_patch14_reg4_dinov2", 1536, 24),
        ("vit_giant_patch16_radio_v3", 1536, 24),
        ("vit_gigantic_patch14_224", 1664, 16),
        ("vit_so400m_patch14_siglip_gap_224", 1152, 16),
        ("vit_base_patch16_gap_224", 768, 16),
        ("somebodys_vit", 384, 6),
    ],
)
def test_heads_that_no_argument_tells_are_those_of_the_name(
    name: str, embed: int, heads: int
) -> None:
    spec = registry.load("timm_vit", {"architecture": name})
    assert spec.size(spec.aliases["named_heads"], {"embed": embed}) == heads


def has_timm() -> bool:
    try:
        importlib.import_module("timm")
    except ImportError:
        return False
    return True


@pytest.mark.skipif(not has_timm(), reason="needs timm")
@pytest.mark.parametrize("more", ARGUMENTS[:3])
@pytest.mark.parametrize(("how", "options"), [(how, options) for how, options, _ in CHANGES[:4]])
def test_timm_loads_the_result_and_computes_the_same(
    tmp_path: Path, more: dict[str, object], how: str, options: dict[str, Any]
) -> None:
    timm = importlib.import_module("timm")
    net = timm.create_model("test_vit", num_classes=5).eval()
    config = {**TIMM, "architecture": "test_vit", **more}
    folder = tiny.write(tmp_path / "source", net.state_dict(), config)
    lazy = getattr(streammap.open(folder), how)(**options)
    lazy.save(tmp_path / "out", class_check="always")
    made = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    image = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        before, after = net(image), made(image)
    assert before.shape == after.shape
    if lazy.promise[0] != "approximate":
        assert torch.allclose(before, after, atol=1e-3)


@pytest.mark.skipif(not has_timm(), reason="needs timm")
def test_timm_refuses_what_it_would_not_load(tmp_path: Path) -> None:
    spec = tmp_path / "forgetful.toml"
    spec.write_text('schema = 1\nextends = "timm_vit"\nmodel_types = ["x"]\n[written]\nmlp = {}\n')
    timm = importlib.import_module("timm")
    state = timm.create_model("test_vit", num_classes=5).state_dict()
    folder = tiny.write(tmp_path / "s", state, {**TIMM, "architecture": "test_vit"})
    lazy = streammap.open(folder, arch=str(spec)).decoalesce(axes={"mlp": 2})
    with pytest.raises(PlanError, match=r"fc1.bias: shape \[384\], test_vit of its .* has \[192\]"):
        lazy.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
