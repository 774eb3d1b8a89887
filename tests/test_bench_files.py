"""Result files: saved and read back, refused when broken, compared, reported. No measuring here."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from fused_rnn_bench import results as bench_results
from fused_rnn_bench.case import Case
from fused_rnn_bench.cli import main
from fused_rnn_bench.cost import Ceiling
from fused_rnn_bench.errors import BenchError
from fused_rnn_bench.results import OURS, Entry, Record, Results
from fused_rnn_bench.stats import Spread, geometric_mean, quantile
from fused_rnn_bench.tables import number

ENVIRONMENT = {"device": "cpu", "device_name": "a processor", "threads": 2, "torch": "2.13.0", "cores": 2}
CASES = [
    Case(cell, mode, "fp32", "cpu", 50, 4, 8, 8) for cell in ("lstm", "gru") for mode in ("infer", "train")
]


def timed(milliseconds: float, spread: float = 0.01, **more) -> Entry:
    """An entry with 20 samples about this median."""
    samples = [milliseconds * 1e-3 * (1 + spread * (index - 9.5) / 9.5) for index in range(20)]
    return Entry("ok", samples=samples, calls_per_sample=4, **more)


def some_results(ours: float = 1.0, theirs: float = 2.0, spread: float = 0.01) -> Results:
    """Four cases in which torch takes `theirs` milliseconds and fused_rnn takes `ours`."""
    results = Results(
        dict(ENVIRONMENT), {"suite": "quick"}, Ceiling({"fp32": 1e11}, [(1e5, 2e10), (1e7, 1e10)])
    )
    for case in CASES:
        results.records.append(Record(case, {OURS: timed(ours, spread), "torch": timed(theirs, spread)}))
    return results


def saved(results: Results, path: Path) -> str:
    results.save(path)
    return str(path)


def test_a_file_holds_everything(tmp_path):
    results = some_results()
    results.records[1].entries[OURS].memory = {"kind": "saved", "bytes": 1234, "peak_bytes": 5678}
    results.records[1].entries[OURS].parity = {"ok": True, "error": 1e-7}
    results.records[2].entries["onnxruntime"] = Entry("refused", "runs inference only")
    results.leave_out(CASES[0], "no time")
    results.interrupted = True
    path = tmp_path / "run.json"
    results.save(path)
    again = bench_results.load(path)
    assert again.to_json() == results.to_json()
    assert [record.case for record in again.records] == CASES
    assert len(again.records[0].entries[OURS].samples) == 20
    assert again.peers == ["torch", "onnxruntime"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"], "the draft is gone"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data.update(format="other/1"), "not a result of fused-rnn-bench"),
        (lambda data: data.pop("cases"), "lacks 'cases'"),
        (lambda data: data.update(environment=[]), "'environment' of the wrong kind: list"),
        (lambda data: data.update(interrupted=0), "'interrupted' of the wrong kind"),
        (lambda data: data["cases"].append(7), "a case should be an object"),
        (lambda data: data["cases"][0]["case"].update(T=-1), "T -1"),
        (lambda data: data["cases"][0]["contenders"].update(torch=3), "should be an object, got int"),
        (lambda data: data["cases"][0]["contenders"][OURS].update(status="great"), "status 'great'"),
        (lambda data: data["cases"][0]["contenders"][OURS].update(samples_us=[]), "has no samples"),
        (lambda data: data["cases"][0]["contenders"][OURS].update(samples_us=[0]), "positive number, got 0"),
        (lambda data: data["cases"][0]["contenders"][OURS].update(samples_us=["a"]), "positive number"),
        (lambda data: data["cases"][0]["contenders"][OURS].update(memory={"kind": "peak"}), "lacks 'bytes'"),
        (
            lambda data: data["cases"][0]["contenders"][OURS].update(
                memory={"kind": "saved", "bytes": 1, "peak_bytes": "2"}
            ),
            "'peak_bytes' of the wrong kind",
        ),
        (lambda data: data["ceiling"].update(copy_bytes_per_second=[]), "no copy rate"),
        (lambda data: data["ceiling"]["matmul_flops"].update(fp32=-1), "matmul rate of fp32"),
        (lambda data: data["left_out"].append({"case": "x"}), "lacks 'reason'"),
    ],
)
def test_a_broken_file_is_refused_with_its_fault(tmp_path, capsys, damage, message):
    data = some_results().to_json()
    damage(data)
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(data))
    assert main(["report", str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error and "broken.json" in error and "Traceback" not in error


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"format": "fused-rnn-bench/1"}', "[" * 100_000, "\udcff"]
)
def test_what_is_no_result_is_refused(tmp_path, capsys, text):
    path = tmp_path / "odd.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert main(["report", str(path)]) == 2
    assert str(path) in capsys.readouterr().err


def test_a_missing_file_and_a_folder_are_refused(tmp_path, capsys):
    assert main(["report", str(tmp_path / "absent.json")]) == 2
    assert main(["compare", str(tmp_path), str(tmp_path)]) == 2
    assert "cannot read" in capsys.readouterr().err


def test_results_that_cannot_be_written_are_an_error(tmp_path):
    with pytest.raises(BenchError, match="cannot write"):
        some_results().save(tmp_path / "no such folder" / "run.json")


@pytest.mark.parametrize(
    ("new", "options", "status"),
    [
        (some_results(ours=1.05), [], 0),
        (some_results(ours=1.2), [], 1),
        (some_results(ours=0.5), [], 0),
        (some_results(ours=1.05), ["--threshold", "2"], 1),
        (some_results(ours=1.2, spread=0.9), [], 0),
        (some_results(ours=1.5, theirs=3.0), [], 1),
        (some_results(ours=1.5, theirs=3.0), ["--by", "speedup"], 0),
        (some_results(ours=1.0, theirs=1.5), ["--by", "speedup"], 1),
    ],
    ids=[
        "noise",
        "slower",
        "faster",
        "threshold",
        "wide spread",
        "slow day",
        "slow day by speedup",
        "lost lead",
    ],
)
def test_compare_exits_with_1_for_a_regression_beyond_noise(tmp_path, new, options, status):
    old = saved(some_results(), tmp_path / "old.json")
    assert main(["compare", old, saved(new, tmp_path / "new.json"), *options]) == status


def test_compare_finds_a_case_that_became_wrong(tmp_path, capsys):
    new = some_results()
    new.records[2].entries[OURS] = Entry("invalid", "h_n: error 1 where 1e-7 is allowed")
    old_path = saved(some_results(), tmp_path / "old.json")
    new_path = saved(new, tmp_path / "new.json")
    assert main(["compare", old_path, new_path]) == 1
    assert "h_n: error 1" in capsys.readouterr().out
    assert main(["compare", new_path, new_path]) == 0, "it was wrong before too"


def test_compare_names_what_is_gone_and_what_differs(tmp_path, capsys):
    new = some_results()
    new.environment["threads"] = 8
    del new.records[0]
    old_path, new_path = saved(some_results(), tmp_path / "old.json"), saved(new, tmp_path / "new.json")
    assert main(["compare", old_path, new_path]) == 0
    shown = capsys.readouterr().out
    assert "threads: 2 -> 8" in shown
    assert "Only in the old file (1)" in shown and CASES[0].key in shown
    new.records.clear()
    assert main(["compare", old_path, saved(new, tmp_path / "new.json")]) == 2
    assert "no case in common" in capsys.readouterr().err


def test_report_shows_speedups_means_failures_and_what_was_left_out(tmp_path, capsys):
    results = some_results()
    results.records[1].entries[OURS] = Entry("invalid", "grad input: error 0.5 where 1e-6 is allowed")
    results.records[2].entries["openvino"] = Entry("loose", "output: a little off", samples=[4e-3] * 3)
    results.leave_out(CASES[0], "needs about 80 GB")
    assert main(["report", saved(results, tmp_path / "run.json")]) == 0
    shown = capsys.readouterr().out
    assert "2.00" in shown and "INVALID" in shown and "4.00~" in shown
    assert "grad input: error 0.5" in shown and "a little off" in shown and "needs about 80 GB" in shown


@pytest.mark.parametrize("width", [60, 70, 80, 100, 200])
def test_a_narrow_terminal_loses_columns_not_digits(width):
    rich_console = pytest.importorskip("rich.console", reason="tables for a terminal need rich")
    from fused_rnn_bench.report import print_report

    console = rich_console.Console(width=width, file=io.StringIO())
    print_report(some_results(), console)
    shown = console.file.getvalue()
    assert "2.00" in shown and "1.00 ±1%" in shown and "ceiling" in shown
    assert "\u2026" not in shown, "nothing is cut off"
    assert ("us a step" in shown) == (width >= 100) or "not shown on a terminal this narrow" in shown


def test_report_writes_markdown_tables(tmp_path, capsys):
    path = saved(some_results(), tmp_path / "run.json")
    target = tmp_path / "run.md"
    assert main(["report", path, "--markdown", str(target)]) == 0
    assert capsys.readouterr().out == ""
    text = target.read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 4 + 2 + 4, "two tables of four rows, each with a heading and a rule"
    assert "| gru | train | fp32 | torch | 1 | 2.00 | 2.00 | 50x4x8 |" in text
    assert main(["report", path, "--markdown", "-"]) == 0
    assert "| gru | train | fp32 | torch |" in capsys.readouterr().out
    assert main(["report", path, "--markdown", str(tmp_path / "absent" / "run.md")]) == 2


def test_without_rich_a_report_is_markdown(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    path = saved(some_results(), tmp_path / "run.json")
    assert main(["report", path]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("## run.json\n") and "| gru | train | fp32 | torch |" in shown


def test_a_run_on_a_gpu_is_reported_and_compared(tmp_path, capsys):
    """With fused_rnn 1.3 times slower in the second run, in the eager cases alone."""

    def run_of(slower: float) -> Results:
        results = some_results()
        results.environment |= {"device": "cuda", "device_name": "a GPU", "driver": "580.1", "threads": 16}
        results.records = [
            Record(
                replace(record.case, device="cuda", dtype=dtype, graph=graph),
                {OURS: timed(1.0 if graph else slower), "torch": timed(2.0)},
            )
            for record in results.records
            for dtype in ("bf16", "tf32")
            for graph in (False, True)
        ]
        return results

    old, new = saved(run_of(1.0), tmp_path / "old.json"), saved(run_of(1.3), tmp_path / "new.json")
    assert main(["report", old]) == 0
    shown = capsys.readouterr().out
    assert "a GPU, driver 580.1" in shown and "tf32 graph" in shown and "50x4x8 graph" in shown
    assert main(["compare", old, old]) == 0
    capsys.readouterr()
    assert main(["compare", old, new]) == 1
    shown = capsys.readouterr().out
    assert "16 cases compared: 8 slower" in shown and "lstm infer bf16 cuda" in shown


def test_report_draws_both_plots(tmp_path):
    path = saved(some_results(), tmp_path / "run.json")
    assert main(["report", path, "--plots", str(tmp_path / "plots")]) == 0
    pictures = sorted((tmp_path / "plots").iterdir())
    assert [picture.name for picture in pictures] == ["run-roofline-fp32.png", "run-speedup-fp32.png"]
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


def test_report_copes_with_an_interrupted_run_of_nothing(tmp_path, capsys):
    results = some_results()
    results.records.clear()
    results.interrupted = True
    path = saved(results, tmp_path / "run.json")
    assert main(["report", path, "--plots", str(tmp_path / "plots")]) == 0
    assert "interrupted" in capsys.readouterr().out


def test_quantiles_and_means_counted_by_hand():
    assert quantile([4, 1, 3, 2], 0.5) == 2.5
    assert quantile([1, 2, 3, 4, 5], 0.25) == 2
    assert quantile([7], 0.75) == 7
    spread = Spread.of([1, 2, 3, 4, 5])
    assert (spread.median, spread.q1, spread.q3, spread.relative) == (3, 2, 4, pytest.approx(1 / 3))
    assert geometric_mean([1, 4]) == pytest.approx(2)


@pytest.mark.parametrize(
    ("value", "text"), [(1234.5, "1234"), (12.345, "12.3"), (0.012345, "0.0123"), (9.99, "9.99"), (0, "0")]
)
def test_numbers_have_three_digits(value, text):
    assert number(value) == text
