"""Vision encoders: published sizes, FLOPs in closed form, tiles of known images, and what fits on a device."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels import kernelforms
from hwmodels.encoder import (
    Mlp,
    encode_operators,
    encode_times_s,
    encode_work,
    encoder_names,
    load_encoder,
    most_tiles,
)
from hwmodels.engine import load_engine
from hwmodels.errors import ProfileError
from hwmodels.hardware import load_cluster, load_device
from hwmodels.huggingface import load_model, shape_from_config
from hwmodels.mapping import Mapping
from hwmodels.roofline import AnalyticCost
from hwmodels.tiles import Cut
from hwmodels.yamlfiles import PROFILES

ENGINE = load_engine("vllm-0.6")
A100 = AnalyticCost(load_cluster("a100-80-sxm", 1), Mapping())
INTERNLM = {
    "model_type": "llama",
    "num_key_value_heads": 8,
    "vocab_size": 92553,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}
#: Parameters of the language model behind each encoder, counted from its own configuration.
LANGUAGE = {
    "qwen2-vl-7b": load_model("qwen2.5-7b").parameters,
    "minicpm-v-2.6": load_model("qwen2.5-7b").parameters - 2 * (152064 - 151666) * 3584,  # a smaller vocabulary
    "internvl2-8b": shape_from_config(
        INTERNLM
        | {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336},
        "internlm2.5-7b",
    ).parameters,
    "internvl2-26b": shape_from_config(
        INTERNLM
        | {"hidden_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 48, "intermediate_size": 16384},
        "internlm2-20b",
    ).parameters,
}


@pytest.mark.parametrize("name", encoder_names())
def test_encoder_and_language_model_have_the_published_parameters(name: str) -> None:
    """Exactly: a wrong bias, norm or position would show."""
    encoder = load_encoder(name)
    assert encoder.parameters + LANGUAGE[name] == encoder.published_parameters


@pytest.mark.parametrize(
    ("name", "size", "cut", "tokens"),
    [
        ("minicpm-v-2.6", (313, 234), Cut(1, 1036), 64),  # below 448 x 448 pixels: not cut
        ("minicpm-v-2.6", (787, 444), Cut(3, 1020), 192),  # 2 x 1 and the thumbnail
        ("minicpm-v-2.6", (1164, 776), Cut(7, 1024), 448),  # 4.5 pieces: 3 x 2 has its shape, and six is near five
        ("minicpm-v-2.6", (4032, 3024), Cut(10, 1036), 640),  # nine at most, and the thumbnail
        ("internvl2-8b", (448, 448), Cut(1, 1024), 256),  # no thumbnail beside a single tile
        ("internvl2-8b", (787, 444), Cut(3, 1024), 768),
        ("internvl2-26b", (4032, 3024), Cut(13, 1024), 3328),  # 4 x 3 and the thumbnail
        ("qwen2-vl-7b", (1092, 1092), Cut(1, 78 * 78), 39 * 39),
        ("qwen2-vl-7b", (20, 20), Cut(1, 16), 4),  # grown to 56 x 56 pixels
    ],
)
def test_tiles_of_known_images(name: str, size: tuple[int, int], cut: Cut, tokens: int) -> None:
    encoder = load_encoder(name)
    found = encoder.cut(*size)
    assert found == cut
    assert found.tiles * encoder.tokens(found.patches) == tokens


@given(st.sampled_from(encoder_names()), st.integers(1, 12000), st.integers(1, 12000))
def test_no_image_goes_beyond_its_tiles(name: str, width: int, height: int) -> None:
    encoder = load_encoder(name)
    tiling, found = encoder.tiling, encoder.cut(width, height)
    assert found == encoder.cut(width, height)
    assert encoder.tokens(found.patches) >= 1
    if tiling.rule == "native":
        assert found.tiles == 1
        # A side is at least one step: a very long strip may keep a few pixels more.
        strip = max(width, height) / min(width, height) > 200
        assert strip or found.patches * encoder.patch_px**2 <= tiling.most_tiles * tiling.tile_px**2
    else:
        assert 1 <= found.tiles <= tiling.most_tiles + 1


def test_sides_below_one_pixel_are_refused() -> None:
    with pytest.raises(ProfileError, match="0 x 5 pixels: expected sides of at least 1"):
        load_encoder("internvl2-8b").cut(0, 5)


@pytest.mark.parametrize("name", encoder_names())
def test_flops_are_twice_the_weights_times_the_rows_and_the_attention(name: str) -> None:
    """In closed form: 2 rows (4 h^2 + 2 h f) and 4 rows^2 h a layer, patches and projector beside them."""
    e, tiles, patches = load_encoder(name), 3, 1024
    rows, made = patches + e.class_token, e.tokens(patches)
    layer = 2 * rows * (4 * e.hidden**2 + 2 * e.hidden * e.intermediate) + 4 * rows**2 * e.hidden
    flops = e.layers * layer + 2 * patches * e.patch_numbers * e.hidden
    p, wide = e.projector, e.llm_hidden
    if isinstance(p, Mlp):
        flops += 2 * made * (p.merge**2 * e.hidden * p.width + p.width * wide)
    else:
        flops += 2 * patches * (e.hidden * wide + 2 * wide**2) + 2 * made * 3 * wide**2 + 4 * made * patches * wide
    assert encode_work(e, tiles, patches)[0] == pytest.approx(tiles * flops, rel=1e-12)


@pytest.mark.parametrize("name", encoder_names())
def test_a_batch_reads_the_weights_once(name: str) -> None:
    """Bytes grow by the same amount with every tile, and what does not grow is the matrices."""
    e = load_encoder(name)
    moved = [encode_work(e, tiles, 1024)[1] for tiles in (1, 2, 3)]
    assert moved[2] - moved[1] == pytest.approx(moved[1] - moved[0], rel=1e-9)
    small = e.positions * e.hidden * 2  # embeddings that no product reads
    assert 2 * moved[0] - moved[1] == pytest.approx(e.weights_bytes() - small, rel=0.01)


@pytest.mark.parametrize("name", encoder_names())
def test_time_grows_with_tiles_and_no_batch_beats_the_device(name: str) -> None:
    e = load_encoder(name)
    times = np.array(encode_times_s(e, 1024, A100, ENGINE, 40))
    assert times[0] == 0.0
    assert np.all(np.diff(times) >= 0)
    tiles = np.arange(1, 41)
    assert np.all(times[1:] <= tiles * times[1] * (1 + 1e-9))
    flops, moved = np.array([encode_work(e, int(n), 1024) for n in tiles]).T
    assert np.all(times[1:] >= flops / A100.device.peak_flops_per_s["bf16"])
    assert np.all(times[1:] >= moved / A100.device.memory_bytes_per_s)


def test_large_batches_reach_the_efficiency_of_prompts() -> None:
    """InternViT-6B's products are as large as a language model's: half to all of the peak."""
    e = load_encoder("internvl2-26b")
    achieved = encode_work(e, 40, 1024)[0] / encode_times_s(e, 1024, A100, ENGINE, 40)[40]
    assert 0.5 < achieved / A100.device.peak_flops_per_s["bf16"] < 0.85


def test_an_h100_is_two_to_three_times_an_a100() -> None:
    h100 = AnalyticCost(load_cluster("h100-sxm", 1), Mapping())
    e = load_encoder("internvl2-26b")
    ratio = encode_times_s(e, 1024, A100, ENGINE, 13)[13] / encode_times_s(e, 1024, h100, ENGINE, 13)[13]
    assert 2.0 < ratio < 3.5


def test_attention_priced_as_of_one_prompt_is_an_overestimate_below_a_tenth() -> None:
    """Against the same equation for 20 prompts side by side without a mask, which is what tiles are."""
    e, tiles, patches = load_encoder("minicpm-v-2.6"), 20, 1036
    fitted = A100.device.efficiency.kernels.attention_prefill["bf16/bf16"]
    wide = e.hidden // e.heads
    apart_s = e.layers * float(
        kernelforms.prefill_time_s(
            replace(fitted, masked_tokens=0.0), tiles, patches, 0, patches**2, e.heads, e.heads, wide, wide,
            A100.device, A100.device.peak_flops_per_s["bf16"], 2.0,
        )
    )  # fmt: skip
    ops = encode_operators(e, np.array(float(tiles)), patches)
    priced_s = float(next(A100.time_s(op) for op in ops if op.name == "tile attention"))
    total_s = encode_times_s(e, patches, A100, ENGINE, tiles)[tiles]
    assert 0.0 < (priced_s - apart_s) / total_s < 0.1


def test_tokens_of_a_tile_in_bytes() -> None:
    """64 tokens of 3584 numbers in 16 bit."""
    assert load_encoder("minicpm-v-2.6").token_bytes(1036) == 64 * 3584 * 2


def test_the_largest_batch_fits_and_one_tile_more_does_not() -> None:
    device, e = load_device("a100-80-sxm"), load_encoder("internvl2-26b")
    usable = device.memory_bytes * ENGINE.memory_fraction - ENGINE.reserve_bytes
    for beside in ((), (40e9,)):
        for fused in (True, False):
            tiles = most_tiles(e, 1024, device, ENGINE, beside_bytes=beside, fused_attention=fused)
            left = usable - e.weights_bytes() - sum(beside)
            each = e.tile_bytes(1024, fused_attention=fused)
            assert tiles * each <= left < (tiles + 1) * each
    assert most_tiles(e, 1024, device, ENGINE, beside_bytes=(80e9,)) < 0


def test_scores_outweigh_everything_where_attention_keeps_them() -> None:
    """16 heads x 1036^2 scores of 2 + 4 + 2 bytes."""
    e = load_encoder("minicpm-v-2.6")
    scores = e.tile_bytes(1036, fused_attention=False) - e.tile_bytes(1036)
    assert scores == 16 * 1036**2 * 8
    assert scores > 4 * e.tile_bytes(1036)


def test_profiles_that_cannot_be_say_so(tmp_path) -> None:
    with pytest.raises(ProfileError, match=r"unknown encoder 'minicpm'; nearest: minicpm-v-2\.6"):
        load_encoder("minicpm")
    text = (PROFILES / "encoders" / "minicpm-v-2.6.yaml").read_text(encoding="utf-8")
    for old, new, said in (
        ("heads: 16", "heads: 7", "7 heads in a width of 1152: expected a divisor"),
        ("heads: 28}", "heads: 3}", "3 heads in a width of 3584"),
        ("layers: 27", "layers: 0", "layers = 0"),
        ("rule: slices", "rule: strips", "tiling.rule = 'strips'"),
        ("llm_hidden: 3584", "llm_hidden: 3584\ncolour: 1", "unknown key colour"),
    ):
        path = tmp_path / "encoder.yaml"
        path.write_text(text.replace(old, new), encoding="utf-8")
        with pytest.raises(ProfileError, match=said):
            load_encoder(str(path))
