"""Recorded boards are read as what they are. Kind: vectors; limits and digest: properties."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.hw.board import Board
from shoal.hw.cgroup import cpu_list
from shoal.hw.doctor import cpu_span
from tests.hw.board_files import NAMES, laid_out, written

# board: kind, machine, CPUs, instructions, x86-64 level, threads, (kind, node, may_open, group)
FACTS = {
    "container": (
        "pc",
        "x86_64",
        "8 × Intel(R) Xeon(R) Platinum 8375C CPU @ 2.90GHz",
        "avx avx2 avx512_vnni avx512bw avx512dq avx512f avx512vl f16c fma sse4.2",
        4,
        1,
        [],
    ),
    "imx8m-plus": (
        "imx8mp",
        "aarch64",
        "4 × Cortex-A53",
        "asimd",
        0,
        4,
        [("nxp-vip", "/dev/galcore", True, "video")],
    ),
    "jetson-orin-nano": (
        "jetson-orin",
        "aarch64",
        "6 × Cortex-A78AE",
        "asimd dotprod fp16",
        0,
        6,
        [("jetson-gpu", "/dev/nvhost-gpu", False, "video")],
    ),
    "orange-pi-5": (
        "rk3588",
        "aarch64",
        "4 × Cortex-A76 + 4 × Cortex-A55",
        "asimd dotprod fp16",
        0,
        8,
        [
            ("gpu", "/dev/mali0", True, "video"),
            ("rockchip-npu", "/dev/dri/renderD129", False, "render"),
        ],
    ),
    "raspberry-pi-4": (
        "raspberry-pi-4",
        "aarch64",
        "4 × Cortex-A72",
        "asimd",
        0,
        4,
        [
            ("coral", "/dev/bus/usb/002/003", False, "plugdev"),
            ("gpu", "/dev/dri/renderD128", True, "render"),
        ],
    ),
    "raspberry-pi-5": (
        "raspberry-pi-5",
        "aarch64",
        "4 × Cortex-A76",
        "asimd dotprod fp16",
        0,
        4,
        [("gpu", "/dev/dri/renderD128", True, "render"), ("hailo", "/dev/hailo0", True, "root")],
    ),
    "x86-gateway": (
        "pc",
        "x86_64",
        "4 × Intel Atom(R) x6425E Processor @ 2.00GHz",
        "sse4.2",
        2,
        4,
        [("gpu", "/dev/dri/renderD128", False, "render")],
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_board_is_read_as_what_it_is(name: str, tmp_path: Path) -> None:
    """The facts that backends and trials decide by; a new file needs a row here."""
    board = Board.read(laid_out(name, tmp_path))
    kind, machine, cpus, isa, level, threads, accelerators = FACTS[name]
    assert (board.kind, board.machine, board.cpu_model) == (kind, machine, cpus)
    assert (" ".join(board.isa), board.x86_level, board.threads_max) == (isa, level, threads)
    found = [(one.kind, one.node, one.may_open, one.group) for one in board.accelerators]
    assert found == accelerators
    assert board.user_bits == 64
    assert board.libc.startswith("glibc 2.")
    assert board.memory_bytes > 4 << 30


@pytest.mark.parametrize("name", NAMES)
def test_the_digest_is_the_same_at_every_reading(name: str, tmp_path: Path) -> None:
    """Cached trials hang on it; a change of these facts' meaning must raise DIGEST_VERSION."""
    first = Board.read(laid_out(name, tmp_path / "a"))
    root = laid_out(name, tmp_path / "b")
    (root / "proc/loadavg").write_text("9.99 9.99 9.99 1/1 1\n")
    for path in root.glob("sys/class/thermal/thermal_zone*/temp"):
        if path.is_file():
            path.write_text("99000\n")
    for path in root.glob("sys/devices/system/cpu/cpu*/cpufreq/scaling_*_freq"):
        path.write_text("300000\n")
    meminfo = (root / "proc/meminfo").read_text()
    (root / "proc/meminfo").write_text(meminfo.replace("MemAvailable", "MemNothing"))
    assert Board.read(root).digest == first.digest
    assert first.to_dict()["digest"] == first.digest
    assert json.loads(json.dumps(first.to_dict())) == first.to_dict()


def test_boards_have_digests_of_their_own(tmp_path: Path) -> None:
    """Or one board's trial would choose for another."""
    digests = {Board.read(laid_out(name, tmp_path / name)).digest for name in NAMES}
    assert len(digests) == len(NAMES) == 7


def test_the_digest_changes_with_what_decides_speed(tmp_path: Path) -> None:
    """And not with what does not: node numbers move between boots, kernels are updated."""
    board = Board.read(laid_out("raspberry-pi-5", tmp_path))
    slower = replace(board.clusters[0], freq_mhz_max=1500)
    npu = board.accelerators[1]
    faster = [
        replace(board, clusters=(slower,)),
        replace(board, isa=()),
        replace(board, limits=replace(board.limits, cpu_quota=2.0)),
        replace(board, limits=replace(board.limits, cpus=(0, 1))),
        replace(board, limits=replace(board.limits, memory_bytes_max=1 << 30)),
        replace(board, accelerators=board.accelerators[:1]),
        replace(board, accelerators=(board.accelerators[0], replace(npu, may_open=False))),
        replace(board, user_bits=32),
    ]
    assert board.digest not in {one.digest for one in faster}
    same = [
        replace(board, kernel="7.0.0", libc="glibc 3.0"),
        replace(board, memory_bytes=board.memory_bytes - (3 << 20)),
        replace(board, accelerators=(board.accelerators[0], replace(npu, node="/dev/hailo7"))),
    ]
    assert {one.digest for one in same} == {board.digest}


def test_clusters_are_apart_and_the_fastest_is_first(tmp_path: Path) -> None:
    """On big.LITTLE the number of threads that helps is the number of fast cores."""
    board = Board.read(laid_out("orange-pi-5", tmp_path))
    found = [(one.model, one.cpus, one.freq_mhz_max, one.capacity) for one in board.clusters]
    assert found == [
        ("Cortex-A76", (4, 5), 2352, 1024),
        ("Cortex-A76", (6, 7), 2304, 1024),
        ("Cortex-A55", (0, 1, 2, 3), 1800, 530),
    ]


def test_only_instructions_of_every_cpu_count(tmp_path: Path) -> None:
    """A thread may land on the core that lacks them and die of SIGILL."""
    cpu = "processor: {}\nFeatures: {}\nCPU implementer: 0x41\nCPU part: 0xd05\n\n"
    text = cpu.format(0, "fp asimd asimddp i8mm") + cpu.format(1, "fp asimd asimdhp asimddp")
    board = Board.read(written(tmp_path, {"/proc/cpuinfo": text}))
    assert board.isa == ("asimd", "dotprod")
    assert board.machine == "aarch64"  # of cpuinfo alone, as on kernels before 6.1


@pytest.mark.parametrize("missing", ["avx2", "bmi2", "movbe", "abm", "xsave"])
def test_a_level_needs_all_its_flags(missing: str, tmp_path: Path) -> None:
    """Code compiled for v3 uses any of them."""
    root = laid_out("container", tmp_path)
    text = (root / "proc/cpuinfo").read_text()
    (root / "proc/cpuinfo").write_text(text.replace(f" {missing} ", " "))
    assert Board.read(root).x86_level == 2


V1 = {
    "/proc/self/cgroup": (
        "4:memory:/docker/abc\n3:cpuset:/docker/abc\n2:cpu,cpuacct:/docker/abc\n1:name=systemd:/\n"
    ),
    "/sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "150000\n",
    "/sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000\n",
    "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
    "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
    "/sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": "536870912\n",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    "/proc/self/status": "Name:\tpython\nCpus_allowed_list:\t0-1\n",
    "/sys/devices/system/cpu/online": "0-3\n",
}


def test_limits_of_version_1_are_read(tmp_path: Path) -> None:
    """Boards with old kernels; "no limit" is a number there."""
    board = Board.read(written(tmp_path, dict(V1)))
    assert board.limits.version == 1
    assert board.limits.cpu_quota == 1.5
    assert board.limits.memory_bytes_max == 512 << 20
    assert board.cpus_usable == (0, 1)
    assert board.threads_max == 1


def test_a_number_that_means_no_limit_is_none(tmp_path: Path) -> None:
    """Version 1 writes the largest page-aligned number, and -1."""
    root = written(tmp_path, {key: text for key, text in V1.items() if "/abc/" not in key})
    limits = Board.read(root).limits
    assert (limits.cpu_quota, limits.memory_bytes_max) == (None, None)


def test_a_path_of_the_host_falls_back_to_the_mounts_root(tmp_path: Path) -> None:
    """A container without a namespace sees the host's path and its own mount."""
    files = dict(V1)
    for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"):
        text = files.pop(f"/sys/fs/cgroup/cpu,cpuacct/docker/abc/{name}")
        files[f"/sys/fs/cgroup/cpu,cpuacct/{name}"] = text
    files["/proc/self/cgroup"] = files["/proc/self/cgroup"].replace("/docker/abc", "/../other")
    assert Board.read(written(tmp_path, files)).limits.cpu_quota == 1.5


def test_the_least_limit_on_the_way_up_holds(tmp_path: Path) -> None:
    """A pod's limit holds for the container that has none, and the other way round."""
    mount = "/sys/fs/cgroup"
    files = {
        "/proc/self/cgroup": "0::/pod/one\n",
        f"{mount}/cgroup.controllers": "cpu memory\n",
        f"{mount}/pod/cpu.max": "200000 100000\n",
        f"{mount}/pod/one/cpu.max": "max 100000\n",
        f"{mount}/pod/memory.max": "2147483648\n",
        f"{mount}/pod/one/memory.max": "1073741824\n",
        f"{mount}/pod/one/memory.high": "805306368\n",
    }
    limits = Board.read(written(tmp_path, files)).limits
    assert (limits.cpu_quota, limits.memory_bytes_max) == (2.0, 1 << 30)
    assert (limits.memory_bytes_high, limits.version) == (768 << 20, 2)


@settings(deadline=None)
@given(st.sets(st.integers(0, 4095), min_size=1, max_size=40))
def test_a_list_of_cpus_is_read_as_it_is_written(cpus: set[int]) -> None:
    """The kernel's format, both ways."""
    assert cpu_list(cpu_span(sorted(cpus))) == tuple(sorted(cpus))


@pytest.mark.parametrize("text", ["a", "1-", "-1", "3-1", "0-9999999999", "1;2", "²"])
def test_what_is_no_list_of_cpus_is_refused(text: str) -> None:
    """A range of 10^10 CPUs must not be made."""
    with pytest.raises(ValueError, match="not a list"):
        cpu_list(text)


def test_a_usb_coral_is_found_before_and_after_its_firmware(tmp_path: Path) -> None:
    """It changes its ids when its first model is loaded, and that must not change the digest."""
    root = laid_out("raspberry-pi-4", tmp_path)
    before = Board.read(root)
    (root / "sys/bus/usb/devices/2-1/idVendor").write_text("18d1\n")
    (root / "sys/bus/usb/devices/2-1/idProduct").write_text("9302\n")
    assert Board.read(root) == before
    (root / "sys/bus/usb/devices/2-1/idProduct").write_text("9303\n")
    assert [one.kind for one in Board.read(root).accelerators] == ["gpu"]


def test_an_npu_without_a_driver_is_reported(tmp_path: Path) -> None:
    """The hardware is there and nothing drives it: the operator can change that."""
    platform = "/sys/bus/platform/devices/fdab0000.npu/uevent"
    board = Board.read(written(tmp_path, {platform: "OF_NAME=npu\n"}))
    assert [(one.kind, one.node) for one in board.accelerators] == [("rockchip-npu", "")]
    assert "driver is not loaded" in board.accelerators[0].problem


def test_this_machine_is_read() -> None:
    """Whatever it is."""
    board = Board.read()
    assert board.machine
    assert board.memory_bytes > 0
    assert 1 <= board.threads_max <= len(board.cpus_online) <= board.cpus_possible_count
    assert board.user_bits in (32, 64)


def test_an_empty_root_is_a_board_without_facts(tmp_path: Path) -> None:
    """A chroot without /proc must not stop the agent."""
    board = Board.read(tmp_path)
    assert (board.machine, board.model, board.memory_bytes) == ("", "", 0)
    assert board.threads_max == 1
    assert board.accelerators == ()
    assert board.unknown == ()


def test_a_node_may_be_opened_or_names_the_group_to_join(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a root that is no recording the node itself is asked, and its group's name looked up."""
    root = written(tmp_path, {"/etc/group": "daemon:x:1:\nhailo:x:0:alice\n", "/dev/hailo1": "x"})
    (root / "dev/hailo0").symlink_to("/dev/null")  # a character device that everybody may open
    (found,) = Board.read(root).accelerators  # and hailo1 is a plain file
    assert (found.node, found.may_open, found.group) == ("/dev/hailo0", True, "hailo")
    assert found.problem == ""
    asked = []

    def refuse(path: str, mode: int) -> bool:
        asked.append((path, mode))
        return False

    monkeypatch.setattr(os, "access", refuse)
    (found,) = Board.read(root).accelerators
    assert found.problem == "user is not in group hailo: cannot open /dev/hailo0"
    assert asked == [(str(root / "dev/hailo0"), os.R_OK | os.W_OK)]


TEGRA = {"/proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005\0nvidia,tegra234\0"}


@pytest.mark.parametrize(
    ("node", "files", "kind"),
    [
        ("/dev/apex_0", {}, "coral"),
        ("/dev/ethosu0", {}, "ethos-u"),
        ("/dev/fastrpc-cdsp", {}, "hexagon"),
        ("/dev/adsprpc-smd", {}, "hexagon"),
        ("/dev/rknpu", {}, "rockchip-npu"),
        ("/dev/galcore", {}, "gpu"),
        ("/dev/galcore", {"/proc/device-tree/compatible": "fsl,imx8mp\0"}, "nxp-vip"),
        ("/dev/nvidia0", {}, "nvidia-gpu"),
        ("/dev/nvidia0", TEGRA, None),
        ("/dev/nvhost-gpu", TEGRA, "jetson-gpu"),
        ("/dev/nvhost-ctrl-nvdla0", TEGRA, "jetson-dla"),
        ("/dev/nvmap", TEGRA, "jetson-gpu"),
        (
            "/dev/accel/accel0",
            {"/sys/class/accel/accel0/device/uevent": "DRIVER=intel_vpu\n"},
            "intel-npu",
        ),
        (
            "/dev/accel/accel0",
            {"/sys/class/accel/accel0/device/uevent": "DRIVER=rocket\n"},
            "rockchip-npu",
        ),
        ("/dev/accel/accel0", {}, "accel"),
        ("/dev/dri/renderD128", {"/sys/class/drm/renderD128/device/uevent": "DRIVER=xe\n"}, "gpu"),
        (
            "/dev/dri/renderD128",
            {"/sys/class/drm/renderD128/device/uevent": "DRIVER=rknpu\n"},
            "rockchip-npu",
        ),
        (
            "/dev/dri/renderD128",
            {"/sys/class/drm/renderD128/device/uevent": "DRIVER=rockchip-drm\n"},
            None,
        ),
        ("/dev/nvidiactl", {}, None),
    ],
)
def test_each_accelerator_is_known_by_its_node(
    node: str, files: dict[str, str], kind: str | None, tmp_path: Path
) -> None:
    """And what only looks like one is not."""
    root = written(tmp_path, files)
    place = root / node.lstrip("/")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to("/dev/null")
    found = [(one.kind, one.node) for one in Board.read(root).accelerators]
    assert found == ([] if kind is None else [(kind, node)])
