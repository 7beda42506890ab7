"""Quantised checkpoints to bfloat16, beside compressed-tensors' converter.

    python -m bench.dequantise [--runs 5] [--folder DIR] [--quick] [--no-peer]

Whole processes, nothing subtracted: wall and CPU seconds, CPU seconds for each GB written, and peak
memory. compressed-tensors is installed once, in FOLDER/compressed-tensors, a virtual environment of
its own that stays there; where that fails, its row is left out. It converts fp8 blocks; streammap's
other rows stand alone.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from bench import harness
from bench.harness import IMPORT, STREAMMAP, Command, Options, decimals, megabytes
from streammap.io.dtypes import DTYPE_BITS, TensorSpec
from streammap.io.formats import safetensors_header

Specs = Sequence[tuple[str, TensorSpec]]
_CONVERT = """
import sys
from compressed_tensors.entrypoints.convert import FP8BlockDequantizer, convert_checkpoint
convert_checkpoint(sys.argv[1], sys.argv[2], FP8BlockDequantizer(targets=[r"re:.*proj$"]))
"""
_FINITE = bytes(i if i & 0x7F != 0x7F else 0 for i in range(256))
"""Codes of NaN are rare in weights, and take longer."""
_PEER = "compressed-tensors, fp8"


def fp8(n: int) -> Specs:
    """Linear layers of 7168 x 9216 in blocks of 128 x 128."""
    layers = (f"model.layers.{i}.mlp.down_proj.weight" for i in range(n))
    return [
        one
        for key in layers
        for one in (
            (key, TensorSpec("F8_E4M3", (7168, 9216))),
            (f"{key}_scale_inv", TensorSpec("F32", (56, 72))),
        )
    ]


def int4(n: int) -> Specs:
    """Linear layers of 7168 x 7168 in groups of 32."""
    layers = (f"model.layers.{i}.mlp.down_proj.weight" for i in range(n))
    return [
        one
        for key in layers
        for one in (
            (f"{key}_packed", TensorSpec("I32", (7168, 896))),
            (f"{key}_scale", TensorSpec("BF16", (7168, 224))),
        )
    ]


def mxfp4(n: int) -> Specs:
    """Experts of gpt-oss-20b, 8 in a layer."""
    layers = (f"model.layers.{i}.mlp.experts.gate_up_proj" for i in range(n))
    return [
        one
        for key in layers
        for one in (
            (f"{key}_blocks", TensorSpec("U8", (8, 5760, 90, 16))),
            (f"{key}_scales", TensorSpec("U8", (8, 5760, 90))),
        )
    ]


FORMATS = {
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [128, 128]}, 8),
    "int4": (int4, {"quant_method": "compressed-tensors"}, 8),
    "mxfp4": (mxfp4, {"quant_method": "mxfp4"}, 4),
}


def make(folder: Path, name: str, *, quick: bool) -> tuple[Path, int]:
    """A checkpoint of random codes; gives the bytes of what it means too."""
    import streammap

    rule, table, n = FORMATS[name]
    place = folder / name
    place.mkdir(exist_ok=True)
    specs = sorted(rule(1 if quick else n), key=lambda one: -DTYPE_BITS[one[1].dtype])
    config = {"architectures": ["None"], "model_type": "none", "quantization_config": table}
    (place / "config.json").write_text(json.dumps(config))
    with (place / "model.safetensors").open("wb") as file:
        file.write(safetensors_header.encode(specs, {"format": "pt"}))
        for _, spec in specs:
            file.write(_content(spec))
    return place, streammap.open(place).plan.nbytes


def _content(spec: TensorSpec) -> bytes:
    """Scales of 0.0078 (0x3C00 as bfloat16, 121 as an exponent), and any codes."""
    if spec.dtype == "F32":
        return bytes((0, 0, 0, 0x3C)) * spec.n_elements
    if spec.dtype == "BF16":
        return bytes((0, 0x3C)) * spec.n_elements
    is_exponent = spec.dtype == "U8" and len(spec.shape) == 3
    codes = bytes((121,)) * spec.nbytes if is_exponent else os.urandom(spec.nbytes)
    return codes.translate(_FINITE) if spec.dtype == "F8_E4M3" else codes


def add(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark alone."""
    parser.add_argument("--no-peer", action="store_true", help="leave compressed-tensors out")


def main(options: Options) -> None:
    """Install, make, run, print."""
    harness.need(options.folder, 6e9)
    folder, out = options.folder, options.folder / "out"
    commands, written = {"import torch": Command(IMPORT)}, dict[str, int]()
    for name in FORMATS:
        source, nbytes = make(folder, name, quick=options.quick)
        weights, title = source / "model.safetensors", f"streammap, {name}"
        # The identity: a request that opens the source and saves it.
        request = folder / f"{name}.json"
        request.write_text(json.dumps({"operator": "open", "path": str(source)}))
        line = (*STREAMMAP, "apply", request, out, "--no-fsync", "--quiet")
        commands[title], written[title] = Command(line, (out,), [weights], nbytes), nbytes
    python = (
        None
        if options.given.no_peer
        else harness.peer(folder.parent, "compressed-tensors", "python")
    )
    if python is not None:
        convert = (python, "-c", _CONVERT, folder / "fp8", out)
        weights, nbytes = folder / "fp8" / "model.safetensors", written["streammap, fp8"]
        commands[_PEER], written[_PEER] = Command(convert, (out,), [weights], nbytes), nbytes
    results = harness.alternate(commands, options.runs)
    harness.print_head(
        "Quantised to bfloat16: whole processes, nothing subtracted", options.runs, "warm cache"
    )
    base = results.cpu("import torch")
    rows = [
        (
            title,
            decimals(results.wall(title)),
            decimals(results.cpu(title)),
            decimals((results.cpu(title) - base) / written[title] * 1e9)
            if title in written
            else "",
            megabytes(results.peak(title)),
        )
        for title in results.runs
    ]
    columns = ("", "wall s", "CPU s", "CPU s a GB, less the import", "peak MB")
    harness.print_table(columns, rows)


if __name__ == "__main__":
    with harness.options(__doc__, add) as given:
        main(given)
