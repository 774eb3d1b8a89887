"""The CUDA code inside the built extension, read with NVIDIA's own tools: no GPU is needed.

For every architecture that it was compiled for: each kernel is there, keeps its numbers in registers, and holds the
instructions that it was written for.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest
from test_build import ROOT, tools

from fused_rnn import _C

BINARY = Path(_C.__file__)
ARCHS = tuple(name.removeprefix("sm_") for name in _C.cuda_archs() if name.startswith("sm_"))

# What a template argument may be, as C++ spells it.
CELLS = ("Rnn<Tanh>", "Rnn<Relu>", "Gru", "Lstm")
NUMBERS = ("float", "double", "Half", "BFloat16")
EXACT = "Exact"  # float32 in kernels of its own, where plain float is multiplied in TF32
EXCHANGES = ("block", "cluster", "grid")  # in the order of enum Exchange

# The numbers that a kernel takes, where they are not all of these.
TAKES: dict[str, tuple[str, ...]] = {
    "persistent_forward_kernel": ("float", EXACT, "Half", "BFloat16"),
    "persistent_backward_kernel": ("float", EXACT, "Half", "BFloat16"),
}

# Disassembling takes seconds an architecture. Which instruction is chosen differs between generations, so the oldest of
# each that was built, and the newest of all, stand for all.
OLDEST = {tools.Arch(arch).generation: arch for arch in reversed(ARCHS)}
READ = tuple(dict.fromkeys((*reversed(OLDEST.values()), *ARCHS[-1:])))


class Promise(NamedTuple):
    """Of the kernels whose name matches: instructions that each of them holds, and instructions that none does."""

    kernel: str
    holds: tuple[str, ...]
    never: tuple[str, ...] = ()
    since: int = 75  # the first architecture
    until: int = 999  # the first on which there is none


TENSOR = (r"HMMA", r"LDSM")
SCALAR = (r"FFMA", r"SHFL\.BFLY")
# Where there are which tiles, `since` and `until`: tile_exists in csrc/cuda/persistent.h.
EXACT_TILES = (("1, block", (80,)), ("4, cluster", (90,)), ("8, grid", (80,)))
TILES = (*EXACT_TILES, ("2, cluster", (90,)), ("[24], grid", (80, 90)))

PROMISES = (
    # a thread's vector is loaded and stored by one instruction each (the byte is `reset`)
    Promise(
        r"step_(forward|backward)_kernel<.*, [24], (float|double)>",
        (r"LDG\.E\.128", r"STG\.E\.128"),
        (r"LDG\.E(?!\.128|\.U8)", r"STG\.E(?!\.128)"),
    ),
    Promise(
        r"step_(forward|backward)_kernel<.*, 4, (Half|BFloat16)>",
        (r"LDG\.E\.128", r"STG\.E\.64"),
        (r"LDG\.E(?!\.128|\.64|\.U8)", r"STG\.E(?!\.128|\.64)"),
    ),
    # products on tensor cores, unless they must be exact
    *(
        Promise(rf"persistent_\w+_kernel<.*, (float|Half|BFloat16), {tile}>", TENSOR, (), *archs)
        for tile, archs in TILES
    ),
    *(
        Promise(rf"persistent_\w+_kernel<.*, Exact, {tile}>", SCALAR, TENSOR, *archs)
        for tile, archs in EXACT_TILES
    ),
    # the weights, whatever their dtype
    Promise(r"step_fused_kernel<.*>", (r"LDG\.E\.128",)),
)


# Sigmoids and tanhs of a unit, forward and backward: kExponentials and kGradExponentials in csrc/cells.
EXPONENTIALS = {"Lstm": (5, 1), "Gru": (3, 0), "Rnn<Tanh>": (1, 0), "Rnn<Relu>": (0, 0)}


def find_cuobjdump() -> Path | None:
    """The toolkit's, or that of NVIDIA's wheels (requirements.txt). It needs nvdisasm beside it."""
    toolkit = tools.find_toolkit(os.environ)
    candidates = [toolkit.home / "bin" / "cuobjdump"] if toolkit else []
    try:
        files = metadata.files("nvidia-cuda-cuobjdump") or []
    except metadata.PackageNotFoundError:
        files = []
    candidates += [Path(file.locate()) for file in files if file.name == "cuobjdump"]
    for path in candidates:
        if os.access(path, os.X_OK) and os.access(path.with_name("nvdisasm"), os.X_OK):
            return path
    return None


CUOBJDUMP = find_cuobjdump()
pytestmark = [
    pytest.mark.skipif(
        not ARCHS, reason="this build has no CUDA code: no nvcc was found, or FUSED_RNN_CUDA=0"
    ),
    pytest.mark.skipif(
        CUOBJDUMP is None, reason="needs cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
    ),
]


def output(*command: str | Path, text: str | None = None) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr[-2000:]}"
    return done.stdout


@cache
def readable() -> dict[str, str]:
    """Mangled name -> name of every kernel, without its arguments and the project's namespaces."""
    mangled = sorted({name for _, name in resources()})
    assert shutil.which("c++filt"), "c++filt comes with every C++ compiler"
    names = output("c++filt", text="\n".join(mangled)).splitlines()
    named = (re.sub(r"\(frnn::Exchange\)(\d)", lambda it: EXCHANGES[int(it[1])], name) for name in names)
    short = (re.sub(r"\(.*|^void |\bfrnn::|\bscalar::", "", name) for name in named)
    return dict(zip(mangled, short, strict=True))


@cache
def resources() -> dict[tuple[str, str], dict[str, int]]:
    """(architecture, mangled name) -> REG, STACK, LOCAL, ... of every kernel."""
    found, arch, kernel = {}, "", ""
    for line in output(CUOBJDUMP, "--dump-resource-usage", BINARY).splitlines():
        if match := re.match(r"arch = sm_(\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\w+):", line):
            kernel = match[1]
        elif "REG:" in line:
            found[arch, kernel] = {name: int(n) for name, n in re.findall(r"(\w+(?:\[\d+\])?):(\d+)", line)}
    return found


@cache
def launch_bounds() -> dict[tuple[str, str], int]:
    """(architecture, mangled name) -> threads a block that the kernel was compiled for, where it says so."""
    found, arch, kernel, at_bound = {}, "", "", False
    for line in output(CUOBJDUMP, "--dump-elf", BINARY).splitlines():
        if match := re.match(r"arch = sm_(\w+)", line):
            arch = match[1]
        elif line.startswith(".nv.info."):
            kernel = line.removeprefix(".nv.info.").strip()
        elif "Attribute:" in line:
            at_bound = "EIATTR_MAX_THREADS" in line
        elif at_bound and "Value:" in line:
            x, y, z = (int(word, 16) for word in line.split()[1:])
            found[arch, kernel] = x * y * z
    return found


def disassemble(arch: str) -> dict[str, Counter[str]]:
    """Name -> the instructions of every kernel, without their operands, and how often it has each."""
    found, kernel = defaultdict(Counter), ""
    for line in output(CUOBJDUMP, "--dump-sass", "--gpu-architecture", f"sm_{arch}", BINARY).splitlines():
        if match := re.match(r"\s*Function : (\w+)", line):
            kernel = readable()[match[1]]
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([A-Z][\w.]+)", line):
            found[kernel][match[1]] += 1
    return dict(found)


@cache
def instructions() -> dict[str, dict[str, Counter[str]]]:
    readable()
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(READ, pool.map(disassemble, READ), strict=True))


def kernels(arch: str) -> set[str]:
    return {readable()[kernel] for its, kernel in resources() if its == arch}


def base(kernel: str) -> str:
    return kernel.partition("<")[0]


def test_every_architecture_has_every_kernel_of_the_sources():
    code = "".join(
        re.sub(r"//.*", "", path.read_text())
        for path in (ROOT / "csrc" / "cuda").iterdir()
        if path.suffix in (".cu", ".cuh")
    )
    written = set(re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\(", code))
    assert len(written) == code.count("__global__") > 0
    assert {arch for arch, _ in resources()} == set(ARCHS)
    for arch in ARCHS:
        assert {base(kernel) for kernel in kernels(arch)} == written, arch
        assert kernels(arch) == kernels(ARCHS[0]), arch


def test_every_kernel_takes_every_cell_and_every_dtype():
    takes = defaultdict(set)
    for kernel in kernels(ARCHS[0]):
        cells = [cell for cell in CELLS if re.search(rf"\b{re.escape(cell)}[,>]", kernel)]
        numbers = [number for number in (*NUMBERS, EXACT) if re.search(rf"\b{number}[,>]", kernel)]
        assert len(cells) <= 1 and len(numbers) <= 1, kernel
        if numbers:  # offsets_kernel knows integers alone
            takes[base(kernel)].add((*cells, *numbers))
    for name, taken in takes.items():
        of_a_cell = any(len(arguments) == 2 for arguments in taken)
        numbers = TAKES.get(name, NUMBERS)
        wanted = set(itertools.product(CELLS, numbers) if of_a_cell else itertools.product(numbers))
        assert taken == wanted, f"{name} lacks {sorted(wanted - taken)}"


def test_nothing_is_spilled():
    """A stack frame holds spilled registers, and arrays whose index the compiler could not resolve."""
    stacks = {
        f"sm_{arch} {readable()[kernel]}": used["STACK"] + used["LOCAL"]
        for (arch, kernel), used in resources().items()
        if used["STACK"] or used["LOCAL"]
    }
    assert not stacks, "\n".join(f"{kernel}: {used} bytes" for kernel, used in sorted(stacks.items()))


def test_a_block_finds_its_registers():
    """65536 on every multiprocessor, given out to a warp in lots of 8 a thread. A kernel that does not say how many
    threads it is started with may be started with 1024."""
    for (arch, kernel), used in resources().items():
        threads = launch_bounds().get((arch, kernel), 1024)
        registers = -(-used["REG"] // 8) * 8
        assert registers * threads <= 65536, (
            f"sm_{arch} {readable()[kernel]}: {registers} of {threads} threads"
        )


def has_tile(arch: int, numbers: str, k_groups: int, exchange: str) -> bool:
    """tile_exists in csrc/cuda/persistent.h."""
    if arch < 80 or k_groups == 1 or exchange == "block":
        return arch >= 80 and k_groups == 1 and exchange == "block"
    if numbers == EXACT and k_groups != (4 if exchange == "cluster" else 8):
        return False
    return exchange == ("cluster" if arch >= 90 and k_groups < 8 else "grid")


def test_a_kernel_that_an_architecture_lacks_takes_no_launch():
    """By its bound on the threads of a block the host knows it, whatever the GPU: kBlockThreads in persistent.cuh."""
    counts = Counter()
    for (arch, kernel), threads in launch_bounds().items():
        if match := re.fullmatch(r"persistent_\w+_kernel<.*, (\w+), (\d), (\w+)>", readable()[kernel]):
            there = has_tile(tools.Arch(arch).number, match[1], int(match[2]), match[3])
            counts[there] += 1
            assert threads == (256 if there else 32), f"sm_{arch} {readable()[kernel]}"
    assert counts[True] and counts[False]


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.kernel)
def test_kernels_hold_the_instructions_that_they_were_written_for(promise):
    for arch in READ:
        if not promise.since <= tools.Arch(arch).number < promise.until:
            continue
        chosen = {
            name: held for name, held in instructions()[arch].items() if re.fullmatch(promise.kernel, name)
        }
        assert chosen, f"no kernel is called {promise.kernel}"
        broken = []
        for name, held in sorted(chosen.items()):
            missing = [wanted for wanted in promise.holds if not any(re.match(wanted, word) for word in held)]
            wrong = [word for word in sorted(held) if any(re.match(never, word) for never in promise.never)]
            if missing or wrong:
                broken.append(f"sm_{arch} {name}: lacks {missing}, has {wrong}")
        assert not broken, "\n".join(broken)


@pytest.mark.parametrize("cell", CELLS)
def test_a_sigmoid_or_tanh_of_a_persistent_kernel_is_an_exponential_and_a_reciprocal(cell):
    """What csrc/cuda/cost.cpp takes for granted, for all numbers. A thread has two pairs of units; one reciprocal more
    is that of a division of integers, which finds the replica of a block."""
    for arch in READ:
        seen = set()
        for name, held in instructions()[arch].items():
            match = re.fullmatch(rf"persistent_(forward|backward)_kernel<{re.escape(cell)}, .*>", name)
            if not match or not any(word.startswith(("HMMA", "FFMA")) for word in held):
                continue  # not a kernel of this architecture: it traps
            seen.add(match[1])
            wanted = 4 * EXPONENTIALS[cell][match[1] == "backward"]
            specials = Counter({word: held[word] for word in held if word.startswith("MUFU")})
            assert specials == Counter({"MUFU.EX2": wanted, "MUFU.RCP": wanted + 1}), f"sm_{arch} {name}"
        assert seen == ({"forward", "backward"} if tools.Arch(arch).number >= 80 else set())
