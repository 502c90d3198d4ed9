"""Plans with vision encoders: files, deployments, the direction of disaggregated encoding, and the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hwmodels.encoder import encode_times_s, encode_work, load_encoder
from hwmodels.energy import COMPUTE, MEMORY, RUNNING
from hwmodels.errors import OutOfMemoryError, ProfileError
from hwmodels.mapping import Mapping
from planner.catalogue import Catalogue, open_catalogue
from planner.encoding import encoder_note
from planner.errors import PlanError
from planner.plan import Plan, Pool
from planner.planfile import read_plan, write_plan
from simulator.encode import Images
from simulator.metrics import Metrics, summarize
from simulator.result import Result
from simulator.simulate import simulate
from simulator.workload import Requests, Workload
from ui.cli import main
from ui.words import in_short, in_words

#: The encoder and, but for its vocabulary, the language model of EPD's first example (arXiv:2501.05460), on its device.
ENCODER, MODEL, HARDWARE = "minicpm-v-2.6", "qwen2.5-7b", "a100-80-sxm"
LARGE = (4032, 3024)


def plan(*pools: Pool, gpus: int = 8, encoder: str | None = ENCODER, **more: object) -> Plan:
    return Plan(MODEL, HARDWARE, gpus, pools, encoder=encoder, **more)  # type: ignore[arg-type]


def answering(replicas: int, **more: object) -> Pool:
    return Pool(replicas, **{"max_seqs": 64, "token_budget": 4096, "max_context_tokens": 32768, **more})  # type: ignore[arg-type]


def encoding(workers: int, **more: object) -> Pool:
    return Pool(workers, role="encode", **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return open_catalogue(MODEL, HARDWARE, 8, "vllm", also={"a100-40-sxm": 4, "hgx-h100": 4})


# --- plan files -------------------------------------------------------------------------------------------------------


def test_plans_with_encoders_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    for chosen in (
        plan(encoding(4, batch_tiles=8, spread=2), answering(4)),
        plan(answering(8)),
        plan(encoding(2, hardware="l40s"), answering(8), also={"l40s": 2}),
    ):
        write_plan(chosen, path)
        assert read_plan(path) == chosen
    path.write_text("model: m\nhardware: h\ngpus: 3\nencoder: e\npools: [{replicas: 1}, {replicas: 2, role: encode}]\n")
    short = read_plan(path)
    assert short.encode_pool == Pool(2, role="encode")
    assert short.serving == (Pool(1),)
    assert short.gpus_used == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"encoder": None}, "pools[0].role is 'encode' but encoder is null, expected a vision encoder's name"),
        ({"encoder": ""}, "encoder is '', expected a name or a path"),
        ({"pools": [{"replicas": 1, "role": "encode"}] * 2}, "expected one such pool at most"),
        ({"pools": [{"replicas": 1, "role": "encode"}]}, "pools have role encode only"),
        ({"pools": [{"replicas": 1, "role": "encode", "tp": 2}, {"replicas": 1}]}, "pools[0].tp is 2, expected 1"),
        ({"pools": [{"replicas": 2, "role": "encode", "spread": 3}, {"replicas": 1}]}, "spread is 3, expected 1 to"),
        ({"pools": [{"replicas": 1, "role": "encode", "batch_tiles": 0}, {"replicas": 1}]}, "batch_tiles is 0"),
        (
            {"pools": [{"replicas": 1, "sharing": "nexus"}]},
            "pools[0].sharing is 'nexus', expected None with an encoder",
        ),
        ({"pools": [{"replicas": 1, "role": "encoder"}, {"replicas": 1}]}, "pools[0].role is 'encoder', expected"),
    ],
)
def test_what_cannot_be_meant_is_told_in_one_line(changes: dict[str, object], said: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    pools = [{"replicas": 1, "role": "encode"}, {"replicas": 1}]
    content = {"model": "m", "hardware": "h", "gpus": 8, "encoder": "e", "pools": pools, **changes}
    path.write_text(json.dumps(content))  # which is YAML
    with pytest.raises(PlanError) as caught:
        read_plan(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_in_words() -> None:
    apart = plan(encoding(4), answering(4))
    assert in_short(apart) == "4 encode workers + 4 x tp=1"
    assert in_words(apart).startswith("4 encode workers (minicpm-v-2.6, up to 16 tiles a batch) + 4 replicas of tp=1")
    assert "minicpm-v-2.6 where prompts are computed" in in_words(plan(answering(8)))


# --- deployments ------------------------------------------------------------------------------------------------------


def test_a_pool_has_the_encoders_times_and_links(catalogue: Catalogue) -> None:
    encoder = load_encoder(ENCODER)
    cut = encoder.cut(*LARGE)
    deployment = catalogue.deployment(plan(encoding(4, spread=2), answering(4)), image=cut, with_work=True)
    spec = deployment.encode
    assert spec is not None
    assert (spec.workers, spec.batch_tiles, spec.shards) == (4, 16, 2)
    assert spec.times_s == encode_times_s(encoder, cut.patches, catalogue.prices(Mapping()), catalogue.engine, 16)
    assert spec.tile_bytes == 64 * 3584 * 2
    intra = catalogue.cluster.intra
    assert intra is not None
    assert spec.bytes_per_s == pytest.approx(intra.bytes_per_s * intra.efficiency)
    assert spec.latency_s == intra.latency_s
    assert deployment.gpus == 8
    assert all(replica.encoder is None for replica in deployment.replicas)


def test_a_pool_may_have_devices_of_its_own(catalogue: Catalogue) -> None:
    """Faster ones encode faster; the network cards between the clusters are slower than NVLink."""
    cut = load_encoder(ENCODER).cut(*LARGE)
    here = catalogue.deployment(plan(encoding(4), answering(4)), image=cut).encode
    there = catalogue.deployment(
        plan(encoding(4, hardware="hgx-h100"), answering(8), also={"hgx-h100": 4}), image=cut
    ).encode
    assert here is not None
    assert there is not None
    assert there.times_s[16] < 0.6 * here.times_s[16]
    assert there.bytes_per_s < 0.5 * here.bytes_per_s
    assert there.device is not None
    assert there.device.name == "h100-sxm"


def test_an_encoder_beside_the_model_takes_room_from_kv(catalogue: Catalogue) -> None:
    """Its weights and a full batch, on every rank of the first stage."""
    cut, encoder = load_encoder(ENCODER).cut(*LARGE), load_encoder(ENCODER)
    apart = catalogue.deployment(plan(encoding(4), answering(4)), image=cut).replicas[0]
    for batch in (1, 64):
        beside = catalogue.deployment(plan(answering(8, batch_tiles=batch)), image=cut).replicas[0]
        assert beside.encoder is not None
        assert beside.encoder.batch_tiles == batch
        taken = (apart.kv_blocks - beside.kv_blocks) * 16 * catalogue.model.kv_bytes_per_token("bf16")
        expected = encoder.weights_bytes() + batch * encoder.tile_bytes(cut.patches)
        assert taken == pytest.approx(expected, abs=2 * 16 * catalogue.model.kv_bytes_per_token("bf16"))
    wide = catalogue.deployment(plan(answering(2, tp=4)), image=cut).replicas[0]
    assert wide.encoder is not None
    assert wide.encoder.ranks == 4


def test_replicas_that_only_decode_have_no_encoder(catalogue: Catalogue) -> None:
    pools = answering(2, role="prefill"), answering(1, role="decode"), answering(1, role="mixed")
    replicas = catalogue.deployment(plan(*pools)).replicas
    assert [replica.encoder is not None for replica in replicas] == [True, True, False, True]
    apart = catalogue.deployment(plan(*pools, encoding(4)))
    assert apart.handover is not None
    assert all(replica.encoder is None for replica in apart.replicas)


def test_what_does_not_fit_or_does_not_exist(catalogue: Catalogue) -> None:
    huge = load_encoder("qwen2-vl-7b").cut(4000, 3000)
    with pytest.raises(OutOfMemoryError, match="expected batch_tiles of at most"):
        catalogue.deployment(plan(encoding(1, batch_tiles=512), answering(1), encoder="qwen2-vl-7b"), image=huge)
    with pytest.raises(OutOfMemoryError):
        catalogue.deployment(plan(answering(1, batch_tiles=512), encoder="qwen2-vl-7b"), image=huge)
    with pytest.raises(ProfileError, match=r"minicpm-v-2\.7"):
        catalogue.deployment(plan(answering(1), encoder="minicpm-v-2.7"))
    with pytest.raises(PlanError, match="no replicas"):
        catalogue.replica(encoding(1))
    with pytest.raises(PlanError, match="beside an encoder"):
        catalogue.deployment(plan(answering(1, sharing="nexus")))


def test_a_foreign_encoder_is_a_note(catalogue: Catalogue) -> None:
    assert encoder_note(plan(answering(1)), catalogue.model) is None
    assert encoder_note(plan(answering(1), encoder=None), catalogue.model) is None
    note = encoder_note(plan(answering(1), encoder="internvl2-8b"), catalogue.model)
    assert note is not None
    assert "4096" in note
    assert "3584" in note
    catalogue.deployment(plan(answering(1), encoder="internvl2-8b"))


def test_a_plan_without_an_encoder_is_deployed_as_before(catalogue: Catalogue) -> None:
    bare = catalogue.deployment(plan(answering(4), encoder=None))
    seeing = catalogue.deployment(plan(answering(4), encoding(4)))
    assert bare.encode is None
    for one, other in zip(bare.replicas, seeing.replicas, strict=True):
        assert (one.kv_blocks, one.scheduler, one.model) == (other.kv_blocks, other.scheduler, other.model)


# --- EPD's direction --------------------------------------------------------------------------------------------------


def served(
    catalogue: Catalogue, chosen: Plan, rate_per_s: float, images: int = 4, answer: int = 10
) -> tuple[Result, Metrics]:
    """300 Poisson requests of 22 words and some images of 4032 x 3024."""
    encoder = load_encoder(ENCODER)
    cut = encoder.cut(*LARGE)
    arrival_s = np.cumsum(np.random.default_rng(1).exponential(1 / rate_per_s, 300))
    requests = Requests(arrival_s, np.full(300, 22), np.full(300, answer))
    seen = Images(np.array(images * cut.tiles), encoder.tokens(cut.patches))
    result = simulate(catalogue.deployment(chosen, image=cut), Workload(requests, images=seen))
    assert result.requests.finish_s.notna().all()
    return result, summarize(result)


APART, TOGETHER = plan(encoding(6), answering(2)), plan(answering(8))


def test_an_encode_pool_shortens_the_first_token_at_light_load(catalogue: Catalogue) -> None:
    """The direction of EPD's headline: 41 % less TTFT where six workers share a request's tiles; 71 % there.

    Encoding on one worker each gains nothing, but keeps answers from waiting for others' images.
    """
    together, apart = served(catalogue, TOGETHER, 0.5)[1], served(catalogue, APART, 0.5)[1]
    assert 0.3 < 1 - apart.overall.ttft_s.mean / together.overall.ttft_s.mean < 0.5
    whole = served(catalogue, plan(encoding(6, spread=1), answering(2)), 0.5)[1]
    assert whole.overall.ttft_s.mean == pytest.approx(together.overall.ttft_s.mean, rel=0.05)


def test_an_encode_pool_keeps_answers_from_waiting_for_images(catalogue: Catalogue) -> None:
    """With as many replicas: the longest pauses are for encoding and prefill there, for prefill alone here."""
    pools = (answering(4),), (encoding(4), answering(4))
    together, apart = (served(catalogue, plan(*chosen), 4.0, answer=100)[1].overall.itl_s for chosen in pools)
    assert together.p50 == pytest.approx(apart.p50, rel=0.05)
    assert together.p99 > 1.8 * apart.p99


def test_the_encoder_pool_is_full_at_its_rate(catalogue: Catalogue) -> None:
    """Beyond tiles_per_s requests queue before the workers, who are always busy; replicas share the work better."""
    cut = load_encoder(ENCODER).cut(*LARGE)
    one = plan(encoding(1), answering(7))
    spec = catalogue.deployment(one, image=cut).encode
    assert spec is not None
    full_per_s = spec.tiles_per_s / (4 * cut.tiles)
    (below, _), (above, late) = (served(catalogue, one, share * full_per_s) for share in (0.5, 1.5))
    assert below.encode is not None
    assert above.encode is not None
    assert below.encode.use == pytest.approx(0.5, abs=0.1)
    assert above.encode.use > 0.95
    assert above.encode.wait_mean_s > 20 * below.encode.wait_mean_s
    assert late.overall.ttft_s.mean > above.encode.mean_s
    assert served(catalogue, TOGETHER, 1.5 * full_per_s)[1].overall.ttft_s.mean < 0.2 * late.overall.ttft_s.mean


def test_energy_is_that_of_the_replicas_and_of_encoding(catalogue: Catalogue) -> None:
    """A lone request on one replica: what it draws for the prompt, what encoding draws, and idle power for the rest."""
    encoder = load_encoder(ENCODER)
    cut = encoder.cut(*LARGE)
    requests, images = Requests([0.0], [22], [2]), Images(np.array(16), encoder.tokens(cut.patches))
    device, cost = catalogue.cluster.device, catalogue.prices(Mapping())
    idle_w, dynamic_w = device.idle_w, device.tdp_w - device.idle_w
    seconds = encode_times_s(encoder, cut.patches, cost, catalogue.engine, 16)[16]
    flops, nbytes = encode_work(encoder, 16, cut.patches)
    shares = flops / device.peak_flops_per_s["bf16"] / seconds, nbytes / device.memory_bytes_per_s / seconds
    encoding_j = seconds * dynamic_w * min(1.0, RUNNING + COMPUTE * shares[0] + MEMORY * shares[1])
    plain = simulate(catalogue.deployment(plan(answering(1)), with_work=True), images.prompts(requests)).totals
    for pools, workers in (((answering(1),), 0), ((encoding(3, spread=1), answering(1)), 3)):
        deployment = catalogue.deployment(plan(*pools), image=cut, with_work=True)
        totals = simulate(deployment, Workload(requests, images=images)).totals
        idle_j = idle_w * (totals.makespan_s * (1 + workers) - plain.makespan_s)
        assert totals.energy_j - plain.energy_j - idle_j == pytest.approx(encoding_j, rel=1e-6)
        assert totals.model_flops - plain.model_flops == pytest.approx(flops)
        assert totals.hbm_bytes - plain.hbm_bytes == pytest.approx(nbytes)


# --- command line -----------------------------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "plan.yaml"
    write_plan(plan(encoding(4), answering(4)), path)
    return path


COMMON = ["--requests", "100", "--rate", "2"]
SEEING = ["--images-per-request", "2", "--image-size", "1280x720"]


def test_simulate_reports_the_encode_stage(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", str(written), *COMMON, "--json"]) == 0
    text = json.loads(capsys.readouterr().out)
    assert main(["simulate", str(written), *COMMON, *SEEING, "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    tiles = load_encoder(ENCODER).cut(1280, 720).tiles
    assert text["encode"] is None
    assert seen["encode"]["workers"] == 4
    assert seen["encode"]["tiles"] == 100 * 2 * tiles
    assert 0 < seen["encode"]["use"] < 1
    assert 0 <= seen["encode"]["wait_mean_s"] < seen["encode"]["mean_s"]
    longer = seen["metrics"]["overall"]["ttft_s"]["mean"] - text["metrics"]["overall"]["ttft_s"]["mean"]
    assert longer > seen["encode"]["mean_s"]
    assert seen["notes"] == []
    assert seen["totals"]["gpus"] == 8
    assert seen["totals"]["energy_j"] > 0
    assert main(["simulate", str(written), *COMMON, *SEEING]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"with 2 images of 1280x720 ({2 * tiles} tiles, {2 * tiles * 64} tokens)" in said
    assert "4 encode workers" in said
    assert "waits" in said


def test_simulate_without_an_encode_pool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "own.yaml"
    write_plan(plan(answering(8), encoder="internvl2-8b"), path)
    assert main(["simulate", str(path), *COMMON, *SEEING]) == 0
    shown = capsys.readouterr()
    assert "replicas that prefill spend" in " ".join(shown.out.split())
    assert shown.err.startswith("note: encoder internvl2-8b makes tokens of width 4096")
    closed = ["simulate", str(path), "--requests", "50", "--concurrency", "4", *SEEING, "--json"]
    assert main(closed) == 0
    assert json.loads(capsys.readouterr().out)["encode"]["workers"] == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--images-per-request", "2"], "--images-per-request 2: expected --image-size with it"),
        (["--image-size", "1280x720"], "--image-size 1280x720: expected --images-per-request with it"),
        (["--images-per-request", "2", "--image-size", "1280"], "--image-size 1280: expected WIDTHxHEIGHT in pixels"),
        (["--images-per-request", "2", "--image-size", "0x7"], "--image-size 0x7: expected WIDTHxHEIGHT in pixels"),
        (["--images-per-request", "2", "--image-size", "-3x7"], "--image-size -3x7: expected WIDTHxHEIGHT in pixels"),
        (["--images-per-request", "0", "--image-size", "8x8"], "--images-per-request 0: expected 1 to"),
    ],
)
def test_wrong_options(options: list[str], said: str, written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", str(written), *COMMON, *options]) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1


def test_images_need_an_encoder(tmp_path: Path, written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blind = tmp_path / "blind.yaml"
    write_plan(plan(answering(8), encoder=None), blind)
    assert main(["simulate", str(blind), *COMMON, *SEEING]) == 2
    assert "the plan has no encoder" in capsys.readouterr().err
    assert main(["simulate", str(written), "--requests", "50", "--concurrency", "4", *SEEING]) == 4
    assert "expected arrival times" in capsys.readouterr().err
    foreign = replace(plan(answering(8)), encoder="nobody")
    write_plan(foreign, blind)
    assert main(["simulate", str(blind), *COMMON, *SEEING]) == 3
    assert "nobody" in capsys.readouterr().err
    assert main(["export", str(written)]) == 4
    assert "encode workers are not exported" in capsys.readouterr().err
    assert main(["explain", str(written)]) == 0
