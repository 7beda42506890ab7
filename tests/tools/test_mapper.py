"""The original's front: command line and classes, against the dense oracle."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import streammap
from streammap.errors import PlanError
from tests.support import oracle, tiny
from tests.support.oracle import Change, Direction, Groups
from tests.support.typed import ok, run

LARGE = tiny.Sizes(heads=4, layers=4, head_dim=64, mlp_per_head=256)
SMALL = tiny.Sizes(heads=2, layers=2, head_dim=64, mlp_per_head=256)
WIDTH: Groups = [[0, 2], [1, 3]]
DEPTH: Groups = [[0, 2], [1, 3]]
MAKERS = {
    "bert": (tiny.bert, tiny.bert_config, oracle.bert),
    "gpt2": (tiny.gpt2, tiny.gpt2_config, oracle.gpt2),
}


def folder(path: Path, arch: str, sizes: tiny.Sizes, *, seed: int = 0) -> tiny.State:
    make, config, _ = MAKERS[arch]
    state = make(sizes, seed=seed)
    tiny.write(path, state, config(sizes))
    return state


def close(found: tiny.State, expected: tiny.State) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key].double(), tensor, rtol=1e-6, atol=1e-6, msg=key)


def expected_of(
    state: tiny.State,
    arch: str,
    direction: Direction,
    *,
    width: Groups = WIDTH,
    depth: Groups = DEPTH,
) -> tiny.State:
    of = oracle.deit if arch == "deit" else MAKERS[arch][2]
    change = Change(direction, "reference", width, LARGE.heads, depth, LARGE.layers)
    return oracle.resized(state, change, of=of, head_dim=64, mlp_per_head=256, tied=arch == "gpt2")


@pytest.fixture
def scheme(tmp_path: Path) -> Path:
    path = tmp_path / "scheme.json"
    content = {"width_scheme": WIDTH, "depth_scheme": DEPTH, "reserved_heads": []}
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("arch", ["bert", "gpt2"])
@pytest.mark.parametrize("opt", ["C", "D"])
def test_map_gives_the_originals_numbers(tmp_path: Path, scheme: Path, arch: str, opt: str) -> None:
    source, target = (LARGE, SMALL) if opt == "C" else (SMALL, LARGE)
    state = folder(tmp_path / "src", arch, source)
    folder(tmp_path / "tgt", arch, target)
    said = ok(
        "map",
        "--arch",
        arch,
        "--opt",
        opt,
        "--src-dir",
        tmp_path / "src",
        "--tgt-dir",
        tmp_path / "tgt",
        "--config",
        scheme,
        "--save-dir",
        tmp_path / "out",
    )
    assert "reserved_heads: accepted, and not used" in said
    direction: Direction = "coalesce" if opt == "C" else "decoalesce"
    close(load_file(tmp_path / "out" / "model.safetensors"), expected_of(state, arch, direction))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == json.loads((tmp_path / "tgt" / "config.json").read_text())


@pytest.mark.parametrize("arch", ["bert", "gpt2"])
def test_map_blends(tmp_path: Path, arch: str) -> None:
    source = folder(tmp_path / "src", arch, SMALL, seed=1)
    target = folder(tmp_path / "tgt", arch, SMALL, seed=2)
    ok(
        "map",
        "--arch",
        arch,
        "--opt",
        "IP",
        "--alpha",
        0.25,
        "--src-dir",
        tmp_path / "src",
        "--tgt-dir",
        tmp_path / "tgt",
        "--save-dir",
        tmp_path / "out",
    )
    found = load_file(tmp_path / "out" / "model.safetensors")
    close(found, oracle.interpolated(source, target, 0.25))


def test_the_result_may_replace_the_target_as_in_the_manual(tmp_path: Path, scheme: Path) -> None:
    state = folder(tmp_path / "big", "bert", LARGE)
    folder(tmp_path / "small", "bert", SMALL)
    torch.save({}, tmp_path / "small" / "pytorch_model.bin")
    ok(
        "map",
        "--arch",
        "bert",
        "--opt",
        "C",
        "--src-dir",
        tmp_path / "big",
        "--tgt-dir",
        tmp_path / "small",
        "--config",
        scheme,
        "--save-dir",
        tmp_path / "small",
    )
    assert not (tmp_path / "small" / "pytorch_model.bin").exists()
    close(
        load_file(tmp_path / "small" / "model.safetensors"), expected_of(state, "bert", "coalesce")
    )


def test_without_a_scheme_units_and_neighbouring_layers_are_paired(tmp_path: Path) -> None:
    state = folder(tmp_path / "src", "gpt2", LARGE)
    folder(tmp_path / "tgt", "gpt2", SMALL)
    streammap.GPT2Mapper(tmp_path / "src", tmp_path / "tgt", tmp_path / "out").coalesce().save()
    expected = expected_of(
        state, "gpt2", "coalesce", width=[[0, 2], [1, 3]], depth=[[0, 1], [2, 3]]
    )
    close(load_file(tmp_path / "out" / "model.safetensors"), expected)


def test_a_third_head_without_partner_stays_alone(tmp_path: Path) -> None:
    large, small = tiny.Sizes(heads=3, layers=2, head_dim=64), tiny.Sizes(2, 2, 64)
    folder(tmp_path / "src", "gpt2", large)
    folder(tmp_path / "tgt", "gpt2", small)
    mapper = streammap.GPT2Mapper(tmp_path / "src", tmp_path / "tgt").coalesce()
    norm = load_file(tmp_path / "src" / "model.safetensors")["h.0.ln_1.weight"]
    expected = torch.cat([(norm[:64] + norm[128:]) / 2, norm[64:128]])
    torch.testing.assert_close(mapper.result.read("h.0.ln_1.weight"), expected)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_map_reads_and_writes_deit_files(tmp_path: Path, scheme: Path, suffix: str) -> None:
    state = tiny.timm_deit(LARGE)
    small, big = tmp_path / "deit-L2-H2", tmp_path / "deit-L4-H4"
    big.mkdir()
    torch.save({"model": state, "epoch": 3}, big / "checkpoint-130.pth")
    said = ok(
        "map",
        "--arch",
        "deit",
        "--src-arch",
        "L4-H4",
        "--tgt-arch",
        "L2-H2",
        "--src-dir",
        big,
        "--src-ckp",
        "checkpoint-130.pth",
        "--opt",
        "C",
        "--config",
        scheme,
        "--save-dir",
        small,
        "--save-ckp",
        f"checkpoint-130-C{suffix}",
    )
    assert "epoch beside the state dict: left out" in said
    made = small / f"checkpoint-130-C{suffix}"
    expected = expected_of(state, "deit", "coalesce")
    if suffix == ".pth":
        close(torch.load(made, weights_only=True)["model"], expected)
    else:
        close(load_file(made), expected)
    # The next command of the manual takes it, and the map that was saved beside it.
    ok(
        "map",
        "--arch",
        "deit",
        "--src-arch",
        "L2-H2",
        "--tgt-arch",
        "L4-H4",
        "--src-dir",
        small,
        "--src-ckp",
        made.name,
        "--opt",
        "D",
        "--save-dir",
        big,
        "--save-ckp",
        "checkpoint-130-C-D.pth",
    )
    grown = torch.load(big / "checkpoint-130-C-D.pth", weights_only=True)
    grown = grown.get("model", grown)
    shrunk = tiny.opened(made)
    close(grown, expected_of(shrunk, "deit", "decoalesce"))
    ok(
        "map",
        "--arch",
        "deit",
        "--src-arch",
        "L4-H4",
        "--tgt-arch",
        "L4-H4",
        "--src-dir",
        big,
        "--src-ckp",
        "checkpoint-130-C-D.pth",
        "--tgt-dir",
        big,
        "--tgt-ckp",
        "checkpoint-130.pth",
        "--opt",
        "IP",
        "--alpha",
        0.25,
        "--save-dir",
        tmp_path / "ip",
        "--save-ckp",
        "ip.pth",
    )
    blended = torch.load(tmp_path / "ip" / "ip.pth", weights_only=True)["model"]
    close(blended, oracle.interpolated(grown, state, 0.25))


def test_the_manuals_chain_of_calls(tmp_path: Path) -> None:
    small = folder(tmp_path / "small", "bert", SMALL, seed=1)
    big = folder(tmp_path / "big", "bert", LARGE, seed=2)
    mapper = streammap.BertMapper(
        src_dir=tmp_path / "small",
        tgt_dir=tmp_path / "big",
        save_dir=tmp_path / "out",
        width_scheme=WIDTH,
        depth_scheme=DEPTH,
    )
    report = mapper.decoalesce().interpolate(alpha=0.5).save()
    assert report.output == str(tmp_path / "out")
    grown = expected_of(small, "bert", "decoalesce")
    close(load_file(tmp_path / "out" / "model.safetensors"), oracle.interpolated(grown, big, 0.5))


def test_down_and_up_again_and_blended_with_the_source(tmp_path: Path) -> None:
    big = folder(tmp_path / "big", "bert", LARGE, seed=2)
    folder(tmp_path / "small", "bert", SMALL)
    mapper = streammap.BertMapper(
        tmp_path / "big", tmp_path / "small", tmp_path / "out", WIDTH, DEPTH
    )
    mapper.coalesce().decoalesce().interpolate(0.5).save()
    projected = expected_of(expected_of(big, "bert", "coalesce"), "bert", "decoalesce")
    close(
        load_file(tmp_path / "out" / "model.safetensors"), oracle.interpolated(projected, big, 0.5)
    )


def test_map_refuses_the_wrong_direction(tmp_path: Path, scheme: Path) -> None:
    folder(tmp_path / "src", "bert", SMALL)
    folder(tmp_path / "tgt", "bert", LARGE)
    result = run(
        "map",
        "--arch",
        "bert",
        "--opt",
        "C",
        "--src-dir",
        tmp_path / "src",
        "--tgt-dir",
        tmp_path / "tgt",
        "--config",
        scheme,
        "--save-dir",
        tmp_path / "out",
    )
    assert result.exit_code == 1
    assert "the target is the larger model" in result.stderr
    assert not (tmp_path / "out").exists()


def test_map_says_which_flag_is_missing(tmp_path: Path) -> None:
    result = run("map", "--arch", "deit", "--opt", "C", "--src-dir", tmp_path, "--save-dir", "x")
    assert result.exit_code == 1
    assert "--src-arch is missing" in result.stderr


def test_an_arch_that_the_file_is_not_is_refused(tmp_path: Path) -> None:
    save_file(tiny.timm_deit(LARGE), tmp_path / "x.safetensors")
    with pytest.raises(PlanError, match="layer is 4, L12-H4 says 12"):
        streammap.DeiTMapper("L12-H4", "L2-H2", tmp_path, "x.safetensors")
    with pytest.raises(PlanError, match="'12-12': expected layers and heads"):
        streammap.DeiTMapper("12-12", "L2-H2", tmp_path, "x.safetensors")


def test_groups_that_do_not_fit_the_target_are_refused(tmp_path: Path) -> None:
    folder(tmp_path / "src", "bert", LARGE)
    folder(tmp_path / "tgt", "bert", SMALL)
    mapper = streammap.BertMapper(
        tmp_path / "src", tmp_path / "tgt", width_scheme=[[0], [1], [2]], depth_scheme=DEPTH
    )
    with pytest.raises(streammap.SchemeError, match="3 groups, the small model has 2"):
        mapper.coalesce()


def test_saving_over_the_source_is_refused(tmp_path: Path) -> None:
    folder(tmp_path / "src", "bert", LARGE)
    folder(tmp_path / "tgt", "bert", SMALL)
    mapper = streammap.BertMapper(tmp_path / "src", tmp_path / "tgt", tmp_path / "src")
    with pytest.raises(PlanError, match="is the source itself"):
        mapper.coalesce().save()
