"""Read the CPUs of a machine: model, clusters, and the instructions that inference gains from.

Only instructions that every CPU has count: a thread may land on any of them.

Source: kernel documentation, arch/arm64/elf_hwcaps.rst (names in /proc/cpuinfo); x86-64 psABI,
section "Micro-Architecture Levels"; Arm and vendor manuals (MIDR part numbers).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from .cgroup import CPUS_MAX, read_cpus
from .tree import Tree

CPUINFO_BYTES_MAX = 4 << 20  # 256 CPUs of an x86 server write 0.4 MB
FOLDER = "/sys/devices/system/cpu"

# Names here are ours, one per ability, whichever architecture calls it what.
ISA_X86 = {
    "sse4_2": "sse4.2",
    "avx": "avx",
    "f16c": "f16c",
    "fma": "fma",
    "avx2": "avx2",
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512dq": "avx512dq",
    "avx512vl": "avx512vl",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "avx512_fp16": "avx512_fp16",
    "avx_vnni": "avx_vnni",
    "avx_vnni_int8": "avx_vnni_int8",
    "amx_tile": "amx_tile",
    "amx_int8": "amx_int8",
    "amx_bf16": "amx_bf16",
}
ISA_ARM = {
    "neon": "neon",  # 32-bit kernels; 64-bit ones say asimd
    "asimd": "asimd",
    "asimdhp": "fp16",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
    "sve2": "sve2",
    "sme": "sme",
    "sme2": "sme2",
}
LEVELS_X86 = (
    ("lm", "cmov", "cx8", "fpu", "fxsr", "mmx", "syscall", "sse", "sse2"),
    ("cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"),
    # LZCNT shows as abm, OSXSAVE as xsave: the kernel clears xsave when it does not use it.
    ("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"),
    ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
)
PARTS_ARM = {
    (0x41, 0xC07): "Cortex-A7",
    (0x41, 0xC09): "Cortex-A9",
    (0x41, 0xC0F): "Cortex-A15",
    (0x41, 0xD01): "Cortex-A32",
    (0x41, 0xD02): "Cortex-A34",
    (0x41, 0xD03): "Cortex-A53",
    (0x41, 0xD04): "Cortex-A35",
    (0x41, 0xD05): "Cortex-A55",
    (0x41, 0xD06): "Cortex-A65",
    (0x41, 0xD07): "Cortex-A57",
    (0x41, 0xD08): "Cortex-A72",
    (0x41, 0xD09): "Cortex-A73",
    (0x41, 0xD0A): "Cortex-A75",
    (0x41, 0xD0B): "Cortex-A76",
    (0x41, 0xD0C): "Neoverse-N1",
    (0x41, 0xD0D): "Cortex-A77",
    (0x41, 0xD0E): "Cortex-A76AE",
    (0x41, 0xD40): "Neoverse-V1",
    (0x41, 0xD41): "Cortex-A78",
    (0x41, 0xD42): "Cortex-A78AE",
    (0x41, 0xD44): "Cortex-X1",
    (0x41, 0xD46): "Cortex-A510",
    (0x41, 0xD47): "Cortex-A710",
    (0x41, 0xD48): "Cortex-X2",
    (0x41, 0xD49): "Neoverse-N2",
    (0x41, 0xD4B): "Cortex-A78C",
    (0x41, 0xD4D): "Cortex-A715",
    (0x41, 0xD4E): "Cortex-X3",
    (0x41, 0xD4F): "Neoverse-V2",
    (0x41, 0xD80): "Cortex-A520",
    (0x41, 0xD81): "Cortex-A720",
    (0x41, 0xD82): "Cortex-X4",
    (0x41, 0xD84): "Neoverse-V3",
    (0x4E, 0x003): "Denver 2",
    (0x4E, 0x004): "Carmel",
    (0x51, 0x001): "Oryon",
    (0x51, 0x800): "Kryo 2xx Gold",
    (0x51, 0x801): "Kryo 2xx Silver",
    (0x51, 0x802): "Kryo 3xx Gold",
    (0x51, 0x803): "Kryo 3xx Silver",
    (0x51, 0x804): "Kryo 4xx Gold",
    (0x51, 0x805): "Kryo 4xx Silver",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """CPUs that are alike."""

    model: str
    """"Cortex-A76", or what the CPU calls itself; empty if it does not say."""
    cpus: tuple[int, ...]
    """Numbers of the online CPUs, ascending."""
    freq_mhz_max: int | None
    """What the hardware allows, in MHz; None if the kernel does not scale this CPU."""
    capacity: int | None
    """Speed against the machine's fastest CPU, 1024 at most; None if the kernel does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpus:
    """All CPUs of a machine."""

    clusters: tuple[Cluster, ...]
    """The fastest first."""
    online: tuple[int, ...]
    possible_count: int
    """CPUs that the kernel could bring up; at least those online."""
    isa: tuple[str, ...]
    """Abilities of every CPU, sorted; names are the values of ISA_X86 and ISA_ARM."""
    x86_level: int
    """Micro-architecture level 1 to 4; 0 if this is not x86-64."""


def read_cpus_all(tree: Tree) -> Cpus:
    """Read the CPUs; a machine that tells nothing has one CPU without a name."""
    blocks = _blocks(tree.text("/proc/cpuinfo", bytes_max=CPUINFO_BYTES_MAX) or "")
    online = read_cpus(tree, f"{FOLDER}/online") or tuple(sorted(blocks)) or (0,)
    flags = [_flags(block) for block in blocks.values()]
    common = frozenset.intersection(*flags) if flags else frozenset()
    isa = {**ISA_X86, **ISA_ARM}
    return Cpus(
        clusters=_clusters(tree, blocks, online),
        online=online,
        possible_count=max(len(read_cpus(tree, f"{FOLDER}/possible")), len(online)),
        isa=tuple(sorted({isa[flag] for flag in common & isa.keys()})),
        x86_level=_level(common),
    )


def machine(tree: Tree) -> str | None:
    """Guess the architecture from /proc/cpuinfo: kernels before 6.1 write it nowhere else."""
    blocks = _blocks(tree.text("/proc/cpuinfo", bytes_max=CPUINFO_BYTES_MAX) or "")
    block = next(iter(blocks.values()), {})
    flags = _flags(block)
    if "flags" in block:
        return "x86_64" if "lm" in flags else "i686"
    if "isa" in block:
        return "riscv64" if block["isa"].startswith("rv64") else "riscv32"
    if "CPU implementer" in block:
        return "aarch64" if "asimd" in flags else "armv7l"
    return None


def _blocks(text: str) -> dict[int, dict[str, str]]:
    """Processor blocks of /proc/cpuinfo by number."""
    found: dict[int, dict[str, str]] = {}
    block: dict[str, str] = {}
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        name, value = name.strip(), value.strip()
        if name == "processor" and value.isdecimal() and int(value[:9]) < CPUS_MAX:
            block = found.setdefault(int(value[:9]), {})
        elif not line.strip():
            block = {}  # what follows the last CPU is of the board: Hardware, Revision, Serial
        elif colon:
            block.setdefault(name, value)
    return found


def _flags(block: dict[str, str]) -> frozenset[str]:
    return frozenset((block.get("flags") or block.get("Features") or "").split())


def _level(flags: frozenset[str]) -> int:
    level = 0
    for needed in LEVELS_X86:
        if not flags.issuperset(needed):
            break
        level += 1
    return level


def _model(block: dict[str, str]) -> str:
    try:
        part = (int(block["CPU implementer"], 16), int(block["CPU part"], 16))
    except (KeyError, ValueError):
        # Arm 32-bit kernels give "ARMv7 Processor rev 3 (v7l)" here, so the part comes first.
        return block.get("model name") or block.get("uarch") or block.get("cpu model") or ""
    return PARTS_ARM.get(part, f"Arm part {part[0]:#04x}:{part[1]:#05x}")


def _clusters(
    tree: Tree, blocks: dict[int, dict[str, str]], online: tuple[int, ...]
) -> tuple[Cluster, ...]:
    alike: dict[tuple[str, int | None, int | None], list[int]] = {}
    for cpu in online:
        freq_khz = tree.integer(f"{FOLDER}/cpu{cpu}/cpufreq/cpuinfo_max_freq")
        if freq_khz is not None and not 0 < freq_khz < 100_000_000:
            tree.broken(f"{FOLDER}/cpu{cpu}/cpufreq/cpuinfo_max_freq", "implausible")
            freq_khz = None
        capacity = tree.integer(f"{FOLDER}/cpu{cpu}/cpu_capacity")
        key = (
            _model(blocks.get(cpu, {})),
            None if freq_khz is None else round(freq_khz / 1000),
            capacity if capacity is not None and 0 < capacity <= 1024 else None,
        )
        alike.setdefault(key, []).append(cpu)
    found = [
        Cluster(model=model, cpus=tuple(cpus), freq_mhz_max=freq, capacity=capacity)
        for (model, freq, capacity), cpus in alike.items()
    ]
    return tuple(sorted(found, key=lambda one: (-(one.capacity or 0), -(one.freq_mhz_max or 0))))


def summary(clusters: tuple[Cluster, ...]) -> str:
    """Name the CPUs in a line, e.g. "4 × Cortex-A76 + 4 × Cortex-A55"."""
    counts: Counter[str] = Counter()
    for cluster in clusters:
        counts[cluster.model or "unknown CPU"] += len(cluster.cpus)
    return " + ".join(f"{count} × {model}" for model, count in counts.items())
