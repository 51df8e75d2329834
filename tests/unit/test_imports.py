"""Imports point one way, and a run on CUDA does not meet the CPU backend."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAY_IMPORT = {
    "config": {"config"},
    "checkpoints": {"checkpoints"},
    "parallel": {"parallel", "config"},
    "models": {"models", "parallel", "config"},
    "data": {"data", "config"},
    "interop": {"interop", "checkpoints", "models", "parallel", "config"},
    "evaluation": {"evaluation", "checkpoints", "interop", "models", "parallel", "data", "config"},
    "training": {"training", "checkpoints", "evaluation", "interop", "models", "parallel", "data", "config", "reporting", "failures"},
    "reporting": {"reporting", "config"},
    "failures": {"config"},
    "rank": {"config", "failures", "training"},
    "launcher": {"config", "failures", "rank", "training"},
    "sweep": {"checkpoints", "config", "failures", "launcher"},
    "planning": {"planning", "training", "interop", "models", "parallel", "config"},
    "commands": {"checkpoints", "config", "data", "evaluation", "failures", "interop", "models", "parallel", "planning"},
    "cli": {
        "checkpoints",
        "commands",
        "config",
        "data",
        "evaluation",
        "failures",
        "interop",
        "launcher",
        "models",
        "parallel",
        "planning",
        "reporting",
        "training",
    },
}
"""Part of dsvl_train (a folder, or a module beside them) -> the parts that it may import."""

RECIPES_MAY_IMPORT = {"config", "data"}
"""Parts that data_recipes may import; the demo's driver also reads what its runs wrote."""


def imported_modules(path: Path) -> Iterator[tuple[int, str, bool]]:
    """(line, dotted module, whether at module level) of every import of a file, relative ones resolved."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(node) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) for node in ast.walk(function)}
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            yield node.lineno, name, id(node) not in inside


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def test_no_import_runs_back() -> None:
    wrong = []
    for path in python_files("dsvl_train"):
        part = path.relative_to(ROOT / "dsvl_train").with_suffix("").parts[0]
        assert part == "__init__" or part in MAY_IMPORT, f"dsvl_train/{part} is new: say in MAY_IMPORT what it may import"
        allowed = MAY_IMPORT.get(part, set()) | {part}
        for line, name, _ in imported_modules(path):
            words = name.split(".")
            runs_back = words[0] == "dsvl_train" and len(words) > 1 and words[1] not in allowed
            if runs_back or words[0] in ("data_recipes", "tests", "train"):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}; dsvl_train.{part} may import {', '.join(sorted(allowed))}")
    assert not wrong, "\n".join(wrong)


def test_data_recipes_use_data_and_config_only() -> None:
    for path in python_files("data_recipes"):
        for line, name, _ in imported_modules(path):
            words = name.split(".")
            if words[0] == "dsvl_train" and len(words) > 1:
                allowed = RECIPES_MAY_IMPORT | ({"reporting"} if path.name == "run.py" else set())
                assert words[1] in allowed, f"{path.relative_to(ROOT)}:{line} imports {name}"


def test_only_start_up_meets_the_cpu_backend_and_late() -> None:
    for path in [*python_files("dsvl_train"), *python_files("data_recipes"), ROOT / "train.py"]:
        for line, name, at_module_level in imported_modules(path):
            if "cpu_backend" in name.split("."):
                where = f"{path.relative_to(ROOT)}:{line}"
                assert path.name == "startup.py" and not at_module_level, f"{where}: a run on CUDA would import the CPU backend"


def test_configuration_needs_no_torch() -> None:
    """A wrong setting is told before the slow import, and the launcher stays light; checkpoints are looked at without it."""
    folders = [*python_files("dsvl_train/config"), *python_files("dsvl_train/checkpoints")]
    for path in [*folders, *(ROOT / "dsvl_train" / f"{name}.py" for name in ("failures", "launcher", "rank"))]:
        for line, name, at_module_level in imported_modules(path):
            heavy = name.split(".")[0] in ("torch", "megatron", "transformers", "numpy")
            assert not (heavy and at_module_level), f"{path.relative_to(ROOT)}:{line} imports {name}"


def test_megatron_is_imported_after_start_up_has_prepared_it() -> None:
    """Modules that the entry loads before `parallel.startup.start` must not pull megatron in at module level."""
    for path in [ROOT / "dsvl_train/parallel/startup.py", ROOT / "dsvl_train/training/run.py", ROOT / "dsvl_train/cli.py"]:
        for line, name, at_module_level in imported_modules(path):
            assert not (name.split(".")[0] == "megatron" and at_module_level), f"{path.relative_to(ROOT)}:{line} imports {name}"
