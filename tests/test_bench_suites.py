"""The benchmark's tables of cases, and what a case costs on paper."""

from __future__ import annotations

import pytest
from fused_rnn_bench.case import CELLS, Case, case_from_json
from fused_rnn_bench.cost import Ceiling, compulsory_bytes, flops, weight_count
from fused_rnn_bench.errors import BenchError
from fused_rnn_bench.suites import SUITES, THREE, cases


def suite(name: str, **options) -> list[Case]:
    return list(cases(SUITES[name], device="cpu", dtypes=["fp32"], **options))


@pytest.mark.parametrize("name", SUITES)
def test_no_case_is_in_a_suite_twice(name):
    keys = [case.key for case in suite(name)]
    assert len(set(keys)) == len(keys) > 0


def test_core_is_every_layer_and_mode_at_its_ten_shapes():
    shapes = {(1, 1, 128), (50, 1, 128), (50, 1, 512), (50, 32, 128), (50, 32, 512), (100, 64, 256)}
    shapes |= {(25, 64, 1024), (200, 8, 256), (1024, 16, 768), (100, 256, 256)}
    found = {(case.cell, case.mode, case.T, case.B, case.I, case.H) for case in suite("core")}
    wanted = {(c, m, T, B, H, H) for c in THREE for m in ("infer", "train") for T, B, H in shapes}
    assert found == wanted


def test_quick_has_every_cell_and_a_packed_case():
    found = suite("quick")
    assert {case.cell for case in found} == set(CELLS) - {"rnn_relu"}
    assert {(case.B, case.H) for case in found if not case.is_layer} == {
        (1, 128),
        (1, 256),
        (32, 128),
        (32, 256),
    }
    assert {case.cell for case in found if case.lengths == "varied"} == set(THREE)


def test_deepbench_trains_the_training_set_and_infers_the_server_set():
    train = {(c.cell, c.H, c.B, c.T) for c in suite("deepbench", modes=["train"])}
    infer = {(c.cell, c.H, c.B, c.T) for c in suite("deepbench", modes=["infer"])}
    assert {("rnn_relu", 2560, 128, 50), ("lstm", 4096, 128, 25), ("lstm", 1536, 8, 50)} <= train
    assert {("gru", 2816, 32, 1500), ("gru", 512, 32, 1), ("gru", 1024, 64, 1500)} <= train
    assert {("lstm", 1536, 4, 50), ("lstm", 256, 1, 150), ("gru", 2560, 2, 187)} <= infer
    assert all(case[2] <= 4 for case in infer)
    assert len(train) == 12 + 16 + 3 + 3 + 16 + 3
    assert len(infer) == 9 + 3 + 3 + 48 + 3 + 3


def test_papers_have_their_stacks():
    noted = {case.note: case for case in suite("papers")}
    assert (noted["Appleyard et al. 2016"].layers, noted["Appleyard et al. 2016"].T) == (4, 100)
    speech = noted["speech BiLSTM"]
    assert (speech.layers, speech.bidirectional, speech.I, speech.H) == (5, True, 80, 320)
    assert sum(note.startswith("Haste") for note in noted) == 16


def test_packed_cases_have_a_dense_control():
    by_lengths = {}
    for case in suite("packed"):
        by_lengths.setdefault(case.lengths, set()).add((case.cell, case.mode, case.T, case.B, case.H))
    assert by_lengths["dense"] == by_lengths["equal"] == by_lengths["varied"]


def test_cells_and_graph_twins_are_filtered_and_added():
    only = suite("core", only_cells=["gru"], modes=["infer"], graph=True)
    assert {case.cell for case in only} == {"gru"}
    assert [case.graph for case in only] == [False, True] * 10
    assert len({case.key for case in only}) == 20


def test_varied_lengths_fall_from_T_to_a_quarter():
    lengths = Case("lstm", "infer", "fp32", "cpu", 200, 32, 8, 8, lengths="varied").sequence_lengths()
    assert lengths[0] == 200 and lengths[-1] == 50
    assert lengths == sorted(lengths, reverse=True)
    assert sum(lengths) == pytest.approx(0.625 * 200 * 32, rel=0.01)
    assert Case("lstm", "infer", "fp32", "cpu", 1, 9, 8, 8, lengths="varied").sequence_lengths() == [1] * 9


def test_the_cost_of_a_case_counted_by_hand():
    case = Case("lstm", "infer", "fp32", "cpu", 10, 2, 3, 5)
    assert weight_count(case) == 4 * 5 * (3 + 5 + 2)
    assert flops(case) == 2 * 20 * (3 + 5) * 20
    assert compulsory_bytes(case) == 4 * (200 + 20 * 3 + 20 * 5)
    train = Case("lstm", "train", "bf16", "cpu", 10, 2, 3, 5, layers=2, bidirectional=True)
    assert weight_count(train) == 2 * 20 * (3 + 5 + 2) + 2 * 20 * (10 + 5 + 2)
    assert flops(train) == 3 * 2 * 2 * 20 * (3 + 5 + 10 + 5) * 20


def test_the_ceiling_is_the_longer_of_products_and_traffic():
    case = Case("lstm", "infer", "fp32", "cpu", 10, 2, 3, 5)
    by_products = Ceiling({"fp32": 1e3}, [(1e3, 1e12)])
    assert by_products.seconds(case) == pytest.approx(flops(case) / 1e3)
    by_traffic = Ceiling({"fp32": 1e15}, [(1e3, 1e6)])
    assert by_traffic.seconds(case) == pytest.approx(compulsory_bytes(case) / 1e6)


def test_copy_rates_are_interpolated_on_log_axes():
    ceiling = Ceiling({}, [(1e4, 1e9), (1e6, 1e11)])
    assert ceiling.copy_rate(10) == 1e9
    assert ceiling.copy_rate(1e5) == pytest.approx(1e10)
    assert ceiling.copy_rate(1e9) == 1e11


def test_a_case_survives_json():
    case = Case("gru", "train", "bf16", "cuda", 7, 5, 3, 11, 2, True, "varied", True, "a note")
    assert case_from_json(case.to_json()) == case


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"T": 0}, "T 0"),
        ({"B": True}, "B True"),
        ({"H": 1.5}, "H 1.5"),
        ({"cell": "transformer"}, "cell 'transformer'"),
        ({"dtype": ["fp32"]}, "dtype"),
        ({"bidirectional": 1}, "bidirectional 1"),
        ({"note": 3}, "note"),
        ({"colour": "red"}, "unknown fields: colour"),
    ],
)
def test_a_wrong_case_is_refused_by_name(change, message):
    data = Case("lstm", "infer", "fp32", "cpu", 1, 1, 1, 1).to_json() | change
    with pytest.raises(BenchError, match=message):
        case_from_json(data)
