"""What the CPU kernels' threads share and keep, in C++ and under sanitizers: their barrier, scratch memory, packed
weights."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(command: list[str | Path]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    # Some kernels spread addresses wider than ThreadSanitizer's runtime knows.
    if "unexpected memory mapping" in done.stderr:
        done = subprocess.run(["setarch", "-R", *command], capture_output=True, text=True, timeout=120)
    return done


@pytest.mark.parametrize("sanitizer", ["thread", ""])
def test_no_member_passes_before_all_have_come(tmp_path: Path, sanitizer: str) -> None:
    program = tmp_path / "barrier_race"
    flags = ["-std=c++17", "-O2", "-g", "-fopenmp", *([f"-fsanitize={sanitizer}"] if sanitizer else [])]
    files = [ROOT / "tests/barrier_race.cpp", ROOT / "csrc/cpu/team.cpp"]
    subprocess.run(["c++", *flags, *files, "-o", program], check=True)
    for members, rounds in ((2, 3000), (5, 1000)):
        done = run([program, str(members), str(rounds)])
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_thread_keeps_scratch_memory_up_to_its_bound(tmp_path: Path) -> None:
    program = tmp_path / "scratch_bounds"
    flags = ["-std=c++17", "-O1", "-g", "-pthread", "-fsanitize=address,undefined"]
    files = [ROOT / "tests/scratch_bounds.cpp", ROOT / "csrc/cpu/scratch.cpp"]
    subprocess.run(["c++", *flags, *files, "-o", program], check=True)
    done = run([program])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_what_is_kept_and_when_it_is_packed_again(tmp_path: Path, sanitizer: str) -> None:
    program = tmp_path / "kept_panels"
    flags = ["-std=c++17", "-O1", "-g", "-w", "-pthread", f"-fsanitize={sanitizer}"]
    files = [
        ROOT / "tests/kept_panels.cpp",
        *(ROOT / f"csrc/cpu/{name}.cpp" for name in ("kept_panels", "scratch")),
    ]
    subprocess.run(["c++", *flags, *files, "-o", program], check=True)
    done = run([program])
    assert done.returncode == 0, done.stdout + done.stderr
