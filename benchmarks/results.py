"""The result of a run, in memory and as a JSON file. Reading a file checks it, field by field."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import RESULT_FORMAT
from .case import Case, case_from_json
from .cost import Ceiling, compulsory_bytes, flops
from .errors import BenchError
from .stats import Spread

OURS = "fused_rnn"

# ok: right, and timed.  invalid: out of tolerance, so not timed.  failed: raised an error.
# refused: cannot run this case, and says why.
# loose: a peer that misses the tolerance law by little. It is timed all the same, and marked: what it saves
# by being less accurate makes fused_rnn look slower, never faster. fused_rnn itself is never judged loose.
STATUSES = ("ok", "loose", "invalid", "failed", "refused")


@dataclass
class Entry:
    """How one contender did in one case. Samples are seconds a call, in the order they were taken."""

    status: str
    reason: str = ""
    samples: list[float] = field(default_factory=list)
    training_samples: list[float] = field(default_factory=list)  # of the step without its penalty
    calls_per_sample: int = 1
    parity: dict[str, Any] | None = None
    memory: dict[str, Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def spread(self) -> Spread:
        return Spread.of(self.samples)

    @property
    def timed(self) -> bool:
        return self.status in ("ok", "loose")

    @property
    def times_training(self) -> float | None:
        """A step with a penalty as a multiple of one without, the median of samples taken side by side: what slows the
        machine for a while slows both. None in other modes."""
        if not (self.timed and self.training_samples):
            return None
        pairs = zip(self.samples, self.training_samples, strict=False)
        return Spread.of([penalized / plain for penalized, plain in pairs]).median

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {"status": self.status}
        if self.timed:
            spread = self.spread
            data |= {
                "median_us": _microseconds(spread.median),
                "q1_us": _microseconds(spread.q1),
                "q3_us": _microseconds(spread.q3),
                "calls_per_sample": self.calls_per_sample,
                "samples_us": [_microseconds(sample) for sample in self.samples],
            }
        if self.times_training is not None:
            data["times_training"] = round(self.times_training, 3)
            data["training_samples_us"] = [_microseconds(sample) for sample in self.training_samples]
        optional = ("reason", "parity", "memory", "settings")
        return data | {name: getattr(self, name) for name in optional if getattr(self, name)}


@dataclass
class Record:
    """One case and all who ran it, fused_rnn first."""

    case: Case
    entries: dict[str, Entry]

    @property
    def failed(self) -> bool:
        """True when fused_rnn was out of tolerance or raised an error: what makes a run exit with 1."""
        return OURS in self.entries and self.entries[OURS].status in ("invalid", "failed")

    @property
    def timed(self) -> bool:
        """True when fused_rnn has a time."""
        return OURS in self.entries and self.entries[OURS].timed

    def speedup(self, peer: str) -> float | None:
        """How many times faster than this peer fused_rnn is; None where either has no time."""
        ours, theirs = self.entries.get(OURS), self.entries.get(peer)
        if ours is None or theirs is None or not (ours.timed and theirs.timed):
            return None
        return theirs.spread.median / ours.spread.median

    def to_json(self) -> dict[str, Any]:
        return {
            "case": self.case.to_json(),
            "flops": flops(self.case),
            "compulsory_bytes": compulsory_bytes(self.case),
            "contenders": {name: entry.to_json() for name, entry in self.entries.items()},
        }


@dataclass
class Results:
    """A whole run: where it ran, how, under which roof, and what came out."""

    environment: dict[str, Any]
    settings: dict[str, Any]
    ceiling: Ceiling
    records: list[Record] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)
    interrupted: bool = False

    @property
    def peers(self) -> list[str]:
        """Every contender but fused_rnn that appears, in the order of appearance."""
        names = (name for record in self.records for name in record.entries if name != OURS)
        return list(dict.fromkeys(names))

    def leave_out(self, case: Case, reason: str) -> None:
        self.left_out.append({"case": case.key, "reason": reason})

    def to_json(self) -> dict[str, Any]:
        return {
            "format": RESULT_FORMAT,
            "environment": self.environment,
            "settings": self.settings,
            "ceiling": {
                "matmul_flops": self.ceiling.matmul,
                "copy_bytes_per_second": list(self.ceiling.copy),
            },
            "interrupted": self.interrupted,
            "left_out": self.left_out,
            "cases": [record.to_json() for record in self.records],
        }

    def save(self, path: Path) -> None:
        """Write the file in one move, so that a reader or a crash never meets half of it."""
        draft = path.with_name(path.name + ".part")
        try:
            draft.write_text(json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
            draft.replace(path)
        except OSError as error:
            raise BenchError(f"cannot write {path}: {error.strerror}") from error


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 4)


def load(path: Path) -> Results:
    """Read a result file; any fault in it is a BenchError that names the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BenchError(f"{path} is no JSON: {error}") from error
    try:
        return _results_from_json(data)
    except BenchError as error:
        raise BenchError(f"{path}: {error}") from error


def _get(data: Any, name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """A field that must be there and be of this kind."""
    if not isinstance(data, dict):
        raise BenchError(f"{where} should be an object, got {type(data).__name__}")
    if name not in data:
        raise BenchError(f"{where} lacks {name!r}")
    if not isinstance(data[name], kind) or (isinstance(data[name], bool) and kind is not bool):
        raise BenchError(f"{where} has a {name!r} of the wrong kind: {type(data[name]).__name__}")
    return data[name]


def _positive(value: Any, where: str) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise BenchError(f"{where} should be a positive number, got {value!r}")
    return float(value)


def _results_from_json(data: Any) -> Results:
    if not isinstance(data, dict) or data.get("format") != RESULT_FORMAT:
        raise BenchError(f"not a result of fused-rnn-bench (its format should be {RESULT_FORMAT!r})")
    return Results(
        environment=_get(data, "environment", dict, "the file"),
        settings=_get(data, "settings", dict, "the file"),
        ceiling=_ceiling_from_json(_get(data, "ceiling", dict, "the file")),
        records=[_record_from_json(record) for record in _get(data, "cases", list, "the file")],
        left_out=[
            {name: _get(line, name, str, "left_out") for name in ("case", "reason")}
            for line in _get(data, "left_out", list, "the file")
        ],
        interrupted=_get(data, "interrupted", bool, "the file"),
    )


def _ceiling_from_json(data: dict[str, Any]) -> Ceiling:
    rates = _get(data, "matmul_flops", dict, "the ceiling")
    matmul = {name: _positive(rate, f"the matmul rate of {name}") for name, rate in rates.items()}
    copy = []
    for pair in _get(data, "copy_bytes_per_second", list, "the ceiling"):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BenchError("the ceiling's copy rates should be pairs of size and rate")
        copy.append((_positive(pair[0], "a copy size"), _positive(pair[1], "a copy rate")))
    if not copy:
        raise BenchError("the ceiling has no copy rate")
    return Ceiling(matmul, copy)


def _record_from_json(data: Any) -> Record:
    case = case_from_json(_get(data, "case", dict, "a case"))
    contenders = _get(data, "contenders", dict, case.key)
    return Record(
        case, {name: _entry_from_json(entry, f"{name} in {case.key}") for name, entry in contenders.items()}
    )


def _entry_from_json(data: Any, where: str) -> Entry:
    status = _get(data, "status", str, where)
    if status not in STATUSES:
        raise BenchError(f"{where} has status {status!r}; it should be one of {', '.join(STATUSES)}")
    entry = Entry(status)
    if entry.timed:
        samples = _get(data, "samples_us", list, where)
        if not samples:
            raise BenchError(f"{where} has no samples")
        entry.samples = [_positive(sample, f"a sample of {where}") * 1e-6 for sample in samples]
        if "training_samples_us" in data:
            entry.training_samples = [
                _positive(sample, f"a training sample of {where}") * 1e-6
                for sample in _get(data, "training_samples_us", list, where)
            ]
        entry.calls_per_sample = _get(data, "calls_per_sample", int, where)
    for name, kind in (("reason", str), ("parity", dict), ("memory", dict), ("settings", dict)):
        if name in data:
            setattr(entry, name, _get(data, name, kind, where))
    if entry.memory is not None:
        _get(entry.memory, "kind", str, f"the memory of {where}")
        _get(entry.memory, "bytes", int, f"the memory of {where}")
        if "peak_bytes" in entry.memory:  # older files have none
            _get(entry.memory, "peak_bytes", int, f"the memory of {where}")
    return entry
