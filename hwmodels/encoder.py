"""What does it take to turn images into tokens? FLOPs, bytes, seconds and memory of a vision encoder on one device.

An image is cut into tiles (hwmodels.tiles) that know nothing of each other, so tiles of one request can be encoded on
different devices. A tile's patches go through a vision transformer and a projector into the language model's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from hwmodels.engine import Engine
from hwmodels.errors import ProfileError
from hwmodels.hardware import Device
from hwmodels.mapping import Precision, weight_bytes
from hwmodels.operators import Array, AttentionCore, Elementwise, Gemm, Operator, wire_bytes
from hwmodels.step_model import CostModel, Numbers, kept, packed
from hwmodels.tiles import Cut, Tiling, cut
from hwmodels.work import bytes_of, flops_of
from hwmodels.yamlfiles import PROFILES, named, read_as

BF16 = Precision()
_STRICT = ConfigDict(extra="forbid")
Count = Annotated[int, Field(gt=0, strict=True)]


@dataclass(frozen=True, slots=True, config=_STRICT)
class Mlp:
    """A projector of two products with a norm before them (InternVL, Qwen2-VL).

    merge         side of the square of patches that become one token
    width         between the two products
    norm_merged   whether the norm comes after patches were merged rather than before
    """

    merge: Count
    width: Count
    norm_merged: bool


@dataclass(frozen=True, slots=True, config=_STRICT)
class Resampler:
    """Learned queries that attend to all patches of a tile (MiniCPM-V).

    queries   tokens the language model sees of every tile
    heads     of the cross-attention, as wide as the language model
    """

    queries: Count
    heads: Count


@dataclass(frozen=True, slots=True, config=_STRICT)
class Encoder:
    """A vision transformer and its projector, as shipped in profiles/encoders.

    hidden, layers, heads, intermediate   of the transformer
    patch_px, frames       a patch is patch_px x patch_px pixels of `frames` pictures
    tiling                 how images are cut
    class_token            one token more in every tile, dropped before the projector
    positions              learned position embeddings; 0 with `rotary`
    layer_norm             norms have biases; RMS norms otherwise
    qkv_bias, patch_bias, qk_norm, layer_scale, final_norm   whether there are such parameters
    llm_hidden             width of the language model, and of the tokens made for it
    published_parameters   of the encoder and its language model together, as its maker published, in published_in
    """

    name: str
    source: str
    repository: str
    published_parameters: Count
    published_in: str
    hidden: Count
    layers: Count
    heads: Count
    intermediate: Count
    patch_px: Count
    tiling: Tiling
    projector: Mlp | Resampler
    llm_hidden: Count
    positions: Annotated[int, Field(ge=0, strict=True)]
    frames: Count = 1
    rotary: bool = False
    class_token: bool = False
    layer_norm: bool = True
    qkv_bias: bool = True
    patch_bias: bool = True
    qk_norm: bool = False
    layer_scale: bool = False
    final_norm: bool = False

    def __post_init__(self) -> None:
        """Raise ProfileError for heads that do not divide the width they share."""
        shared = [(self.hidden, self.heads)]
        if isinstance(self.projector, Resampler):
            shared.append((self.llm_hidden, self.projector.heads))
        for width, heads in shared:
            if width % heads:
                raise ProfileError(f"encoder {self.name}: {heads} heads in a width of {width}: expected a divisor")

    @property
    def tower_parameters(self) -> int:
        """Weights of the vision transformer."""
        h, f, norm = self.hidden, self.intermediate, 2 if self.layer_norm else 1
        attention = 4 * h * h + h + (3 * h if self.qkv_bias else 0) + (2 * h if self.qk_norm else 0)
        layer = attention + 2 * h * f + f + h + 2 * norm * h + (2 * h if self.layer_scale else 0)
        ends = self.patch_numbers * h + (h if self.patch_bias else 0) + (h if self.class_token else 0)
        return self.layers * layer + ends + self.positions * h + (norm * h if self.final_norm else 0)

    @property
    def projector_parameters(self) -> int:
        """Weights of the projector; its norms have biases."""
        h, wide, p = self.hidden, self.llm_hidden, self.projector
        if isinstance(p, Mlp):
            merged = p.merge**2 * h
            norm = 2 * (merged if p.norm_merged else h)
            return norm + merged * p.width + p.width + p.width * wide + wide
        # Keys' and values' input, query-key-value and output projections, the last projection, queries and three norms.
        return h * wide + 4 * (wide * wide + wide) + wide * wide + p.queries * wide + 6 * wide

    @property
    def parameters(self) -> int:
        """Weights of an encode worker: no language model among them."""
        return self.tower_parameters + self.projector_parameters

    @property
    def patch_numbers(self) -> int:
        """Numbers of one patch: three colours."""
        return 3 * self.frames * self.patch_px**2

    def cut(self, width_px: int, height_px: int) -> Cut:
        """The tiles of one image; raises ProfileError for a side below 1."""
        return cut(self.tiling, self.patch_px, width_px, height_px)

    def tokens(self, patches: int) -> int:
        """Tokens the language model sees of a tile of `patches` patches."""
        p = self.projector
        return patches // p.merge**2 if isinstance(p, Mlp) else p.queries

    def token_bytes(self, patches: int, precision: Precision = BF16) -> float:
        """Bytes of a tile's tokens, which go from an encode worker to prefill."""
        return self.tokens(patches) * self.llm_hidden * wire_bytes(precision)

    def weights_bytes(self, precision: Precision = BF16) -> float:
        """Bytes of the weights of an encode worker."""
        return self.parameters * weight_bytes(precision.weights)

    def tile_bytes(self, patches: int, precision: Precision = BF16, *, fused_attention: bool = True) -> float:
        """Peak bytes of a tile while it is encoded: pixels, the widest layer's tensors, and the tokens made of it.

        Residual and normed input in two copies as in hwmodels.memory.activation_elements, and the wider of queries,
        keys and values and of the feed-forward before and after its activation. Without `fused_attention` every head
        keeps its scores three times: as they are, as fp32 softmax, and narrowed again (attention of transformers and of
        early multimodal engines).
        """
        element, rows = wire_bytes(precision), patches + self.class_token
        layer = rows * (4 * self.hidden + max(3 * self.hidden, 2 * self.intermediate)) * element
        scores = 0.0 if fused_attention else self.heads * rows * rows * (2 * element + 4.0)
        return patches * self.patch_numbers * element + layer + scores + self.token_bytes(patches, precision)


def encoder_names() -> list[str]:
    """Names of the shipped encoders."""
    return sorted(path.stem for path in (PROFILES / "encoders").glob("*.yaml"))


def load_encoder(name: str) -> Encoder:
    """The encoder profile called `name`, or that of the YAML file at the path `name`.

    Raises ProfileError for an unknown name or an invalid file.
    """
    path: Path = named("encoder", name, PROFILES / "encoders")
    return read_as(Encoder, path)


def encode_operators(encoder: Encoder, tiles: Array, patches: int, precision: Precision = BF16) -> list[Operator]:
    """What a device runs to encode a batch of `tiles` tiles (one number or several) of `patches` patches each.

    Attention is full within a tile and priced as prefill attention of its query-key pairs, whose fitted coefficients
    include the blocks a causal mask cuts through: an over-estimate by up to a tenth of a tile's time.
    """
    e, element = encoder, wire_bytes(precision)
    h, n = e.hidden, e.layers
    every, rows = tiles * patches, tiles * (patches + e.class_token)
    wide = h // e.heads
    ops: list[Operator] = [
        Gemm("patch embedding", every, h, e.patch_numbers, precision),
        Elementwise("positions", 3.0 * rows * h * element),
        Elementwise("attention norm", 4.0 * rows * h * element, n),
        Gemm("qkv projection", rows, 3 * h, h, precision, n),
        AttentionCore("tile attention", "prefill", rows, rows * (patches + e.class_token), np.zeros_like(rows), e.heads,
                      e.heads, wide, wide, False, precision, n),
        Gemm("output projection", rows, h, h, precision, n),
        Elementwise("feed-forward norm", 4.0 * rows * h * element, n),
        Gemm("up projection", rows, e.intermediate, h, precision, n),
        Elementwise("activation", 2.0 * rows * e.intermediate * element, n),
        Gemm("down projection", rows, h, e.intermediate, precision, n),
    ]  # fmt: skip
    if e.rotary or e.qk_norm:
        ops.append(Elementwise("queries and keys", 4.0 * rows * h * element * (e.rotary + e.qk_norm), n))
    if e.layer_scale:
        ops.append(Elementwise("layer scales", 4.0 * rows * h * element, n, kernels=2))
    if e.final_norm:
        ops.append(Elementwise("final norm", 2.0 * rows * h * element))
    return ops + _projector(e, tiles, patches, precision)


def _projector(e: Encoder, tiles: Array, patches: int, precision: Precision) -> list[Operator]:
    """From patches to the language model's tokens."""
    every, made = tiles * patches, tiles * e.tokens(patches)
    element, wide, p = wire_bytes(precision), e.llm_hidden, e.projector
    if isinstance(p, Mlp):
        return [
            Elementwise("projector norm", 2.0 * every * e.hidden * element),
            Gemm("projector in", made, p.width, p.merge**2 * e.hidden, precision),
            Elementwise("projector activation", 2.0 * made * p.width * element),
            Gemm("projector out", made, wide, p.width, precision),
        ]
    head = wide // p.heads
    return [
        Gemm("resampler input", every, wide, e.hidden, precision),
        Elementwise("resampler norms", (2.0 * every + 4.0 * made) * wide * element, kernels=3),
        Gemm("resampler keys and values", every, 2 * wide, wide, precision),
        Gemm("resampler queries", made, wide, wide, precision),
        # Reads every patch's key and value; `queries` of them are counted as the queries' own.
        AttentionCore("resampler attention", "prefill", made, made * patches, every - made, p.heads, p.heads, head,
                      head, False, precision),
        Gemm("resampler output", made, wide, wide, precision),
        Gemm("resampler projection", made, wide, wide, precision),
    ]  # fmt: skip


def encode_work(encoder: Encoder, tiles: int, patches: int, precision: Precision = BF16) -> tuple[float, float]:
    """FLOPs, and bytes read from and written to memory, of one batch."""
    ops = encode_operators(encoder, np.array(float(tiles)), patches, precision)
    return sum(float(flops_of(op)) for op in ops), sum(float(bytes_of(op)) for op in ops)


def encode_times_s(
    encoder: Encoder, patches: int, cost: CostModel, engine: Engine, max_tiles: int, precision: Precision = BF16
) -> Numbers:
    """Seconds of one batch on one device by its tiles, 0 to `max_tiles`; a batch of 0 tiles takes none.

    The host's part is that of a step with prompts in it; preparing pixels on the host is not in it.
    """
    tiles = np.arange(1.0, max_tiles + 1)
    total = np.full(max_tiles, engine.step_overhead_s + engine.prompt_overhead_s)
    for op in encode_operators(encoder, tiles, patches, precision):
        total += cost.time_s(op) * kept(op, cost, engine)
    return packed(np.concatenate([[0.0], np.maximum.accumulate(total)]))


def most_tiles(
    encoder: Encoder,
    patches: int,
    device: Device,
    engine: Engine,
    precision: Precision = BF16,
    *,
    beside_bytes: Sequence[float] = (),
    fused_attention: bool = True,
) -> int:
    """Tiles a device can encode in one batch beside the encoder's weights; negative where these do not fit.

    beside_bytes   what else is kept there: a language model, its KV blocks and its activations
    """
    usable = device.memory_bytes * engine.memory_fraction - engine.reserve_bytes
    free = usable - encoder.weights_bytes(precision) - sum(beside_bytes)
    return int(free // encoder.tile_bytes(patches, precision, fused_attention=fused_attention))
