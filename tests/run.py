"""ruff, then all tests, the multi-process ones last; the last line counts the tests.

`--quick` leaves the multi-process ones out; `--full` adds those marked `full`, which take long.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = {
    "unit, golden and parity tests": ["tests", "--ignore=tests/distributed", "-n", "auto"],
    "multi-process tests": ["tests/distributed", "-n", "0"],
}
_TESTS_FAILED, _NO_TESTS_COLLECTED = 1, 5


def main(arguments: list[str]) -> int:
    """Run the parts; 0 if nothing failed. Arguments other than --quick and --full go to pytest."""
    totals = {"passed": 0, "failed": 0, "skipped": 0}
    print("== ruff", flush=True)
    ruff_ok = subprocess.run([sys.executable, "-m", "ruff", "check", "--output-format=concise", "."], cwd=ROOT, check=False).returncode == 0
    ok = True
    for name, selection in PARTS.items():
        if "--quick" in arguments and "tests/distributed" in selection:
            continue
        print(f"\n== {name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            rest = [argument for argument in arguments if argument not in ("--quick", "--full")]
            if "--full" not in arguments:
                rest += ["-m", "not full"]
            command = [sys.executable, "-m", "pytest", *selection, f"--junitxml={report}", "-q", *rest]
            code = subprocess.run(command, cwd=ROOT, check=False).returncode
            ok &= code in (0, _NO_TESTS_COLLECTED)
            for outcome, number in _counts(report).items():
                totals[outcome] += number
            if code not in (0, _TESTS_FAILED, _NO_TESTS_COLLECTED):
                totals["failed"] += 1
                print(f"pytest itself ended with {code} in the {name}; what it had not run yet is not counted", flush=True)
    if not ruff_ok:
        print("ruff found problems (at the top)")
    print(", ".join(f"{number} {outcome}" for outcome, number in totals.items()), flush=True)
    return 0 if ok and ruff_ok else 1


def _counts(report: Path) -> dict[str, int]:
    """Tests of a JUnit report by outcome."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    if not report.exists():
        return counts
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        number = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
        counts["failed"] += number["failures"] + number["errors"]
        counts["skipped"] += number["skipped"]
        counts["passed"] += number["tests"] - number["failures"] - number["errors"] - number["skipped"]
    return counts


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
