"""Tiny models of transformers, made once, resized through files and run in strict float64."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import final

from safetensors.torch import save_file
from torch import Tensor

import streammap
from streammap.api import LazyCheckpoint
from streammap.architectures import registry
from streammap.architectures.schema import TinyModel
from streammap.tools.spec_proof import comparison, tiny_models
from tests.support import tiny

Outputs = Mapping[str, Tensor]


@final
class Bench:
    """Sources and what they compute, for one module's tests; and one place for results."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._expected: dict[tuple[Path, tuple[str, ...], int], Outputs] = {}

    def source(self, model: TinyModel, *, seed: int = 0) -> Path:
        """A model's folder, with weights drawn from a seed."""
        folder = self._folder / f"{model.name}-{seed}"
        if not folder.exists():
            tiny_models.build(model, folder, seed=seed)
        return folder

    def edited(self, model: TinyModel, *, seed: int, changes: Mapping[str, object]) -> Path:
        """The same weights with other fields in config.json; dots reach inside."""
        source = self.source(model, seed=seed)
        folder = source.with_name(f"{source.name}-edited")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        config = json.loads((folder / "config.json").read_text())
        for name, value in changes.items():
            *scope, leaf = name.split(".")
            owner = config
            for part in scope:
                owner = owner[part]
            owner[leaf] = value
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    def expected(self, source: Path, model: TinyModel, *, seed: int = 0) -> Outputs:
        """What a source computes; known after the first time."""
        at = source, model.neutral, seed
        if at not in self._expected or source.name.endswith("edited"):
            self._expected[at] = outputs(source, model, seed=seed)
        return self._expected[at]

    def saved(self, lazy: LazyCheckpoint) -> Path:
        """A result's folder; the one before is gone."""
        folder = self._folder / "result"
        shutil.rmtree(folder, ignore_errors=True)
        lazy.save(folder, fsync=False)
        return folder

    def error(
        self, lazy: LazyCheckpoint, source: Path, model: TinyModel, *, seed: int = 0
    ) -> float:
        """How far a result, saved and loaded again, is from its source."""
        found = outputs(self.saved(lazy), model, seed=seed)
        return difference(found, self.expected(source, model, seed=seed))


def named(arch: str, name: str) -> TinyModel:
    """A tiny model of a spec's [proof]."""
    return next(m for m in registry.tiny_models(arch) if m.name == name)


def whole(model: TinyModel) -> TinyModel:
    """The model with all that it computes from positions."""
    return replace(model, neutral=())


outputs = tiny_models.outputs


def difference(found: Outputs, expected: Outputs) -> float:
    """Largest difference / largest number, of all outputs; infinite where shapes differ."""
    assert found.keys() == expected.keys()
    errors = [0.0]
    for name, x in expected.items():
        if found[name].shape != x.shape:
            return float("inf")
        assert bool(found[name].isfinite().all()), name
        errors.append(comparison.difference(found[name], x, in_order=True))
    return max(errors)


def write(folder: Path, state: Mapping[str, Tensor], config: Mapping[str, object]) -> Path:
    """A model that streammap had no hand in."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    copies = {key: x.contiguous().clone() for key, x in state.items()}
    save_file(copies, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def config_of(folder: Path) -> dict[str, object]:
    """A folder's config.json."""
    found: dict[str, object] = json.loads((folder / "config.json").read_text())
    return found


def state_of(folder: Path) -> tiny.State:
    """A folder's tensors, read by the safetensors library."""
    return tiny.written(folder)


def opened(folder: Path) -> LazyCheckpoint:
    """A folder, opened by streammap."""
    return streammap.open(folder)


def replaced(model: TinyModel, **changes: object) -> TinyModel:
    """The model with other fields in its config, and a name that says so."""
    if not changes:
        return model
    name = "-".join((model.name, *(f"{key}={value}" for key, value in changes.items())))
    return replace(model, name=name, config={**model.config, **changes})
