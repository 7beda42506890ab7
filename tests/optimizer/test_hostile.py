"""States that are broken, strange, or of another model: refused by names and shapes."""

import os
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save

import streammap
from streammap.errors import CheckpointError
from tests.support import optimized, typed

Edit = Callable[[dict[str, Any]], None]


def _pop(number: int) -> Edit:
    return lambda content: content["state"].pop(number) and None


def _replace(number: int, what: str, value: object) -> Edit:
    def edit(content: dict[str, Any]) -> None:
        content["state"][number][what] = value

    return edit


def _all(edit: Callable[[dict[str, Any]], None]) -> Edit:
    def apply(content: dict[str, Any]) -> None:
        for kept in content["state"].values():
            edit(kept)

    return apply


def _factored(kept: dict[str, Any]) -> None:
    kept["exp_avg_sq_row"] = kept.pop("exp_avg_sq")


def _in_8_bits(kept: dict[str, Any]) -> None:
    kept["state1"], kept["qmap1"] = kept.pop("exp_avg").to(torch.uint8), kept.pop("exp_avg_sq")


def _group(**options: object) -> Edit:
    return lambda content: content["param_groups"][0].update(options)


BROKEN = {
    "missing": (_pop(3), r"no state of 1 of 21 parameters: 3"),
    "loose": (lambda c: c["state"].update({99: c["state"][0]}), "state of 99, in no group"),
    "shape": (_replace(0, "exp_avg", torch.zeros(31, 7)), r"\[31, 16\].*\[31, 7\]"),
    "second shape": (_replace(0, "exp_avg_sq", torch.zeros(2)), r"embed.*exp_avg_sq has.*\[2\]"),
    "integers": (
        _replace(1, "exp_avg", torch.zeros(16, 16, dtype=torch.int32)),
        "exp_avg is I32, expected a float",
    ),
    "uneven": (
        lambda c: c["state"][2].pop("exp_avg_sq"),
        "2 has exp_avg, step, and 0 has exp_avg, exp_avg_sq",
    ),
    "factored": (_all(_factored), "exp_avg_sq_row, expected one of: exp_avg, exp_avg_sq"),
    "8 bits": (_all(_in_8_bits), "0 has qmap1, state1, expected one of"),
    "lr": (_group(lr=torch.tensor(0.1)), "lr is a tensor, expected a number"),
    "twice": (_group(params=[0] * 16), "in two groups|in no group"),
    "no params": (_group(params=None), r"param_groups\[0\] has no params"),
    "names": (_group(param_names=["a"]), r"has 16 params, and other param_names"),
    "table": (lambda c: c["state"].update({4: 7}), "the state of 4 is no table"),
    "groups": (lambda c: c["param_groups"].pop(), "in no group"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_state_is_refused_before_anything_is_written(
    name: str, trained: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(trained, tmp_path / "source")
    content = torch.load(folder / optimized.FILE)
    edit, message = BROKEN[name]
    edit(content)
    torch.save(content, folder / optimized.FILE)
    with pytest.raises(CheckpointError, match=message) as caught:
        streammap.decoalesce(folder, tmp_path / "out", width=2, optimizer=True)
    assert caught.value.hint
    assert not (tmp_path / "out").exists()


class _Runs:
    """Would make a folder wherever it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self._folder),)


def test_nothing_in_a_pickle_runs(trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained, tmp_path / "source")
    content = torch.load(folder / optimized.FILE)
    content["param_groups"][0]["lr"] = _Runs(tmp_path / "ran")
    torch.save(content, folder / optimized.FILE)
    told = typed.run("decoalesce", folder, tmp_path / "out", "--width", 2, "--optimizer")
    assert told.exit_code != 0
    assert "its pickle asks for more than tensors" in told.output
    (folder / optimized.FILE).unlink()
    state = {name: {"exp_avg": torch.zeros(2)} for name in ("a", "b")}
    optim = {"state": state, "param_groups": [{"lr": _Runs(tmp_path / "ran"), "params": ["a"]}]}
    model = dict(streammap.open(trained).tensors())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save({"model": model, "optim": optim}, checkpoint_id=folder / "dcp")
    shutil.copy(folder / "config.json", folder / "dcp")
    with pytest.raises(CheckpointError, match="its pickle asks for more than tensors"):
        streammap.open(folder / "dcp").carry_optimizer()
    assert not (tmp_path / "ran").exists()


def test_what_is_no_state_is_told(trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained, tmp_path / "source")
    file = folder / optimized.FILE
    file.unlink()
    with pytest.raises(CheckpointError, match=r"no optimizer's state, expected optimizer\.pt"):
        streammap.open(folder).carry_optimizer()
    file.write_bytes(pickle.dumps({"state": {}, "param_groups": []}))
    with pytest.raises(CheckpointError, match="not a torch file in the zip form"):
        streammap.open(folder).carry_optimizer()
    torch.save({"state": {}, "param_groups": []}, file)
    with pytest.raises(CheckpointError, match="no state of 0 of 0 parameters"):
        streammap.open(folder).carry_optimizer()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"nonsense")
    with pytest.raises(CheckpointError, match="its pickle is broken"):
        streammap.open(folder).carry_optimizer()


def test_a_state_of_another_model_is_refused(trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained, tmp_path / "source")
    specs = streammap.open(folder).plan.specs
    shapes = {name: spec.shape for name, spec in specs.items() if "norm" not in name}
    state = {
        n: {"exp_avg": torch.zeros(s), "exp_avg_sq": torch.zeros(s)} for n, s in shapes.items()
    }
    optimized.write(folder / optimized.FILE, state)
    carried = streammap.open(folder).carry_optimizer()  # as of an optimizer without the norms
    assert "no state in the source, and none in the result" in " ".join(carried.plan.notes)
    assert len(carried.keys()) == 21 + 2 * 16
    del state["model.layers.1.mlp.up_proj.weight"]
    optimized.write(folder / optimized.FILE, state)
    with pytest.raises(CheckpointError, match=r"no state of 1 of 2 .*up_proj.*: model\.layers\.1"):
        streammap.open(folder).carry_optimizer()
    optimized.write(folder / optimized.FILE, {f"encoder.{n}": kept for n, kept in state.items()})
    with pytest.raises(CheckpointError, match="its parameters are not those of the model: encoder"):
        streammap.open(folder).carry_optimizer()
