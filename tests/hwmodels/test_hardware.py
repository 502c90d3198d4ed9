"""Device and cluster profiles: every shipped one loads and is plausible; wrong ones are told off in one line."""

from __future__ import annotations

import csv
import pickle
from pathlib import Path

import pytest

from hwmodels.errors import ProfileError
from hwmodels.hardware import (
    CLUSTERS,
    DEVICES,
    MAX_GPUS,
    cluster_names,
    device_names,
    load_cluster,
    load_device,
)
from hwmodels.yamlfiles import read_mapping

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "reference" / "hardware" / "accelerators.csv"
IN_REFERENCE = {
    "a100-40-sxm": "A100-40GB-SXM",
    "a100-80-sxm": "A100-80GB-SXM",
    "a100-80-pcie": "A100-80GB-PCIe",
    "h100-sxm": "H100-80GB-SXM",
    "h100-pcie": "H100-80GB-PCIe",
    "h200-sxm": "H200-141GB-SXM",
    "h20": "H20-96GB",
    "b200-sxm": "B200-180GB-SXM",
    "gb200": "GB200-186GB",
    "l4": "L4",
    "l40s": "L40S",
    "a10": "A10",
    "rtx-4090": "RTX-4090",
    "rtx-pro-6000": "RTX-PRO-6000-BSE",
    "mi300x": "MI300X",
    "mi325x": "MI325X",
    "tpu-v5e": "TPU-v5e",
    "gaudi3": "Gaudi3",
    "xeon-8592": "Xeon-8592+ (EMR)",
    "snapdragon-8-gen3": "Snapdragon-8-Gen3 Hexagon",
}


def test_the_promised_devices_are_shipped() -> None:
    assert set(IN_REFERENCE) <= set(device_names())
    assert len(device_names()) >= 18


@pytest.mark.parametrize("name", device_names())
def test_every_device_is_plausible_and_sourced(name: str) -> None:
    device = load_device(name)
    assert device.name == name
    assert len(device.source) > 20
    assert {"bf16", "fp16"} & set(device.peak_flops_per_s)
    assert 1e12 <= min(device.peak_flops_per_s.values()) <= max(device.peak_flops_per_s.values()) <= 2e16
    assert 1e9 <= device.memory_bytes <= 2e12
    assert 5e10 <= device.memory_bytes_per_s <= 1e13
    assert 1e-7 <= device.kernel_launch_s <= 1e-4
    assert 0 < device.idle_w < device.tdp_w
    e = device.efficiency
    assert all(0 < share <= 1 for share in (e.gemm_mfu, e.attention_mfu, e.memory_mbu))
    assert load_cluster(name, 1).device == device


@pytest.mark.parametrize("name", cluster_names())
def test_every_cluster_loads_and_is_sourced(name: str) -> None:
    data = read_mapping(CLUSTERS / f"{name}.yaml")
    assert data["name"] == name
    assert len(data["source"]) > 20
    cluster = load_cluster(name, 1)
    full = load_cluster(name, cluster.gpus_per_node)
    assert (cluster.nodes, full.nodes) == (1, 1)
    hash(full)
    assert pickle.loads(pickle.dumps(full)) == full


@pytest.mark.skipif(not REFERENCE.exists(), reason="needs shared/reference/hardware/accelerators.csv")
@pytest.mark.parametrize("name", sorted(IN_REFERENCE))
def test_peaks_match_the_collected_datasheets(name: str) -> None:
    """Arithmetic, bandwidth and power equal the collected figures; memory is what drivers report of them."""
    with REFERENCE.open(encoding="utf-8") as file:
        row = next(row for row in csv.DictReader(file) if row["name"] == IN_REFERENCE[name])
    device = load_device(name)
    for dtype, peak in device.peak_flops_per_s.items():
        listed = row.get(f"{dtype}_tops" if dtype == "int8" else f"{dtype}_tflops")
        if listed:
            assert peak == pytest.approx(float(listed) * 1e12, rel=0.01), dtype
    assert device.memory_bytes_per_s == pytest.approx(float(row["mem_bw_GBps"]) * 1e9, rel=0.01)
    if row["tdp_w"]:
        assert device.tdp_w == float(row["tdp_w"])
    if row["price_usd_per_h"]:
        assert device.price_usd_per_h == float(row["price_usd_per_h"])
    gib = device.memory_bytes / 2**30
    assert 0.74 * float(row["mem_gb"]) <= gib <= 1.01 * float(row["mem_gb"])


def test_nodes_may_be_partly_filled() -> None:
    cluster = load_cluster("h100-sxm", 12)
    assert (cluster.name, cluster.gpus_per_node, cluster.nodes) == ("hgx-h100", 8, 2)
    assert load_cluster("a100-40-sxm", 8).device.name == "a100-40-sxm"
    assert load_cluster("gb200", 72).nodes == 1


@pytest.mark.parametrize("gpus", [0, -1, 2.0, "8", True, None, MAX_GPUS + 1])
def test_impossible_device_counts(gpus: object) -> None:
    with pytest.raises(ProfileError, match=r"^gpus = .*expected"):
        load_cluster("h100-sxm", gpus)  # type: ignore[arg-type]


def test_a_cluster_without_links_between_nodes_names_its_limit() -> None:
    with pytest.raises(ProfileError, match="tpu-v5e-pod joins at most 256"):
        load_cluster("tpu-v5e", 257)


def test_unknown_names_offer_the_nearest() -> None:
    with pytest.raises(ProfileError, match=r"unknown device 'h100'.*h100-sxm"):
        load_device("h100")
    with pytest.raises(ProfileError, match=r"unknown hardware 'hgx-h10'.*hgx-h100"):
        load_cluster("hgx-h10", 8)
    with pytest.raises(ProfileError, match="unknown device ''"):
        load_device("")


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    text = (DEVICES / "h100-sxm.yaml").read_text(encoding="utf-8")
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        text.replace("name: h100-sxm", "name: mine").replace("memory_gb_per_s: 3350", "memory_gb_per_s: 4e3")
    )
    cluster = load_cluster(str(mine), 16)
    assert (cluster.name, cluster.device.name, cluster.device.memory_bytes_per_s) == ("hgx-h100", "mine", 4e12)
    text = (CLUSTERS / "hgx-h100.yaml").read_text(encoding="utf-8")
    pair = tmp_path / "pair.yaml"
    pair.write_text(text.replace("name: hgx-h100", "name: pair").replace("gpus_per_node: 8", "gpus_per_node: 2"))
    assert load_cluster(str(pair), 3).nodes == 2


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("tdp_w: 700", "tdp_w: .nan", "tdp_w"),
        ("tdp_w: 700", "tdp_w: .inf", "tdp_w"),
        ("tdp_w: 700", "tdp_w: -700", "tdp_w = -700"),
        ("tdp_w: 700", "tdp_w: 0", "tdp_w = 0"),
        ("tdp_w: 700", "tdp_w: '700'", "tdp_w = '700'"),
        ("tdp_w: 700", "tdp_w: true", "tdp_w"),
        ("tdp_w: 700", "", "tdp_w is missing"),
        ("tdp_w: 700", "tdp_w: 700\ncolour: red", "unknown key colour"),
        ("tdp_w: 700", "tdp_w: 700\ntdp_w: 800", "tdp_w.*not used before"),
        ("tdp_w: 700", "tdp_w: !!float 700", "tag"),
        ("tdp_w: 700", "tdp_w: !!python/object/apply:os.getcwd []", "tag"),
        ("tdp_w: 700", "tdp_w: &power 700", "anchors"),
        ("idle_w: 70", "idle_w: 701", "above tdp_w"),
        ("kind: gpu", "kind: toaster", "kind = 'toaster'"),
        ("bf16:", "bf17:", "bf17"),
        ("gemm_mfu: 0.73", "gemm_mfu: 1.2", "gemm_mfu = 1.2"),
        ("compute_units: 132", "compute_units: 13.5", "compute_units = 13.5"),
        ("name: h100-sxm", "name: ''", "name"),
    ],
)
def test_wrong_device_files_are_one_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = (DEVICES / "h100-sxm.yaml").read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "bad.yaml"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ProfileError, match=message) as caught:
        load_device(str(path))
    assert "bad.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("gpus_per_node: 8", "gpus_per_node: 0", "gpus_per_node"),
        ("kind: switch", "kind: torus", "in_switch_reduction needs|leave inter out"),
        ("kind: switch", "kind: pcie", "bridge_gb_per_s"),
        ("device: h100-sxm", "device: h100", "h100-sxm"),
        ("efficiency: 0.9", "efficiency: 0.9\n  oversubscription: 0.5", "oversubscription"),
    ],
)
def test_wrong_cluster_files_are_one_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = (CLUSTERS / "hgx-h100.yaml").read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "bad.yaml"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ProfileError, match=message) as caught:
        load_cluster(str(path), 8)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[1, 2]",
        b"just words",
        b"a: [1",
        b"a: 1\n---\nb: 2",
        b"\xff\xfe\x00",
        b"a: \x00",
        b"1: 2",
        b"? [a]\n: b",
        b"a: *x",
    ],
)
def test_files_that_are_no_mapping(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "odd.yaml"
    path.write_bytes(content)
    with pytest.raises(ProfileError, match=r"odd\.yaml") as caught:
        read_mapping(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("depth", [100, 100_000])
def test_deep_nesting_and_missing_files(tmp_path: Path, depth: int) -> None:
    path = tmp_path / "deep.yaml"
    path.write_text("a: " + "[" * depth, encoding="utf-8")
    with pytest.raises(ProfileError, match=r"deep\.yaml"):
        read_mapping(path)
    with pytest.raises(ProfileError, match="cannot be read"):
        load_device(str(tmp_path / "missing.yaml"))
    with pytest.raises(ProfileError, match="cannot be read"):
        load_device(f"{tmp_path}/")
