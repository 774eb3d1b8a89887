"""The driver of `make gpu-check`, with stand-ins for its parts: on a machine without a GPU nothing else of it runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fused_rnn_bench import cli
from fused_rnn_bench.results import OURS
from test_bench_files import some_results, timed
from test_build import ROOT, load_tool

gpu_check = load_tool("gpu_check")

# Long enough that a test which waits for it has failed, whatever the machine is busy with.
FOREVER = 60

PASSES = "print('all is well')"
FAILS = "print('a kernel is wrong'); raise SystemExit(3)"
HANGS = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep({FOREVER})"])
print("child", child.pid, flush=True)
time.sleep({FOREVER})
"""
LATE = f"""
import time
try:
    print("begun", flush=True)
    time.sleep({FOREVER})
except KeyboardInterrupt:
    print("saved what there was")
"""


@pytest.fixture(autouse=True)
def _little_grace(monkeypatch):
    monkeypatch.setattr(gpu_check, "GRACE", 1.0)


class Stage:
    """Builds parts from scripts, and remembers how long each was told that it has."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def part(self, name: str, share: float, *scripts: str, needed: bool = False):
        def commands(seconds: float):
            self.seconds[name] = seconds
            return {f"{name}{i}": [sys.executable, "-c", script] for i, script in enumerate(scripts)}

        return gpu_check.Part(name, share, commands, gpu_check.last_line, {}, needed)


def run(out: Path, *parts) -> dict[str, tuple[str, str]]:
    return {o.name: (o.state, o.details) for o in gpu_check.run_all(parts, out, say=lambda _: None)}


def alive(pid: int) -> bool:
    """Whether a process still runs; one that has ended and that nobody has asked about is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_part_that_fails_or_hangs_stops_no_other(tmp_path):
    stage = Stage()
    started = time.monotonic()
    outcomes = run(
        tmp_path,
        stage.part("build", FOREVER, PASSES, needed=True),
        stage.part("tests", 1, FAILS),
        stage.part("sanitizer", 3 - FOREVER, HANGS),
        stage.part("benchmark", FOREVER, PASSES),
    )
    assert time.monotonic() - started < FOREVER
    assert outcomes["build"] == ("passed", "all is well")
    assert outcomes["tests"] == ("failed", "a kernel is wrong")
    assert outcomes["sanitizer"][0] == "out of time"
    assert outcomes["benchmark"] == ("passed", "all is well")
    (child,) = re.findall(r"child (\d+)", (tmp_path / "sanitizer.log").read_text())
    assert not alive(int(child)), "what a part has started ends with it"


def test_a_part_has_its_share_and_what_was_left_over(tmp_path):
    stage = Stage()
    run(
        tmp_path,
        stage.part("build", 40, PASSES),
        stage.part("tests", -39, HANGS),
        stage.part("benchmark", 50, PASSES),
    )
    assert 40 >= stage.seconds["build"] > 39
    assert stage.seconds["tests"] <= 1
    assert 51 >= stage.seconds["benchmark"] > 40, "what hung before it took nothing"
    run(tmp_path, stage.part("build", 40, PASSES), stage.part("tests", 50, PASSES))
    assert 90 >= stage.seconds["tests"] > 50, "what the build left over"


def test_a_part_out_of_time_is_asked_to_stop_before_it_is_made_to(monkeypatch):
    monkeypatch.setattr(gpu_check, "GRACE", FOREVER)
    command = [sys.executable, "-c", LATE]
    late = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert late.stdout.readline() == "begun\n"
    assert not gpu_check.wait([late], time.monotonic() + FOREVER)
    assert late.communicate() == ("saved what there was\n", None) and late.returncode == 0


def test_without_a_build_nothing_else_runs(tmp_path):
    stage = Stage()
    outcomes = run(tmp_path, stage.part("build", 20, FAILS, needed=True), stage.part("tests", 20, PASSES))
    assert outcomes == {"build": ("failed", "a kernel is wrong"), "tests": ("not run", "it needs the build")}
    assert not (tmp_path / "tests.log").exists()


def test_a_tool_that_is_not_there_is_no_failure(tmp_path):
    outcomes = gpu_check.run_all([Stage().part("sanitizer", 20)], tmp_path, say=lambda _: None)
    assert [(o.state, o.bad) for o in outcomes] == [("not run", False)]


def test_a_command_that_cannot_start_is_a_failure(tmp_path):
    part = gpu_check.Part("tests", 20, lambda _: {"pytest": ["/no/such/tool"]}, gpu_check.last_line, {})
    (outcome,) = gpu_check.run_all([part], tmp_path, say=lambda _: None)
    assert outcome.state == "failed" and "/no/such/tool" in outcome.details


def test_commands_of_a_part_run_at_once_and_share_a_log(tmp_path):
    meet = "import pathlib, time\npathlib.Path({0!r}).touch()\nwhile not pathlib.Path({1!r}).exists(): time.sleep(0.01)"
    left, right = str(tmp_path / "left"), str(tmp_path / "right")
    scripts = [meet.format(left, right) + "\nprint('left')", meet.format(right, left) + "\nprint('right')"]
    assert run(tmp_path, Stage().part("sanitizer", FOREVER, *scripts))["sanitizer"][0] == "passed"
    assert (tmp_path / "sanitizer.log").read_text() == "== sanitizer0\nleft\n== sanitizer1\nright\n"


# ------------------------------------------------------------------------------------------------- real parts


def real_parts(tmp_path: Path, commit: str = "0123abc") -> dict:
    found = gpu_check.parts(tmp_path, "/usr/bin/compute-sanitizer", commit)
    return {part.name: part for part in found}


def test_the_shares_fit_into_eight_minutes(tmp_path):
    assert sum(part.share for part in real_parts(tmp_path).values()) <= 8 * 60 - 10


def test_the_build_is_for_this_machine_alone(tmp_path, monkeypatch):
    """Images with a toolkit in them often set a list of architectures."""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5;8.0;9.0+PTX")
    environ = real_parts(tmp_path)["build"].environ
    assert environ["TORCH_CUDA_ARCH_LIST"] == "native" and environ["FUSED_RNN_CUDA"] == "1"


def test_commands_are_ones_that_there_are(tmp_path):
    real = real_parts(tmp_path)
    asked = {}
    for name in ("benchmark", "benchmark-persistent"):
        (benchmark,) = real[name].commands(200).values()
        assert benchmark[1:3] == ["-m", "fused_rnn_bench"]
        asked[name] = options = cli.parser().parse_args(benchmark[3:])
        assert options.graph and options.suite == "core"
        assert 0 < options.budget < 200, "it ends by itself, in time"
        assert real[name].environ["FUSED_RNN_COMMIT"] == "0123abc"
    chosen, forced = asked.values()
    assert (chosen.plan, forced.plan) == (None, "persistent") and chosen.out != forced.out
    assert set(chosen.dtype) == {"bf16", "fp16", "tf32", "fp32"} == {*forced.dtype, "fp32"}
    sanitized = real["sanitizer"].commands(1)
    assert set(sanitized) == {"memcheck", "racecheck", "synccheck"}
    assert all((ROOT / command[-1]).is_file() for command in sanitized.values())
    ports = [command[command.index("--port") + 1] for command in sanitized.values()]
    assert len(set(ports)) == 3
    assert not gpu_check.parts(tmp_path, None, "")[2].commands(1), "no such tool here"


def test_the_tests_are_shared_out(tmp_path):
    """Each of them to one of the processes."""
    file = tmp_path / "test_some.py"
    file.write_text("import pytest\n@pytest.mark.parametrize('k', range(7))\ndef test_it(k): pass\n")
    (command, *_) = real_parts(tmp_path)["tests"].commands(1).values()
    assert command[command.index("share_of_tests") + 1] == "--share"
    environ = {**os.environ, "PYTHONPATH": str(ROOT / "tools")}
    chosen = []
    for k in range(3):
        shared = ["-p", "share_of_tests", "--share", f"{k}/3", "--collect-only", "-q", str(file)]
        collect = [sys.executable, "-m", "pytest", *shared]
        done = subprocess.run(collect, cwd=tmp_path, env=environ, capture_output=True, text=True, check=True)
        chosen.append(re.findall(r"test_it\[(\d)\]", done.stdout))
    assert chosen == [["0", "3", "6"], ["1", "4"], ["2", "5"]]


def test_tests_that_may_hang_have_a_process_of_their_own(tmp_path):
    """And no other process has them. The long soak test is for whoever asks for it."""
    commands = real_parts(tmp_path)["tests"].commands(1)
    for name in gpu_check.STRATEGIES:
        files = [word for word in commands.pop(f"tests {name}") if word.endswith(".py")]
        assert files and all((ROOT / file).is_file() for file in files)
    for command in commands.values():
        assert {f"--ignore={file}" for file in files} <= set(command)
        assert command[command.index("-m", 3) + 1] == "cuda and not soak"


COLLECT = """
import sys, pytest
class Names:
    def pytest_collection_finish(self, session):
        found.append({item.nodeid for item in session.items})
found = []
for names in sys.argv[1:]:
    assert not pytest.main(["--collect-only", "-q", "-k", names, *%r], plugins=[Names()])
assert all(found) and sum(map(len, found[1:])) == len(found[0]) == len(set().union(*found[1:]))
"""


def test_each_test_of_a_persistent_kernel_has_one_process(tmp_path):
    commands = real_parts(tmp_path)["tests"].commands(1)
    expressions = [commands[f"tests {name}"] for name in gpu_check.STRATEGIES]
    expressions = [command[command.index("-k") + 1] for command in expressions]
    script = COLLECT % (gpu_check.PERSISTENT_TESTS,)
    command = [sys.executable, "-c", script, "test", *expressions]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_a_machine_with_few_cores_runs_few_processes(tmp_path, monkeypatch):
    for cores, processes in ((1, 1), (7, 1), (8, 2), (16, 4), (128, 4)):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        commands = real_parts(tmp_path)["tests"].commands(1)
        shared = [command for command in commands.values() if "--share" in command]
        assert len(commands) == len(shared) + len(gpu_check.STRATEGIES)
        shares = [command[command.index("--share") + 1] for command in shared]
        assert shares == [f"{k}/{processes}" for k in range(processes)]


def test_details_of_real_logs():
    log = "== tests 0\nx\n==== 3 failed, 900 passed, 8000 deselected, 2 warnings in 97.00s (0:01:37) ====\n"
    log += "== tests 1\n903 passed, 1 skipped in 95.11s\n== tests block\n.....F"
    details = gpu_check.tests_details(log)
    assert details == "3 failed, 1803 passed, 1 skipped, 1 processes did not finish"
    assert gpu_check.last_line("") == ""
    built = (
        "[9/9] nvcc\nfused_rnn: built fused_rnn._C: CUDA kernels for sm_90a\ncopying build/x -> fused_rnn\n"
    )
    assert gpu_check.build_details(built).endswith("sm_90a")
    assert gpu_check.build_details("g++ x\nerror: no such file\n") == "error: no such file"
    log = "== memcheck\n=========\n========= ERROR SUMMARY: 0 errors\n== racecheck\n== synccheck\n"
    log += "========= ERROR SUMMARY: 1 error\n"
    assert (
        gpu_check.sanitizer_details(log) == "memcheck 0 errors, racecheck did not finish, synccheck 1 error"
    )
    log = "== racecheck\n========= RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)\n"
    assert gpu_check.sanitizer_details(log).split(", ")[1] == "racecheck 2 hazards"
    lines = [
        "[1/4] lstm infer bf16 1x1x128: fused_rnn 12.0 us, torch 14.0 us",
        "[2/4] lstm infer bf16 1x1x128 graph: INVALID: output: error 1.0e+00",
        "[3/4] lstm train bf16 1x1x128: FAILED: RuntimeError: x",
        "[4/4] gru train bf16 1024x16x768: left out, would take about 9 s",
    ]
    assert gpu_check.benchmark_details("\n".join(lines)) == "3 of 4 cases, 2 of them wrong"
    assert (
        gpu_check.benchmark_details("error: torch sees no CUDA device") == "error: torch sees no CUDA device"
    )


# ------------------------------------------------------------------------------------------------- whole runs

XML = """<testsuites><testsuite><testcase classname="tests.test_cuda" name="test_graph[LSTM]"><failure/></testcase>
<testcase classname="tests.test_cuda" name="test_streams"/></testsuite></testsuites>"""
REPORT = """
from pathlib import Path
Path({0!r}).parent.mkdir()
Path({0!r}).write_text({1!r})
raise SystemExit(1)
"""


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with a GPU, whose parts are scripts."""
    results = some_results()
    results.environment |= {"device": "cuda", "device_name": "NVIDIA H200", "driver": "580.1"}
    results.environment |= {"commit": "0123abcd4567+", "date": "2026-11-24T12:00:00+00:00"}
    text = json.dumps(results.to_json())
    for record in results.records:
        record.entries[OURS] = timed(0.5, settings={"strategy": "grid", "backward_strategy": "step"})
    faster = json.dumps(results.to_json())
    stage = Stage()
    monkeypatch.setattr(
        gpu_check, "probe", lambda: {"torch": "2.11.0", "cuda": "13.0", "gpus": ["NVIDIA H200"]}
    )
    monkeypatch.setattr(gpu_check, "IN_TREE", tmp_path / "in-tree")
    monkeypatch.setattr(gpu_check, "REPORTS", reports := tmp_path / "reports")

    def parts(out: Path, sanitizer, commit):
        return [
            stage.part("build", 20, PASSES, needed=True),
            stage.part("tests", 20, REPORT.format(str(reports / "0.xml"), XML)),
            stage.part("sanitizer", 20),
            stage.part("benchmark", 20, f"open({str(out / 'benchmark.json')!r}, 'w').write({text!r})"),
            stage.part(
                "benchmark-persistent",
                20,
                f"open({str(out / 'benchmark-persistent.json')!r}, 'w').write({faster!r})",
            ),
        ]

    monkeypatch.setattr(gpu_check, "parts", parts)
    return stage


def test_what_a_run_leaves_and_says(machine, tmp_path, capfd):
    out = tmp_path / "out" / "gpu"
    assert gpu_check.main(["--out", str(out)]) == 1
    kept = sorted(path.name for path in out.iterdir())
    results = "nvidia-h200-2026-11-24-0123abc-modified.json"
    persistent = results.replace(".json", "-persistent.json")
    logs = ["benchmark-persistent.log", "benchmark.log", "build.log"]
    assert kept == [*logs, persistent, results, "summary.md", "tests.log"]
    text = (out / "summary.md").read_text()
    assert "NVIDIA H200; torch 2.11.0, CUDA 13.0" in text
    assert re.search(r"\| tests \| failed \| \d+ \|", text) and re.search(r"\| build \| passed \|", text)
    assert "| sanitizer | not run | 0 | its tool is not on this machine |" in text
    assert "- tests.test_cuda::test_graph[LSTM]" in text and "test_streams" not in text
    assert "| gru | train | fp32 | torch | 1 | 2.00 | 2.00 | 50x4x8 |" in text, "the table of speed-ups"
    assert "| gru | train | fp32 | torch | 1 | 4.00 | 4.00 | 50x4x8 |" in text, "the same with --plan"
    case = "| gru | train | fp32 | 50x4x8 | 1000 | - | 500 | grid, step | 2.00 | 4.00 |"
    assert case in text, "which is faster"
    shown = capfd.readouterr().out
    assert shown.index("gpu-check: benchmark: passed") < shown.index("| gru | train |"), (
        "the table comes last"
    )
    report = [sys.executable, "-m", "fused_rnn_bench", "report", str(out / results)]
    assert "NVIDIA H200" in subprocess.run(report, capture_output=True, text=True, check=True).stdout


def test_a_run_in_which_all_passed_exits_with_0(machine, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "parts", lambda *_: [machine.part("build", 20, PASSES, needed=True)])
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 0
    assert "Speed-up" not in (tmp_path / "out" / "summary.md").read_text()


def test_the_benchmark_is_found_in_a_tree_that_is_not_installed(machine, tmp_path):
    gpu_check.main(["--out", str(tmp_path / "out")])
    gpu_check.main(["--out", str(tmp_path / "out")])  # and a second time
    assert (tmp_path / "in-tree" / "fused_rnn_bench").resolve() == ROOT / "benchmarks"


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu_nothing_is_done(tmp_path):
    command = [sys.executable, "tools/gpu_check.py", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (
        done.returncode == 2 and "there is no GPU here" in done.stderr and "Nothing was done" in done.stderr
    )
    assert "Traceback" not in done.stderr and not done.stdout
    assert not (tmp_path / "out").exists()
