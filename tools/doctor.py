"""Says what a machine or an environment lacks before a build starts, and how to get it.

    python3 tools/doctor.py machine       by the system's Python: what making .venv and compiling need
    python tools/doctor.py environment    by an environment's Python: what building and testing in it need

Exit status 1 and one line for each thing missing. The syntax is such that a Python that is too old can
still read the file, and say so.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

OLDEST_PYTHON = (3, 10)
OLDEST_TORCH = (2, 11)
OLDEST_GCC = 10  # the first with the C++20 that torch's headers are written in
TOOLS = ("setuptools", "ninja", "packaging", "pytest", "hypothesis", "numpy", "rich", "matplotlib")
VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"


def compiler_problems():
    problems = []
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        problems.append("no C++ compiler: sudo apt install g++")
    else:
        answer = subprocess.run([compiler, "-dumpfullversion"], capture_output=True, text=True, check=False)
        major = re.match(r"(\d+)\.", answer.stdout)
        if major and int(major.group(1)) < OLDEST_GCC:
            problems.append(f"g++ {OLDEST_GCC} or newer is needed, this is {answer.stdout.strip()}")
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        problems.append(f"Python's C headers are missing ({header}): sudo apt install python{VERSION}-dev")
    return problems


def venv_problems():
    if importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip"):
        return []
    return [
        f"this Python cannot make virtual environments: sudo apt install python{VERSION}-venv"
        " (or use an environment you have: make VENV=path ...)"
    ]


def torch_problems():
    try:
        import torch
    except ImportError as error:
        return [f"torch cannot be imported in {sys.prefix}: {error}"]
    if tuple(int(word) for word in re.findall(r"\d+", torch.__version__)[:2]) < OLDEST_TORCH:
        return [f"torch 2.11 or newer is needed, this is {torch.__version__}"]
    return []


def package_problems():
    missing = [name for name in TOOLS if importlib.util.find_spec(name) is None]
    if not missing:
        return []
    return [f"Python packages are missing: {sys.executable} -m pip install {' '.join(missing)}"]


CHECKS = {
    "machine": (compiler_problems, venv_problems),
    "environment": (compiler_problems, torch_problems, package_problems),
}


def main():
    if len(sys.argv) != 2 or sys.argv[1] not in CHECKS:
        raise SystemExit(f"usage: doctor.py {'|'.join(CHECKS)}")
    if sys.version_info[:2] < OLDEST_PYTHON:
        raise SystemExit(
            f"fused_rnn: Python 3.10 or newer is needed, this is {VERSION} (another: make PYTHON=python3.12)"
        )
    problems = [problem for check in CHECKS[sys.argv[1]] for problem in check()]
    for problem in problems:
        print(f"fused_rnn: {problem}", file=sys.stderr)
    raise SystemExit(1 if problems else 0)


if __name__ == "__main__":
    main()
