"""Small hygiene of the repository itself."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CODE = sorted([*(ROOT / "dsvl_train").rglob("*.py"), *(ROOT / "data_recipes").rglob("*.py"), ROOT / "train.py"])
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in CODE}
SCRIPTS = sorted([*(ROOT / ".ci").iterdir(), *(ROOT / "launch").glob("*.sh"), ROOT / "launch/slurm.sbatch"])
MAX_FILE_BYTES = 4_000_000


def tracked_files() -> list[Path]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_no_large_file_and_nothing_generated_is_tracked() -> None:
    for path in tracked_files():
        assert path.stat().st_size <= MAX_FILE_BYTES, f"{path} has {path.stat().st_size} bytes"
        assert "__pycache__" not in path.parts and path.suffix != ".pyc", path


def test_licence_is_apache() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text
    assert project()["license"] == "Apache-2.0"


def test_constraints_pin_every_dependency() -> None:
    pinned = {re.sub(r"[-_.]+", "-", name).lower() for name in pins()}
    extras = project()["optional-dependencies"]
    for requirement in [*project()["dependencies"], *extras["dev"], *extras["demo"]]:
        name = re.sub(r"[-_.]+", "-", re.split(r"[<>=\[;]", requirement)[0]).lower()
        assert name in pinned, f"constraints.txt does not pin {name}"
    assert not any("+" in version for version in pins().values()), "a local version, which no index has"


def test_make_installs_the_torch_that_is_pinned() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert f"TORCH := torch=={pins()['torch']}\n" in makefile


def test_make_has_its_targets() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in ("setup", "demo", "test", "lint", "bench", "clean"):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_shell_scripts_stop_at_errors_and_can_be_run() -> None:
    for path in SCRIPTS:
        assert "set -euo pipefail" in path.read_text(), path
        assert path.stat().st_mode & 0o100 or path.suffix == ".sbatch", path


def test_shellcheck_finds_nothing() -> None:
    program = shutil.which("shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if program is None:
        pytest.skip("shellcheck is not installed (make setup brings it)")
    checks = "check-unassigned-uppercase,quote-safe-variables,avoid-nullary-conditions"
    done = subprocess.run([program, "--enable", checks, *map(str, SCRIPTS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_yaml_files_are_readable_and_say_what_they_are() -> None:
    for path in (ROOT / "conf").rglob("*.yaml"):
        assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict), path


SAFE_VALUES = {"trust_remote_code": False, "allow_pickle": False, "weights_only": True}
"""Keyword arguments that decide whether something foreign is executed -> the only value that may be written."""


def test_nothing_is_unpickled_or_trusted() -> None:
    """No pickle is loaded and no remote code trusted, wherever data or weights come from."""
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not {"pickle", "cloudpickle", "dill"} & {name.split(".")[0] for name in names}, f"{path}:{node.lineno}"
            if isinstance(node, ast.keyword) and node.arg in SAFE_VALUES:
                assert getattr(node.value, "value", None) is SAFE_VALUES[node.arg], f"{path}:{node.value.lineno}"


def test_every_module_says_what_it_is() -> None:
    for path, tree in TREES.items():
        assert ast.get_docstring(tree) or not tree.body, f"{path} has no docstring"
