"""The table of cards: what names mean, what its numbers say, and what the command makes of them."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
from run_cases import call

from albor.errors import ConfigError
from albor.memory.cards import GPUS, TABLE, Gpu, find_gpu, least_bytes, matching_gpus, reserve_mib
from albor.units import GIB, MIB

LARGE = Path(__file__).parents[1] / "configs" / "pretrain-350m.yaml"
with TABLE.open(encoding="utf-8", newline="") as file:
    ROWS = list(csv.DictReader(file))
REPORTED = [row for row in ROWS if row["usable"] and row["nvidia_smi_mib"]]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("RTX 4090", "RTX 4090"),
        ("rtx4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090 24GB", "RTX 4090"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti Super"),
        ("RTX 4060 Ti 8 GB", "RTX 4060 Ti 8GB"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "RTX 4090 Laptop"),
        ("RTX 4090 mobile", "RTX 4090 Laptop"),
        ("4090M", "RTX 4090 Laptop"),
        ("NVIDIA GeForce RTX 4090 D", "RTX 4090 D"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000 Blackwell"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "RTX PRO 6000 Blackwell Max-Q"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("A100-80", "A100 80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe 80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 PCIe 40GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA GH200 480GB", "GH200 96GB"),  # they are the processor's
        ("NVIDIA GH200 144G HBM3e", "GH200 144GB"),
        ("RTX 3060 8 GB", "RTX 3060 8GB"),
        ("H100 7g.80gb", "H100 MIG 7g.80gb"),
        ("RTX PRO 6000 Blackwell 4g.96gb", "RTX PRO 6000 Blackwell MIG 4g.96gb"),
        ("Tesla V100-SXM2-32GB", "V100 32GB"),
        ("Tesla T4", "T4"),
        ("DGX Spark", "GB10"),
        ("1g.5gb", "A100 40GB MIG 1g.5gb"),
        ("H100 1g.10gb", "H100 MIG 1g.10gb"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "H100 MIG 1g.10gb"),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", "A100 80GB MIG 3g.40gb"),
        ("A100-SXM4-40GB MIG 1g.10gb", "A100 40GB MIG 1g.10gb"),
        ("A100 80GB mig-1g.10gb+me", "A100 80GB MIG 1g.10gb"),
    ],
)
def test_find_gpu(name: str, meant: str) -> None:
    assert find_gpu(name).name == meant


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("RTX 4900", "did you mean RTX 4090"),
        ("RTX 409", "did you mean RTX 4090"),  # and not a card of 409 GB
        ("RTX 3060 6GB", "not a card that albor knows; did you mean RTX 3060 12GB or RTX 3060 8GB?"),
        ("A100-SXM-64GB", "did you mean A100 40GB or A100 80GB?"),
        ("H100 1g.11gb", "not a card that albor knows; its slices are:? *H100 MIG 1g.10gb, .*7g.80gb"),
        ("H200 MIG 1g.19gb", "its slices are:? *H200 MIG 1g.18gb, .*; or, for any other card"),
        ("H100 MIG", "does not say which slice; say which:? *H100 MIG 1g.10gb, .*, H100 MIG 7g.80gb$"),
        ("NVIDIA H200 MIG", "say which:? *H200 MIG 1g.18gb, .*, H200 MIG 7g.141gb$"),
        ("A100 40GB MIG", "say which:? *A100 40GB MIG 1g.5gb, .*, A100 40GB MIG 7g.40gb$"),
        ("A100-MIG", "say which:? *A100 40GB MIG 1g.5gb, .*, A100 80GB MIG 7g.80gb$"),
        ("RTX 4090 MIG", "does not say which slice; albor knows no slices of it: .*--vram"),
        ("1c.3g.40gb", "not a card"),  # a part of a slice
        ("A100", "is more than one card; say which: A100 40GB, A100 80GB"),
        ("RTX 3080", "say which: RTX 3080 10GB, RTX 3080 12GB"),
        ("RTX 3060", "say which: RTX 3060 12GB, RTX 3060 8GB"),
        ("NVIDIA RTX A2000", "say which: RTX A2000 6GB, RTX A2000 12GB"),
        ("GH200", "say which: GH200 96GB, GH200 144GB"),
        ("3g.40gb", "say which: A100 80GB MIG 3g.40gb, H100 MIG 3g.40gb"),
        ("Radeon RX 7900", "known are:? .*RTX 4090.*H100.*--vram 24GiB"),
        ("", "known are:? .*--vram 24GiB"),
        ("NVIDIA", "known are"),
    ],
)
def test_a_name_is_not_guessed(name: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_gpu(name)
    lines = str(caught.value).split("\n")
    assert re.search(says, " ".join(line.strip() for line in lines))
    assert all(len(line) <= 110 for line in lines[1:]), "many names are wrapped"
    assert len(lines[0]) <= 240


def test_a_memory_that_was_read_says_which_of_two_cards() -> None:
    name = "NVIDIA GeForce RTX 3080"
    assert [gpu.name for gpu in matching_gpus(name, 11900 * MIB)] == ["RTX 3080 12GB"]
    assert [gpu.name for gpu in matching_gpus(name, 9900 * MIB)] == ["RTX 3080 10GB"]
    assert matching_gpus(name, 20000 * MIB) == [], "one that was rebuilt with more is none of them"
    name = "NVIDIA RTX A2000"
    assert [gpu.name for gpu in matching_gpus(name, 5700 * MIB)] == ["RTX A2000 6GB"]


def test_the_table_covers_what_people_have() -> None:
    whole = {gpu.name for gpu in GPUS if not gpu.slice}
    assert len(whole) >= 30
    wanted = {
        f"RTX {model}"
        for model in ("3060 8GB", "3060 12GB", "3090", "4060", "4070", "4080", "4090", "5070", "5080", "5090")
    }
    wanted |= {f"RTX {model} Laptop" for model in ("3080 Ti", "4060", "4070", "4080", "4090", "5090")}
    wanted |= {"T4", "L4", "A10", "A10G", "A30", "A40", "RTX A5000", "RTX A6000", "L40", "L40S"}
    wanted |= {"RTX 4000 Ada", "RTX 5000 Ada", "RTX 6000 Ada", "RTX PRO 6000 Blackwell", "V100 32GB"}
    wanted |= {"A100 40GB", "A100 80GB", "H100", "H100 PCIe", "H100 NVL", "H200", "B200", "GH200 96GB"}
    assert wanted - whole == set()
    assert {gpu.slice for gpu in GPUS if gpu.slice} >= {"1g.5gb", "1g.10gb", "2g.20gb", "3g.40gb"}


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_a_row_is_found_by_its_own_name_and_is_plausible(gpu: Gpu) -> None:
    assert find_gpu(gpu.name) is gpu
    assert find_gpu(f"NVIDIA {gpu.name.lower()}") is gpu
    if gpu.also:
        assert find_gpu(gpu.also) is gpu
    assert gpu.source
    assert (gpu.usable_bytes is None) == gpu.unified
    if gpu.usable_bytes is not None:
        assert 4 * GIB < gpu.usable_bytes < 192 * GIB
        assert gpu.usable_bytes < _sold_gib(gpu) * GIB
    assert (7, 0) <= gpu.compute_capability <= (12, 1)
    if gpu.bf16_peak_flops is not None:
        assert gpu.compute_capability >= (8, 0), "it has no bf16"
        assert not gpu.slice, "it does not reach the card's peak"
        assert gpu.bandwidth is not None
        assert gpu.multiprocessors is not None
        # A multiprocessor does 512 to 8192 FLOP a cycle, at 1.3 to 3 GHz.
        assert 512 * 1.3e9 < gpu.bf16_peak_flops / gpu.multiprocessors < 8192 * 3e9
    assert gpu.bandwidth is None or 1e11 < gpu.bandwidth < 1e13
    assert gpu.multiprocessors is None or 14 <= gpu.multiprocessors <= 192
    assert gpu.board_watts is None or 40 <= gpu.board_watts <= 1200


def _sold_gib(gpu: Gpu) -> float:
    """The gigabytes in the name, or what nvidia-smi shows, which is no more than what is sold."""
    if named := re.search(r"(\d+)gb", gpu.name.lower().split()[-1]):
        return int(named[1])
    row = next(row for row in ROWS if row["name"] == gpu.name)
    return int(row["nvidia_smi_mib"]) / 1024


@pytest.mark.parametrize("row", REPORTED, ids=lambda row: row["name"])
def test_the_rule_for_derived_rows_holds_where_both_numbers_are_known(row: dict[str, str]) -> None:
    """It promises no more than any card has, and not a twentieth less."""
    total = int(row["nvidia_smi_mib"])
    derived = (total - reserve_mib(total)) * MIB
    number, unit = row["usable"].split()
    reported = float(number) * {"B": 1, "MiB": MIB, "GiB": GIB}[unit]
    most = 2 * reported - least_bytes(row["usable"])  # where it was rounded down
    assert 0.95 * reported < derived <= most


def test_a_derived_row_says_how() -> None:
    derived = [gpu for gpu in GPUS if gpu.source.startswith("derived: ")]
    assert find_gpu("RTX 4080") in derived
    assert find_gpu("RTX 4080").source == "derived: nvidia-smi 16376 MiB less 512"
    assert find_gpu("RTX 4080").usable_bytes == (16376 - 512) * MIB
    assert find_gpu("RTX 5060 Ti 16GB").source == "15816 MiB: Luce-Org/lucebox#407"


# A thread, a file of a repository, or a page.
_FOLLOWED = re.compile(r"[\w.-]+/[\w.-]+(#\d+|, [\w./-]+)|https://\S+/\S+")


def test_most_capacities_have_a_source_that_can_be_followed() -> None:
    whole = [gpu for gpu in GPUS if not gpu.slice and ": " in gpu.source and "derived" not in gpu.source]
    assert sum(bool(_FOLLOWED.search(gpu.source)) for gpu in whole) >= 30
    slices = [gpu for gpu in GPUS if gpu.slice and "derived" not in gpu.source]
    assert [gpu.name for gpu in slices if not _FOLLOWED.search(gpu.source)] == [
        "A30 MIG 4g.24gb",  # less than what is cited
        *(f"GH200 96GB MIG {profile}" for profile in ("1g.12gb", "1g.24gb", "2g.24gb", "3g.48gb", "4g.48gb")),
    ]


def test_a_whole_slice_has_no_less_than_two_halves() -> None:
    """What is said of a card's largest slice where nobody has listed it."""
    derived = 0
    for card in {gpu.name.partition(" MIG ")[0] for gpu in GPUS if gpu.slice}:
        slices = [gpu for gpu in GPUS if gpu.name.startswith(f"{card} MIG ")]  # the smallest first
        *_, half, whole = slices
        assert whole.multiprocessors is not None
        assert half.multiprocessors is not None
        # They are listed with two decimals.
        assert 2 * half.usable_bytes <= whole.usable_bytes + 16 * MIB, card
        if "derived: no less than two of its" in whole.source:
            assert whole.source.endswith(str(half.slice)), card
            assert abs(whole.usable_bytes - 2 * half.usable_bytes) <= 16 * MIB
            derived += 1
    assert derived == 4


def test_decimals_were_rounded_up_perhaps() -> None:
    assert least_bytes("23.52 GiB") == int(23.515 * GIB)
    assert least_bytes("44.3 GiB") == int(44.25 * GIB)
    assert least_bytes("11910 MiB") == 11910 * MIB
    assert least_bytes("42296475648 B") == 42_296_475_648


LAPTOPS = [gpu.name for gpu in GPUS if "Laptop" in gpu.name]


@pytest.mark.parametrize("laptop", LAPTOPS)
@pytest.mark.parametrize("form", ["{} Laptop", "NVIDIA GeForce {} Laptop GPU", "{} mobile", "{} Notebook"])
def test_a_laptop_never_stands_for_the_card_of_that_name(laptop: str, form: str) -> None:
    name, memory = re.fullmatch(r"(.*?) Laptop( \d+GB)?", laptop).groups()  # type: ignore[union-attr]
    found = matching_gpus(form.format(name) + (memory or ""))
    assert [gpu.name for gpu in found] == [laptop]
    assert not any("Laptop" in gpu.name for gpu in matching_gpus(name)), "nor the other way round"


# The command


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("albor.memory.devices.installed_gpu", lambda: None)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nonsense", "--gpu: 'nonsense' is not a card that albor knows; known are:\n    RTX 3060 12GB, "),
        ("H100 MIG", "'H100 MIG' does not say which slice; say which:"),
        ("RTX 4900", "did you mean RTX 4090"),
        ("3g.40gb", "'3g.40gb' is more than one card; say which: A100 80GB MIG 3g.40gb, H100 MIG 3g.40gb"),
    ],
)
def test_a_wrong_card_is_a_usage_error(name: str, says: str) -> None:
    for options in ([], ["--json"]):
        result = call("vram-estimate", LARGE, "--gpu", name, *options)
        assert (result.code, result.out) == (2, "")
        assert says in result.err


def test_a_laptop_card_has_its_own_capacity() -> None:
    result = call("vram-estimate", LARGE, "--gpu", "RTX 4090 Laptop")
    assert result.code == 0, result.err
    assert "pretrain-350m on RTX 4090 Laptop" in result.out
    assert "15.49 GiB available" in result.out
    assert "Capacity derived: nvidia-smi 16376 MiB less 512\n" in result.out


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.parametrize("gpu", [(), ("--gpu", "DGX Spark")])
def test_without_a_capacity_the_verdict_is_unknown(gpu: tuple[str, ...]) -> None:
    result = call("vram-estimate", LARGE, *gpu)
    assert result.code == 0, result.err
    assert "Unknown: " in result.out
    assert "--vram" in result.out
    answer = json.loads(call("vram-estimate", LARGE, *gpu, "--json").out)
    assert (answer["fits"], answer["capacity_bytes"], answer["holders"]) == (None, None, [])


def test_shared_memory_holds_the_hosts_part_too() -> None:
    """GB10, Jetson: what a run needs there is what it needs of both memories."""
    on_card, shared = (call("vram-estimate", LARGE, "--gpu", name, "--json") for name in ("RTX 5090", "GB10"))
    card, both = json.loads(on_card.out), json.loads(shared.out)
    assert both["device_bytes"] == card["device_bytes"]
    text = call("vram-estimate", LARGE, "--gpu", "GB10").out
    needed = float(re.search(r"Unknown: ([\d.]+) GiB needed", text)[1])  # type: ignore[index]
    assert needed * GIB > both["device_bytes"] + both["pinned_bytes"] + both["host_bytes"] + 2 * GIB
    assert "it uses the host's memory: give what is free of that, --vram 100GiB" in text
