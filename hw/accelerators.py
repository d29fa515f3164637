"""Find accelerators by their device nodes, and say whether this user may open them.

A node proves that a driver has claimed the hardware, no more: whether a backend can use it is the
backends' question. Hardware that is seen without a node is reported with an empty one.

Source: the drivers' own documentation and udev rules; names of accel and DRM drivers are those in
the device's uevent.
"""

from __future__ import annotations

from dataclasses import dataclass

from .tree import Tree

USB_CORAL = {
    ("1a6e", "089a"),  # before its firmware is loaded
    ("18d1", "9302"),  # after
}
DRIVERS_ACCEL = {
    "intel_vpu": ("intel-npu", "Intel NPU"),
    "amdxdna": ("amd-npu", "AMD XDNA NPU"),
    "rocket": ("rockchip-npu", "Rockchip NPU"),
    "ethosu": ("ethos-u", "Arm Ethos-U"),
    "qaic": ("qualcomm-aic", "Qualcomm Cloud AI"),
    "habanalabs": ("habana", "Habana Gaudi"),
}
DRIVERS_RENDER = {
    "i915": "Intel GPU",
    "xe": "Intel GPU",
    "amdgpu": "AMD GPU",
    "radeon": "AMD GPU",
    "nvidia": "NVIDIA GPU",
    "nouveau": "NVIDIA GPU",
    "tegra": "NVIDIA Tegra GPU",
    "panfrost": "Arm Mali GPU",
    "panthor": "Arm Mali GPU",
    "lima": "Arm Mali GPU",
    "v3d": "VideoCore GPU",
    "etnaviv": "Vivante GPU",
    "msm": "Adreno GPU",
    "msm_dpu": "Adreno GPU",
    "powervr": "PowerVR GPU",
    "virtio_gpu": "virtual GPU",
    "virtio-pci": "virtual GPU",
}


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Accelerator:
    """One accelerator, or a part of the hardware that looks like one."""

    kind: str
    """Stable name: "coral", "hailo", "rockchip-npu", "jetson-gpu", "gpu", …"""
    name: str
    """For people."""
    node: str
    """Device node, e.g. "/dev/apex_0"; empty if the hardware is there without one."""
    driver: str
    """Kernel driver as it names itself, empty if unknown."""
    may_open: bool
    """This user may open the node for reading and writing."""
    group: str
    """Group that may open the node; empty if unknown."""

    @property
    def problem(self) -> str:
        """What stands in the way of using it, empty if nothing does."""
        if not self.node:
            return "no device node: the driver is not loaded"
        if self.may_open:
            return ""
        if self.group in ("", "root"):
            return f"only root may open {self.node}"
        return f"user is not in group {self.group}: cannot open {self.node}"


def find(tree: Tree, compatible: tuple[str, ...]) -> tuple[Accelerator, ...]:
    """Return the accelerators, sorted by kind and node.

    Args:
        tree: Where to look.
        compatible: The board's device-tree names; they tell a Jetson from a PC with its card.
    """
    tegra = any(name.startswith("nvidia,tegra") for name in compatible)
    found = [
        *_by_node(tree, "coral", "Coral Edge TPU (PCIe)", "/dev/apex_*"),
        *_usb(tree),
        *_by_node(tree, "hailo", "Hailo", "/dev/hailo*"),
        *_by_node(tree, "ethos-u", "Arm Ethos-U", "/dev/ethosu*"),
        *_by_node(tree, "hexagon", "Qualcomm Hexagon", "/dev/fastrpc-cdsp*"),
        *_by_node(tree, "hexagon", "Qualcomm Hexagon", "/dev/adsprpc-smd"),
        *_by_node(tree, "gpu", "Arm Mali GPU", "/dev/mali[0-9]*"),
        *_vivante(tree, compatible),
        *_nvidia(tree, tegra=tegra),
        *_render(tree),
        *_accel(tree),
    ]
    found += _rockchip(tree, found)
    return tuple(sorted(found))


def _driver(tree: Tree, folder: str) -> str:
    for line in (tree.text(f"{folder}/device/uevent") or "").splitlines():
        name, _, value = line.partition("=")
        if name == "DRIVER":
            return value
    return ""


def _by_node(
    tree: Tree, kind: str, name: str, pattern: str, *, driver: str = ""
) -> list[Accelerator]:
    return [
        Accelerator(
            kind=kind,
            name=name,
            node=node.path,
            driver=driver,
            may_open=node.may_open,
            group=node.group,
        )
        for path in tree.paths(pattern)
        if (node := tree.node(path)) is not None
    ]


def _usb(tree: Tree) -> list[Accelerator]:
    found = []
    for path in tree.paths("/sys/bus/usb/devices/*/idVendor"):
        folder = path.rpartition("/")[0]
        if (tree.text(path), tree.text(f"{folder}/idProduct")) not in USB_CORAL:
            continue
        bus, number = tree.integer(f"{folder}/busnum"), tree.integer(f"{folder}/devnum")
        if bus is not None and number is not None:
            node = f"/dev/bus/usb/{bus:03}/{number:03}"
            found += _by_node(tree, "coral", "Coral Edge TPU (USB)", node)
    return found


def _vivante(tree: Tree, compatible: tuple[str, ...]) -> list[Accelerator]:
    # One driver for NXP's GPUs and for the NPU, which only the 8M Plus has behind it.
    if "fsl,imx8mp" in compatible:
        return _by_node(tree, "nxp-vip", "NXP VIP NPU and GPU", "/dev/galcore", driver="galcore")
    return _by_node(tree, "gpu", "Vivante GPU", "/dev/galcore", driver="galcore")


def _nvidia(tree: Tree, *, tegra: bool) -> list[Accelerator]:
    if not tegra:
        return _by_node(tree, "nvidia-gpu", "NVIDIA GPU", "/dev/nvidia[0-9]*", driver="nvidia")
    # /dev/nvidia0 on a Jetson is its display; CUDA goes through nvmap and one node per engine.
    found = _by_node(tree, "jetson-gpu", "Jetson GPU", "/dev/nvhost-gpu", driver="nvgpu")
    found += _by_node(tree, "jetson-dla", "Jetson DLA", "/dev/nvhost-ctrl-nvdla*", driver="nvdla")
    return found or _by_node(tree, "jetson-gpu", "Jetson GPU", "/dev/nvmap", driver="nvmap")


def _render(tree: Tree) -> list[Accelerator]:
    found = []
    for path in tree.paths("/dev/dri/renderD*"):
        driver = _driver(tree, f"/sys/class/drm/{path.rpartition('/')[2]}")
        if driver.lower() == "rknpu":
            found += _by_node(tree, "rockchip-npu", "Rockchip NPU", path, driver=driver)
        elif driver in DRIVERS_RENDER:  # others only show pictures: rockchip-drm, vc4-drm
            found += _by_node(tree, "gpu", DRIVERS_RENDER[driver], path, driver=driver)
    return found


def _accel(tree: Tree) -> list[Accelerator]:
    found = []
    for path in tree.paths("/dev/accel/accel*"):
        driver = _driver(tree, f"/sys/class/accel/{path.rpartition('/')[2]}")
        kind, name = DRIVERS_ACCEL.get(driver, ("accel", "unknown accelerator"))
        found += _by_node(tree, kind, name, path, driver=driver)
    return found


def _rockchip(tree: Tree, others: list[Accelerator]) -> list[Accelerator]:
    """The vendor's older node, and an NPU in the device tree that no driver has claimed."""
    found = _by_node(tree, "rockchip-npu", "Rockchip NPU", "/dev/rknpu", driver="RKNPU")
    if found or any(one.kind == "rockchip-npu" for one in others):
        return found
    if tree.paths("/sys/bus/platform/devices/*.npu/uevent"):
        return [
            Accelerator(
                kind="rockchip-npu",
                name="Rockchip NPU",
                node="",
                driver="",
                may_open=False,
                group="",
            )
        ]
    return []
