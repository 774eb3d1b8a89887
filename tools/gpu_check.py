"""Everything that a machine with a GPU can tell about this tree, in eight minutes at most: `make gpu-check`.

    python3 tools/gpu_check.py [--out FOLDER] [--commit HASH]

From a bare tree, offline, with the Python that runs it: torch (2.11 or newer, for CUDA), nvcc, a C++ compiler, and
the packages setuptools, ninja, numpy, pytest and hypothesis. Nothing is installed; the build stays inside the tree,
where git ignores it. The parts:

    build        the extension, in place, for this machine's GPUs alone
    tests        pytest -m cuda, in up to four processes at once, one for every four cores, and four more for the
                 persistent kernels: one whose kernel fails or never ends can use the GPU no more
    sanitizer    compute-sanitizer's memcheck, racecheck and synccheck at once, over tests/test_cuda_small.py
    benchmark    fused-rnn-bench run --suite core against torch.nn, eager and graph-captured
    benchmark-persistent   the same with --plan persistent, in the dtypes that these kernels have

Each part has its own share of the time, and what it leaves over goes to those after it. A part that fails or runs
out of time stops no other, except that nothing can be said without a build. Exit status 0: every part passed; 1: one
did not; 2: there is no GPU, and nothing was done. The folder then holds summary.md, a log of each part and, for
`fused-rnn-bench report` and `compare`, <gpu>-<date>-<commit>.json and <gpu>-<date>-<commit>-persistent.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOUND_NO_GPU = 2

# `import fused_rnn_bench` from a tree that is not installed: the name of its folder is benchmarks.
IN_TREE = ROOT / "build" / "in-tree"
REPORTS = ROOT / "build" / "test-reports"  # of pytest's processes

DTYPES = "bf16,fp16,tf32,fp32"
# What runs the persistent kernels. The sanitizers run the second.
PERSISTENT_TESTS = ("tests/test_cuda_persistent_gpu.py", "tests/test_cuda_small.py")
# Each of them once, by the strategies in its name: a pair is the grid's, or the cluster's.
STRATEGIES = {
    "block": "block and not cluster and not grid",
    "cluster": "cluster and not grid",
    "grid": "grid",
}
STRATEGIES["others"] = f"not ({' or '.join(STRATEGIES)})"
SANITIZERS = ("memcheck", "racecheck", "synccheck")
# The benchmark's files while it runs, by what is added to the name that they get.
DRAFTS = {"": "benchmark.json", "persistent": "benchmark-persistent.json"}
GRACE = 8.0  # seconds between the request to end and the end
BENCHMARK_MARGIN = 25.0  # seconds for what its own budget does not count: imports, ceilings, the last case

PROBE = """
import json, torch
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
gpus = [torch.cuda.get_device_name(i) for i in range(count)]
print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda, "gpus": gpus}))
"""

Command = list[str]


@dataclass
class Part:
    """A share of the time, in seconds, and the commands that run at once in it, given the seconds that they have."""

    name: str
    share: float
    commands: Callable[[float], dict[str, Command]]  # by a name for the log
    details: Callable[[str], str]  # what the summary says of it, from its log
    environ: dict[str, str]
    needed: bool = False  # by every part after it


@dataclass
class Outcome:
    """How a part ended. `state` is passed, failed, out of time, or not run."""

    name: str
    state: str
    seconds: float = 0.0
    details: str = ""

    @property
    def bad(self) -> bool:
        return self.state in ("failed", "out of time")


# --------------------------------------------------------------------------------------------------- the parts


def parts(out: Path, sanitizer: str | None, commit: str) -> list[Part]:
    """What is done, in order. The shares add up to 470 s; the rest of the eight minutes is for finding the GPU."""
    python = sys.executable
    pytest = [python, "-m", "pytest", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=60"]
    path = (str(ROOT), str(IN_TREE), str(ROOT / "tools"), os.environ.get("PYTHONPATH", ""))
    environ = {"PYTHONPATH": os.pathsep.join(filter(None, path)), "PYTHONUNBUFFERED": "1"}

    def build(_: float) -> dict[str, Command]:
        return {"build": [python, "setup.py", "build_ext", "--inplace"]}

    def tests(_: float) -> dict[str, Command]:
        # A module that needs a package which is not here must not keep the others from being run.
        chosen = [*pytest, "-m", "cuda and not soak", "--continue-on-collection-errors", "--durations=15"]
        number = max(1, min(4, (os.cpu_count() or 1) // 4))
        found = {}
        for k in range(number):
            share = ["-p", "share_of_tests", "--share", f"{k}/{number}"]
            share += [f"--ignore={path}" for path in PERSISTENT_TESTS]
            found[f"tests {k}"] = [*chosen, *share, f"--junitxml={REPORTS / f'{k}.xml'}", "tests"]
        for name, names in STRATEGIES.items():
            share = ["-k", names, f"--junitxml={REPORTS / f'{name}.xml'}"]
            found[f"tests {name}"] = [*chosen, *share, *PERSISTENT_TESTS]
        return found

    def sanitized(_: float) -> dict[str, Command]:
        # Only our kernels are watched. Every instance listens on ports of its own, and gives up if the
        # GPU is not used for too long: three imports of torch at once take their time.
        options = ["--kernel-name", "kns=frnn", "--error-exitcode", "9", "--report-api-errors", "no"]
        options += ["--launch-timeout", "60"]
        small = [*pytest, "-m", "cuda", "tests/test_cuda_small.py"]
        return {
            tool: [str(sanitizer), "--tool", tool, "--port", str(49152 + 20 * i), *options, *small]
            for i, tool in enumerate(SANITIZERS if sanitizer else ())
        }

    def run_bench(seconds: float, draft: str, *more: str) -> dict[str, Command]:
        options = ["--suite", "core", "--device", "cuda", "--graph", "--against", "torch", *more]
        options += ["--effort", "0.02", "--budget", f"{max(seconds - BENCHMARK_MARGIN, 1):.0f}"]
        options += ["--out", str(out / draft)]
        return {"fused-rnn-bench": [python, "-m", "fused_rnn_bench", "run", *options]}

    def benchmark(seconds: float) -> dict[str, Command]:
        return run_bench(seconds, DRAFTS[""], "--dtype", DTYPES)

    def persistent(seconds: float) -> dict[str, Command]:
        return run_bench(seconds, DRAFTS["persistent"], "--dtype", "bf16,fp16,tf32", "--plan", "persistent")

    native = {"FUSED_RNN_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "native"}
    # An allocation for every tensor: the end of each is then an end that memcheck knows.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    stamped = {"FUSED_RNN_COMMIT": commit} if commit else {}
    return [
        Part("build", 100, build, build_details, environ | native, needed=True),
        Part("tests", 150, tests, tests_details, environ),
        Part("sanitizer", 70, sanitized, sanitizer_details, environ | uncached),
        Part("benchmark", 80, benchmark, benchmark_details, environ | stamped),
        Part("benchmark-persistent", 70, persistent, benchmark_details, environ | stamped),
    ]


def last_line(log: str) -> str:
    lines = [line.strip("= ") for line in log.splitlines() if line.strip("= ")]
    return lines[-1][:200] if lines else ""


def build_details(log: str) -> str:
    built = re.search(r"^fused_rnn: built .*", log, re.MULTILINE)
    return built[0] if built else last_line(log)


def tests_details(log: str) -> str:
    """What pytest counted, over all processes."""
    ends = re.findall(r"^(?:=+ )?((?:\d+ \w+(?:, )?)+ in [\d.]+s)", log, re.MULTILINE)
    counts: Counter[str] = Counter()
    for number, what in re.findall(r"(\d+) (\w+)", " ".join(ends)):
        counts[what] += int(number)
    unfinished = len(re.findall(r"^== tests \w+$", log, re.MULTILINE)) - len(ends)
    said = [f"{counts[what]} {what}" for what in counts if what not in ("deselected", "warnings", "warning")]
    return ", ".join(said + [f"{unfinished} processes did not finish"] * (unfinished > 0))


def sanitizer_details(log: str) -> str:
    """How many errors each tool counted; racecheck sums up in words of its own, and counts hazards."""
    found, tool = {}, ""
    summary = r"^== (\w+)$|(?:ERROR|RACECHECK) SUMMARY: (\d+ (?:error|hazard)s?)"
    for name, errors in re.findall(summary, log, re.MULTILINE):
        tool = name or tool
        if errors:
            found[tool] = errors
    return ", ".join(f"{name} {found.get(name, 'did not finish')}" for name in SANITIZERS)


def benchmark_details(log: str) -> str:
    """How far it came, from the line that it prints after each case."""
    cases = re.findall(r"^\[\d+/(\d+)\] .*?: (INVALID|FAILED|left out)?", log, re.MULTILINE)
    if not cases:
        return last_line(log)
    states = [state for _, state in cases]
    wrong, left_out = len(states) - states.count("") - states.count("left out"), states.count("left out")
    return f"{len(states) - left_out} of {cases[0][0]} cases, {wrong} of them wrong"


# --------------------------------------------------------------------------------------------------- running


def run_part(part: Part, out: Path, deadline: float) -> Outcome:
    """Run the commands of a part at once until the deadline (time.monotonic), and keep what they print."""
    started = time.monotonic()
    commands = part.commands(deadline - started)
    with contextlib.ExitStack() as stack:
        logs, running = {}, {}
        for name, command in commands.items():
            logs[name] = stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
            try:
                running[name] = subprocess.Popen(
                    command, cwd=ROOT, env={**os.environ, **part.environ}, stdin=subprocess.DEVNULL,
                    stdout=logs[name], stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                logs[name].write(f"{command[0]}: {error}\n")
        try:
            in_time = wait(list(running.values()), deadline)
        finally:
            end(list(running.values()))
        log = ""
        for name, file in logs.items():
            file.seek(0)
            log += f"== {name}\n{file.read()}"
    (out / f"{part.name}.log").write_text(log)
    good = len(running) == len(commands) and all(process.returncode == 0 for process in running.values())
    state = "out of time" if not in_time else "passed" if good else "failed"
    return Outcome(part.name, state, time.monotonic() - started, part.details(log))


def wait(processes: Sequence[subprocess.Popen], deadline: float) -> bool:
    """Whether all of them ended in time. Those that are late are asked to stop, so that they save what they have."""
    for process in processes:
        try:
            process.wait(max(deadline - GRACE - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            break
    else:
        return True
    send(processes, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        for process in processes:
            process.wait(max(deadline - time.monotonic(), 0))
    return False


def end(processes: Sequence[subprocess.Popen]) -> None:
    """Nothing of a part outlives it, children of its children neither."""
    send(processes, signal.SIGKILL)
    for process in processes:
        process.wait()


def send(processes: Sequence[subprocess.Popen], which: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, which)


def run_all(todo: Sequence[Part], out: Path, say: Callable[[str], None] = print) -> list[Outcome]:
    """Every part, each until the end of its share of the time."""
    outcomes: list[Outcome] = []
    missing = ""
    deadline = time.monotonic()
    for part in todo:
        deadline += part.share
        if missing:
            outcome = Outcome(part.name, "not run", details=f"it needs the {missing}")
        elif not part.commands(part.share):
            outcome = Outcome(part.name, "not run", details="its tool is not on this machine")
        else:
            say(f"gpu-check: {part.name}, until {deadline - time.monotonic():.0f} s from now")
            outcome = run_part(part, out, deadline)
        say(f"gpu-check: {part.name}: {outcome.state}. {outcome.details}")
        if part.needed and outcome.bad:
            missing = part.name
        outcomes.append(outcome)
    return outcomes


# --------------------------------------------------------------------------------------------------- the result


def keep_results(out: Path, added: str = "") -> Path | None:
    """Give a file of the benchmark its lasting name, <gpu>-<date>-<commit>.json, or the same with what is `added`."""
    draft = out / DRAFTS[added]
    try:
        environment = json.loads(draft.read_text())["environment"]
    except (OSError, ValueError, KeyError):
        return None
    commit = environment["commit"].rstrip("+")[:7] + "-modified" * environment["commit"].endswith("+")
    name = "-".join((environment["device_name"], environment["date"][:10], commit, added))
    return draft.rename(out / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json"))


def failed_tests() -> list[str]:
    """By the reports of pytest's processes."""
    failed = []
    for report in sorted(REPORTS.glob("*.xml")):
        with contextlib.suppress(ElementTree.ParseError):
            for case in ElementTree.parse(report).iter("testcase"):
                if {child.tag for child in case} & {"failure", "error"}:
                    failed.append(f"{case.get('classname')}::{case.get('name')}")
    return failed


def speedups(chosen: Path | None, forced: Path | None) -> str:
    """The benchmarks' tables, by the benchmark's own hand: the means of both, and case by case which is faster."""
    sys.path.insert(0, str(IN_TREE))
    from fused_rnn_bench.markdown import markdown_table
    from fused_rnn_bench.results import load
    from fused_rnn_bench.tables import environment_line, mean_table, plan_table

    pages = []
    for heading, path in (("", chosen), (", with `--plan persistent`", forced)):
        if path:
            results = load(path)
            pages += [f"## Speed-up against torch.nn{heading}", environment_line(results)]
            pages.append(markdown_table(mean_table(results)))
    if chosen and forced:
        table = plan_table(load(chosen), load(forced))
        pages += [f"## {table.title}", markdown_table(table)]
    return "\n\n".join(pages)


def outcome_table(outcomes: Sequence[Outcome]) -> str:
    rows = [("part", "result", "s", "details"), ("---", "---", "---:", "---")]
    rows += [(o.name, o.state, f"{o.seconds:.0f}", o.details.replace("|", "\\|")) for o in outcomes]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def summary(machine: dict, outcomes: Sequence[Outcome], failed: Sequence[str], tables: str) -> str:
    """One page, and the table of cases."""
    pages = [
        "# gpu-check",
        f"{', '.join(machine['gpus'])}; torch {machine['torch']}, CUDA {machine['cuda']}",
        outcome_table(outcomes),
    ]
    if failed:
        more = [f"and {len(failed) - 20} more, in tests.log"] if len(failed) > 20 else []
        pages.append("Failed tests:\n\n" + "\n".join(f"- {name}" for name in (*failed[:20], *more)))
    if tables:
        pages.append(tables)
    return "\n\n".join(pages) + "\n"


# --------------------------------------------------------------------------------------------------- the command


def probe() -> dict:
    """What torch sees here. In another process: a context of its own on the GPU would disturb what follows."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode:
        raise SystemExit(f"gpu-check: torch cannot be imported by {sys.executable}:\n{done.stderr[-1000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def find_sanitizer() -> str | None:
    nvcc = shutil.which("nvcc")
    homes = [
        os.environ.get("CUDA_HOME"),
        str(Path(nvcc).resolve().parent.parent) if nvcc else None,
        "/usr/local/cuda",
    ]
    folders = [str(Path(home, folder)) for home in homes if home for folder in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer", path=os.pathsep.join((os.environ.get("PATH", ""), *folders)))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu-check", metavar="FOLDER")
    parser.add_argument("--commit", default="", help="the commit of a tree that came without its .git")
    options = parser.parse_args(arguments)
    machine = probe()
    if not machine["gpus"]:
        why = "is built without CUDA" if machine["cuda"] is None else f"for CUDA {machine['cuda']} finds none"
        told = f"gpu-check: there is no GPU here: torch {machine['torch']} {why}. Nothing was done."
        print(told, file=sys.stderr)
        return FOUND_NO_GPU
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for draft in DRAFTS.values():
        (out / draft).unlink(missing_ok=True)
    shutil.rmtree(REPORTS, ignore_errors=True)
    IN_TREE.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        (IN_TREE / "fused_rnn_bench").symlink_to(os.path.relpath(ROOT / "benchmarks", IN_TREE))
    # As of a shell's background job; children would inherit it.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    outcomes = run_all(parts(out, find_sanitizer(), options.commit), out)
    tables = speedups(*(keep_results(out, added) for added in DRAFTS))
    text = summary(machine, outcomes, failed_tests(), tables)
    (out / "summary.md").write_text(text)
    print(f"\n{text}\nin {out}", flush=True)
    return 1 if any(outcome.bad for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
