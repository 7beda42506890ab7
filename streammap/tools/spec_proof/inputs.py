"""What tiny models are run on: tokens, images and sounds, as each class's forward takes them.

No size that a resizing may change counts. Images and sounds have as many places among the tokens as
the model makes features of them.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Conv1d, Module

_BATCH, _N_TOKENS, _N_FRAMES = 2, 17, 20
_FIRST_TOKEN = 10
"""Ids below it are padding, masks and images in the tiny models."""
_PLACES = {
    "get_image_features": (
        "image_token_id",
        "image_token_index",
        "image_patch_id",
        "video_token_id",
    ),
    "get_audio_features": ("audio_token_id", "audio_token_index"),
}
"""What makes features -> the fields that say which token stands for one of them."""

_GRIDS = ("grid_thw", "image_grid_thw", "image_grid_hw")
"""How many patches an image has: in time, rows and columns."""
_HEARD = ("feature_attention_mask", "input_features_mask", "padding_mask")
"""Masks of the frames of sounds."""


class Net(Protocol):
    """A model of transformers, as far as it is run."""

    config: Any
    forward: Callable[..., object]

    def modules(self) -> Iterator[Module]:
        """All modules of the model."""
        ...


def make(net: Net) -> dict[str, Tensor]:
    """What the model's forward takes."""
    takes, config = inspect.signature(net.forward).parameters, net.config
    inputs: dict[str, Tensor] = {}
    # Kosmos-2's queries over the image have fixed places among the tokens.
    n_queries = config.latent_query_num if "image_embeds_position_mask" in takes else 0
    n_tokens = max(_N_TOKENS, 1 + n_queries + _FIRST_TOKEN)
    if "input_ids" in takes:
        # Drawn before all else: what is made for images must not change them.
        inputs["input_ids"] = _ids(_n_ids(config.get_text_config()), n_tokens)
    if "decoder_input_ids" in takes:
        inputs["decoder_input_ids"] = _ids(_n_ids(config, "decoder"))
    n_types = _number(config, "type_vocab_size") or 0
    several = getattr(config, "type_vocab_sizes", None)
    if "token_type_ids" in takes and several:
        columns = [torch.randint(n, (_BATCH, _N_TOKENS)) for n in several]
        inputs["token_type_ids"] = torch.stack(columns, dim=-1)
    elif "token_type_ids" in takes and n_types:
        inputs["token_type_ids"] = torch.randint(n_types, (_BATCH, _N_TOKENS))
    if "entity_ids" in takes:
        inputs |= _entities(config)
    if "qformer_input_ids" in takes:
        inputs["qformer_input_ids"] = _ids(_number(config.qformer_config, "vocab_size") or 0)
    if "flattened_patches" in takes:
        size = _number(config, "patch_embed_hidden_size")
        inputs["flattened_patches"] = _patches_with_places(size or 0)
    if n_queries:
        inputs["image_embeds_position_mask"] = torch.zeros(_BATCH, n_tokens, dtype=torch.long)
        inputs["image_embeds_position_mask"][:, 1 : 1 + n_queries] = 1
    if "bbox" in takes:
        inputs["bbox"] = _boxes(_number(config, "max_2d_position_embeddings") or _N_TOKENS)
    if getattr(config, "audio_config", config) is not None:
        inputs |= _sounds(net, takes)
    sees = getattr(config, "visual_embed", True)
    sees = sees and getattr(config, "vision_config", config) is not None
    if sees and ("pixel_values" in takes or "grid_thw" in takes):
        inputs |= _images(net, takes)
    return inputs | _with_places(net, inputs, takes)


def _n_ids(config: Any, side: str = "") -> int:
    """How many tokens there are; of a model of two, those of one side."""
    part = getattr(config, side, None) if side else None
    sizes: tuple[int | None, ...] = (
        getattr(config, f"{side}_vocab_size", None),
        getattr(part, "vocab_size", None),
    )
    n_ids: int = next((size for size in sizes if size), config.get_text_config().vocab_size)
    return n_ids


def _ids(n_ids: int, n_tokens: int = _N_TOKENS) -> Tensor:
    return torch.randint(_FIRST_TOKEN, n_ids, (_BATCH, n_tokens))


def _boxes(n_places: int) -> Tensor:
    """Boxes on a page: left, top, right, bottom."""
    corner = torch.randint(n_places // 2, (_BATCH, _N_TOKENS, 2))
    return torch.cat([corner, corner + torch.randint(1, n_places // 2, corner.shape)], dim=-1)


def _entities(config: Any) -> dict[str, Tensor]:
    """Entities beside the words, and the words that each is named by, as LUKE takes them."""
    places = torch.randint(_N_TOKENS, (_BATCH, 3, 2))
    return {
        "entity_ids": torch.randint(1, config.entity_vocab_size, (_BATCH, 3)),
        "entity_position_ids": places,
    }


def _patches_with_places(size: int) -> Tensor:
    """Flat patches, each behind its row and column, as Pix2Struct takes them."""
    rows = torch.arange(1, 4).float()
    places = torch.stack([rows.repeat(3), rows.repeat_interleave(3)], dim=-1).expand(_BATCH, -1, -1)
    return torch.cat([places, torch.randn(_BATCH, 9, size)], dim=-1)


def _number(config: Any, *names: str) -> int | None:
    """The first of some fields that the configuration, or a part of it, has as a number."""
    for part in (config, *_parts(config)):
        for name in names:
            value = getattr(part, name, None)
            if isinstance(value, list | tuple) and value:
                value = value[0]
            if isinstance(value, int):
                return value
    return None


def _parts(config: Any) -> Iterator[Any]:
    """A configuration's parts that see or hear, and itself."""
    for name in ("vision_config", "audio_config", "encoder", "encoder_config", "backbone_config"):
        part = getattr(config, name, None)
        if part is not None and not isinstance(part, dict):
            yield part
    yield config


def _seen(config: Any) -> Any:
    """The part of a configuration that sees."""
    sees = (p for p in _parts(config) if any(hasattr(p, n) for n in ("patch_size", "image_size")))
    return next(sees, config)


def _with_places(
    net: Net, inputs: Mapping[str, Tensor], takes: Mapping[str, object]
) -> dict[str, Tensor]:
    """The tokens with places for what the model makes of images and sounds."""
    ids = inputs.get("input_ids")
    if ids is None:
        return {}
    marks = [getattr(net.config, f, None) for fields in _PLACES.values() for f in fields]
    plain = next(i for i in range(_FIRST_TOKEN, _FIRST_TOKEN + len(marks) + 1) if i not in marks)
    for mark in filter(None, marks):
        ids = ids.masked_fill(ids == mark, plain)
    kinds = torch.zeros_like(ids)
    for kind, (method, fields) in enumerate(_PLACES.items(), start=1):
        mark = next((m for f in fields if (m := getattr(net.config, f, None)) is not None), None)
        if mark is None or not (n_places := _n_places(net, method, inputs)):
            continue
        places = torch.full((_BATCH, n_places), mark)
        ids = torch.cat([ids[:, :1], places, ids[:, 1:]], dim=1)
        kinds = torch.cat([kinds[:, :1], torch.full_like(places, kind), kinds[:, 1:]], dim=1)
    if not kinds.any():
        return {"input_ids": ids}
    named = [name for name in ("mm_token_type_ids", "token_type_ids") if name in takes]
    return {"input_ids": ids, **dict.fromkeys(named, kinds)}


def _n_places(net: Net, method: str, inputs: Mapping[str, Tensor]) -> int:
    """How many features a model makes of each image or sound; 0 where it is given none."""
    make, n_heard = _maker(net, method), _n_heard(net, inputs)
    taken = {} if make is None else inspect.signature(make).parameters
    # Qwen2-Audio has no such method; Music Flamingo's looks for the places among the tokens.
    if n_heard and method == "get_audio_features" and (make is None or "input_ids" in taken):
        return n_heard
    given = {name: x for name, x in inputs.items() if name in taken}
    return _n_features(make(**given)) // _BATCH if make is not None and given else 0


def _n_heard(net: Net, inputs: Mapping[str, Tensor]) -> int:
    """How many features an encoder says that it makes of a sound; 0 where it says nothing."""
    tower = getattr(getattr(net, "model", None), "audio_tower", None)
    lengths = getattr(tower, "_get_feat_extract_output_lengths", None)
    heard = next((inputs[name] for name in _HEARD if name in inputs), None)
    return 0 if lengths is None or heard is None else int(lengths(heard.sum(-1))[1].max())


def _maker(net: Net, method: str) -> Callable[..., object] | None:
    """A method of a model, or of the one without a head inside it."""
    names = (method, "get_video_features") if method == "get_image_features" else (method,)
    for name in names:
        for one in (getattr(net, "model", None), net):
            found: Callable[..., object] | None = getattr(one, name, None)
            if found is not None:
                return found
    return None


def _n_features(made: object) -> int:
    """How many features a model has made of images or sounds."""
    parts = (getattr(made, name, None) for name in ("pooler_output", "last_hidden_state"))
    made = next((part for part in parts if part is not None), made)
    if isinstance(made, Tensor):
        return made.numel() // made.shape[-1]
    return sum(map(_n_features, made)) if isinstance(made, list | tuple) else 0


def _images(net: Net, takes: Mapping[str, object]) -> dict[str, Tensor]:
    """Images, in the form that the model's forward takes."""
    config, seen = net.config, _seen(net.config)
    if any(name in takes for name in _GRIDS):
        return _grid_patches(seen, takes)
    places = getattr(getattr(net, "model", None), "vision_embed_tokens", None)
    if places is not None:  # Fuyu takes patches as they are.
        return {"pixel_values": torch.randn(_BATCH, 4, places.in_features)}
    if "spatial_shapes" in takes:
        return _shaped_patches(seen)
    if "image_position_ids" in takes or "pixel_position_ids" in takes:
        return _placed_patches(seen, takes)
    if "target_sizes" in takes:
        return _row_of_patches(seen)
    if "image_token_pooling" in takes:
        return _pooled_patches(seen)
    side = _number(seen, "image_size", "input_size") or 4 * (_number(seen, "patch_size") or 4)
    if getattr(seen, "sr_ratios", None):
        side = max(side, 2 * math.prod(seen.strides))  # Some of the last stage, each as it strides.
    size, n_views = (side, side), 1
    if getattr(config, "image_grid_pinpoints", None):
        # The whole image at the size of a view, and the views that it is cut into.
        size = tuple(config.image_grid_pinpoints[0])
        n_views = 1 + math.prod(size) // side**2
    channels = _number(seen, "num_channels", "in_channels", "in_chans") or 3
    n_views = getattr(config, "num_frames", None) or n_views
    several = n_views > 1 or "pixel_attention_mask" in takes
    several |= config.model_type == "instructblipvideo"  # It takes frames.
    views: tuple[int, ...] = (n_views,) if several else ()
    if "aspect_ratio_ids" in takes:
        views = (1, _number(seen, "max_num_tiles") or 1)
    inputs = {"pixel_values": torch.randn(_BATCH, *views, channels, side, side)}
    if "aspect_ratio_ids" in takes:
        inputs |= _tiles(views, takes)
    if config.model_type == "granite_docling":  # It asks for it always.
        inputs["pixel_attention_mask"] = torch.ones(_BATCH, *views, dtype=torch.bool)
    if "high_res_pixel_values" in takes:
        side = config.high_res_vision_config.image_size
        inputs["high_res_pixel_values"] = torch.randn(_BATCH, channels, side, side)
    if "image_sizes" in takes and _needs_sizes(net, seen):
        inputs["image_sizes"] = torch.tensor([size] * _BATCH)
    if "noise" in takes:
        inputs["noise"] = torch.rand(_BATCH, (side // seen.patch_size) ** 2)
    return inputs


def _needs_sizes(net: Net, seen: Any) -> bool:
    """Whether sizes of images are asked for; LLaVA hands them on to whatever encoder it has."""
    make = _maker(net, "get_image_features")
    sizes = None if make is None else inspect.signature(make).parameters.get("image_sizes")
    optional = sizes is not None and sizes.default is not inspect.Parameter.empty
    return not optional or seen.model_type == "pixtral"


def _tiles(views: tuple[int, ...], takes: Mapping[str, object]) -> dict[str, Tensor]:
    """What Mllama is told of an image in tiles: its kind of shape, and who sees which tile."""
    masks = {
        "aspect_ratio_mask": torch.ones(_BATCH, *views, dtype=torch.long),
        "cross_attention_mask": torch.ones(_BATCH, _N_TOKENS, *views, dtype=torch.long),
    }
    given = {name: mask for name, mask in masks.items() if name in takes}
    return {"aspect_ratio_ids": torch.ones(_BATCH, views[0], dtype=torch.long), **given}


def _row_of_patches(seen: Any) -> dict[str, Tensor]:
    """The patches of all images in a row, and how many rows and columns they are, as MiniCPM-V."""
    side, patch = 8, seen.patch_size
    channels = _number(seen, "num_channels") or 3
    strip = torch.randn(1, channels, patch, _BATCH * side * side * patch)
    return {"pixel_values": strip, "target_sizes": torch.tensor([[side, side]] * _BATCH)}


def _pooled_patches(seen: Any) -> dict[str, Tensor]:
    """Flat patches, which of them each token pools, and how many tokens an image has (Molmo 2)."""
    size = (_number(seen, "num_channels") or 3) * seen.patch_size**2
    n_patches, n_tokens = _number(seen, "num_position_embeddings") or 16, 4
    which = torch.randint(_BATCH * n_patches, (_BATCH * n_tokens, 4))
    return {
        "pixel_values": torch.randn(_BATCH, n_patches, size),
        "image_token_pooling": which,
        "image_grids": torch.tensor([[2, 2, 0, 0]] * _BATCH),
        "image_num_crops": torch.ones(_BATCH, dtype=torch.long),
    }


def _grid_patches(seen: Any, takes: Mapping[str, object]) -> dict[str, Tensor]:
    """Flat patches, and the grid that they form, as Qwen's models take them."""
    grid = next(name for name in _GRIDS if name in takes)
    side = 2 * (_number(seen, "spatial_merge_size") or (2 if grid.endswith("_hw") else 1))
    channels = _number(seen, "in_channels", "in_chans", "num_channels") or 3
    size = (
        channels
        * (_number(seen, "temporal_patch_size", "patch_temporal") or 1)
        * seen.patch_size**2
    )
    alone, times = grid == "grid_thw", [] if grid.endswith("_hw") else [1]
    shape: tuple[int, ...] = (_BATCH * side * side, size)
    if seen.model_type in {"paddleocr_vl_vision", "kimi_k25_vision"}:
        shape = (shape[0], channels, seen.patch_size, seen.patch_size)
    merges = [n for n in ("merge_sizes", "image_merge_sizes") if n in takes]
    name = "hidden_states" if alone and "hidden_states" in takes else "pixel_values"
    return dict.fromkeys(merges, torch.tensor([2] * _BATCH)) | {
        name: torch.randn(shape),
        grid: torch.tensor([[*times, side, side]] * _BATCH),
    }


def _shaped_patches(seen: Any) -> dict[str, Tensor]:
    """Patches of each image and how many rows and columns they are, as SigLIP 2 takes them."""
    rows, columns = 2, 4
    size = seen.num_channels * seen.patch_size**2
    return {
        "pixel_values": torch.randn(_BATCH, rows * columns, size),
        "pixel_attention_mask": torch.ones(_BATCH, rows * columns, dtype=torch.long),
        "spatial_shapes": torch.tensor([[rows, columns]] * _BATCH),
    }


def _placed_patches(seen: Any, takes: Mapping[str, object]) -> dict[str, Tensor]:
    """Patches of each image and the place of each, as Gemma 4 takes them."""
    side = 2 * (_number(seen, "pooling_kernel_size") or 1)
    size = (_number(seen, "num_channels") or 3) * seen.patch_size**2
    rows = torch.arange(side)
    places = torch.stack([rows.repeat(side), rows.repeat_interleave(side)], dim=-1)
    name = "image_position_ids" if "image_position_ids" in takes else "pixel_position_ids"
    return {
        "pixel_values": torch.rand(_BATCH, side * side, size),
        name: places.expand(_BATCH, -1, -1),
    }


def _sounds(net: Net, takes: Mapping[str, object]) -> dict[str, Tensor]:
    """Sounds: the wave, or its spectrogram."""
    inputs: dict[str, Tensor] = {}
    config = net.config
    mels = _number(config, "num_mel_bins", "n_mels", "input_feat_per_channel", "input_feat_size")
    if "input_values" in takes:
        strides: Sequence[int] | None = getattr(config, "conv_stride", None)
        if strides is None and mels is not None:
            n_rows = _number(config, "max_length", "spectrogram_length") or _N_FRAMES
            inputs["input_values"] = torch.randn(_BATCH, n_rows, mels)
        else:
            wave = torch.randn(_BATCH, _N_FRAMES * math.prod(strides or (64,)))
            inputs["input_values"] = wave if _is_heard(net, wave) else wave[:, None]
    if "input_features" in takes:
        size = _number(config, "feature_projection_input_dim") or mels or 1
        n_seen = 2 * (_number(config, "max_source_positions") or _N_FRAMES)
        # Convolutions over time want the frequencies first, as Whisper's.
        convs = (m for m in net.modules() if isinstance(m, Conv1d))
        first = not hasattr(config, "input_feat_per_channel") and any(
            conv.in_channels == mels for conv in convs
        )
        n_seen = n_seen if first else 2 * _N_FRAMES
        # Encoders that hear in windows want whole ones, each of which their convolutions go over.
        if window := 2 * (_number(config, "n_window") or 0):
            first, n_seen = True, math.ceil(n_seen / window) * window
        shape = (_BATCH, size, n_seen) if first else (_BATCH, n_seen, size)
        inputs["input_features"] = torch.randn(shape)
        make = _maker(net, "get_audio_features")
        # What makes no use of it in an encoder is a mask of features, of which all are used.
        used = takes if make is None else inspect.signature(make).parameters
        for name in _HEARD:
            if name in takes and name in used:
                inputs[name] = torch.ones(_BATCH, n_seen, dtype=torch.long)
    return inputs


def _is_heard(net: Net, wave: Tensor) -> bool:
    """Whether what reads a wave takes it as it is; some ask for a dimension of channels."""
    parts = [m for m in net.modules() if "input_values" in inspect.signature(m.forward).parameters]
    if not any(isinstance(m, Conv1d) and m.in_channels == 1 for m in net.modules()):
        return True
    try:
        with torch.no_grad():
            parts[-1](wave)
    except (RuntimeError, ValueError):
        return False
    except TypeError:  # It wants more than the wave.
        return True
    return True
