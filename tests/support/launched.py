"""What each process of a launch does; torchrun starts it. Its first word says which of them."""

import json
import sys
from pathlib import Path

import torch
import transformers
from torch import Tensor
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import streammap
from streammap.common import optional
from streammap.output.run import peak_nbytes

MEMORY = 64 * 2**20


def _whole(tensor: object) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.full_tensor()


def _sharded(config: dict[str, object], *, meta: bool) -> transformers.LlamaForCausalLM:
    kind = transformers.LlamaForCausalLM
    with torch.device("meta" if meta else "cpu"):
        model = kind(transformers.LlamaConfig.from_dict(config))
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


def fill(folder: Path) -> dict[str, object]:
    """Fill a sharded model, and compare it with the written one where that is small."""
    lazy = streammap.open(folder / "source").decoalesce(width=2)
    model = _sharded(dict(lazy.config or {}), meta=True)
    x = torch.zeros(1, 1, dtype=torch.int64)
    before = peak_nbytes()
    report = streammap.load_into(model, lazy, memory=MEMORY)
    grown = peak_nbytes() - before
    wanted = transformers.LlamaForCausalLM.from_pretrained(folder / "out")
    same = all(
        torch.equal(_whole(p), wanted.get_parameter(n)) for n, p in model.named_parameters()
    ) and all(torch.equal(b, wanted.get_buffer(n)) for n, b in model.named_buffers())
    with torch.no_grad():
        same = same and torch.allclose(model(x).logits, wanted(x).logits, atol=1e-4)
    return {"grown": grown, "nbytes": report.nbytes, "total": lazy.plan.nbytes, "same": same}


def mesh(folder: Path) -> dict[str, object]:
    """FSDP over tensor parallelism, 2 x 2."""
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    lazy = streammap.open(folder / "source")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig.from_dict(dict(lazy.config or {}))
        )
    for layer in model.model.layers:
        styles = {"mlp.up_proj": ColwiseParallel(), "mlp.down_proj": RowwiseParallel()}
        parallelize_module(layer, grid["tp"], styles)
        fully_shard(layer, mesh=grid["dp"])
    fully_shard(model, mesh=grid["dp"])
    streammap.load_into(model, lazy)
    same = all(
        torch.equal(_whole(parameter), lazy.read(name))
        for name, parameter in model.named_parameters()
        if name in lazy.state_dict()
    )
    return {"same": same, "placements": str(model.model.layers[0].mlp.up_proj.weight.placements)}


def checkpoints(folder: Path) -> dict[str, object]:
    """Save a sharded model with DCP, resize what was saved, and load the result with DCP."""
    source = streammap.open(folder / "source")
    model = _sharded(dict(source.config or {}), meta=True)
    streammap.load_into(model, source)
    extra = distribute_tensor(
        torch.arange(2 * 5 * 3.0).view(2, 5, 3), init_device_mesh("cpu", (2,)), [Shard(1)]
    )
    save({"model": model.state_dict(), "other": extra}, checkpoint_id=folder / "saved")
    if dist.get_rank() == 0:
        saved = streammap.open(folder / "saved", config=folder / "source" / "config.json")
        saved.coalesce(width=2).save(folder / "small", format="dcp")
        source.coalesce(width=2).save(folder / "plain")
    dist.barrier()
    small = streammap.open(folder / "small")
    into = _sharded(dict(small.config or {}), meta=False)
    load({"model": into.state_dict()}, checkpoint_id=folder / "small")
    plain = streammap.open(folder / "plain")
    same = all(torch.equal(_whole(p), plain.read(name)) for name, p in into.named_parameters())
    return {"same": same, "files": len(list((folder / "saved").glob("*.distcp")))}


def optimizer(folder: Path) -> dict[str, object]:
    """Train sharded, save both with DCP, grow what was saved, and go on from the result."""
    source = streammap.open(folder / "source")
    model = _sharded(dict(source.config or {}), meta=True)
    streammap.load_into(model, source)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x = torch.arange(6)[None]
    for _ in range(2):
        _step(model, adam, x)
    state = {"model": model.state_dict(), "optim": get_optimizer_state_dict(model, adam)}
    save(state, checkpoint_id=folder / "trained")
    if dist.get_rank() == 0:
        saved = streammap.open(folder / "trained", config=folder / "source" / "config.json")
        saved.decoalesce(width=2).carry_optimizer().save(folder / "grown", format="dcp")
    dist.barrier()
    grown = streammap.open(folder / "grown").carry_optimizer()
    into = _sharded(dict(grown.config or {}), meta=False)
    adams = [torch.optim.AdamW(into.parameters(), lr=7.0) for _ in range(2)]
    # What torch.distributed.checkpoint reads, and what is filled in place.
    wanted = {"optim": get_optimizer_state_dict(into, adams[0])}
    load({"model": (weights := into.state_dict()), **wanted}, checkpoint_id=folder / "grown")
    into.load_state_dict(weights)
    set_optimizer_state_dict(into, adams[0], wanted["optim"])
    streammap.load_optimizer_into(adams[1], into, grown)
    same = all(
        torch.equal(_whole(adam.state[p][what]), grown.read(f"optim.state.{name}.{what}"))
        and float(adam.state[p]["step"]) == 2
        for adam in adams
        for name, p in into.named_parameters()
        for what in ("exp_avg", "exp_avg_sq")
    )
    kept = [adam.param_groups[0]["lr"] for adam in adams]
    loss = _step(into, adams[0], x)
    return {"same": same, "lr": kept, "loss": loss, "before": _step(model, adam, x)}


def _step(model: transformers.LlamaForCausalLM, adam: torch.optim.Optimizer, x: Tensor) -> float:
    adam.zero_grad()
    loss = model(x, labels=x).loss
    loss.backward()
    adam.step()
    return float(loss)


WHATS = {"fill": fill, "mesh": mesh, "checkpoints": checkpoints, "optimizer": optimizer}


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder = Path(sys.argv[2])
    with optional.quiet():
        found = WHATS[sys.argv[1]](folder)
    (folder / f"{sys.argv[1]}-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
