"""Installs what this package requires into an image that brings packages of its own: `python docker/install.py demo,eval,slurm`.

What the image brings stays as it is, above all a torch that its vendor built, and with it what was built against that torch. All else gets
the versions of constraints.txt. Where both do not go together, pip says so and the build ends. The package itself is not installed here, so
that a change of it does not install everything anew.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIXED = "torch"
VERSION = re.compile(r"(\d+!)?\d+(\.\d+)*((a|b|rc)\d+)?(\.post\d+)?(\.dev\d+)?(\+[a-z0-9]+([._-][a-z0-9]+)*)?")
"""What pip takes for one; packages of the operating system have others, and pip leaves those alone."""


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1:
        print("error: one argument is wanted, the extras of pyproject.toml with commas between them", file=sys.stderr)
        return 2
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    before = torch_version()
    files = [Path(name) for name in os.environ.get("PIP_CONSTRAINT", "").split()]
    images_own = [line for file in files for line in file.read_text().splitlines()]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(constraints((ROOT / "constraints.txt").read_text().splitlines(), installed(), images_own)) + "\n")
        file.flush()
        command = [sys.executable, "-m", "pip", "install", "--constraint", file.name, *requirements(project, arguments[0])]
        subprocess.run(command, check=True)
    # in a process of its own, which sees what pip has done
    after = subprocess.run([sys.executable, __file__, "--torch"], check=True, capture_output=True, text=True).stdout.strip()
    if before and after != before:
        print(f"error: torch {before} of the image was replaced by {after}", file=sys.stderr)
        return 1
    return 0


def requirements(project: Mapping, extras: str) -> list[str]:
    """The project's requirements and those of its extras.

    Raises:
        ValueError: there is no such extra.
    """
    optional = project["optional-dependencies"]
    wanted = list(project["dependencies"])
    for extra in filter(None, extras.split(",")):
        if extra not in optional:
            raise ValueError(f"no extra is called {extra!r}; there are {', '.join(optional)}")
        wanted += optional[extra]
    return wanted


def constraints(ours: Iterable[str], present: Mapping[str, str], images_own: Iterable[str]) -> list[str]:
    """Lines for pip: what is present as it is, else our pin, unless the image has a constraint of its own."""
    theirs = {name_of(line) for line in images_own if _is_requirement(line)}
    pinned = [line for line in ours if _is_requirement(line) and name_of(line) not in theirs and name_of(line) not in present]
    return [*(f"{name}=={number}" for name, number in sorted(present.items())), *pinned]


def installed() -> dict[str, str]:
    """Packages here, by their canonical names; not pip and what builds packages, which are nobody's requirement."""
    found: dict[str, str] = {}
    for package in distributions():  # in the order of sys.path: the first of a name is the one that is imported
        if package.metadata["Name"] and VERSION.fullmatch(package.version):
            found.setdefault(canonical(package.metadata["Name"]), package.version)
    return {name: number for name, number in found.items() if name not in ("pip", "setuptools", "wheel")}


def torch_version() -> str:
    try:
        return version(FIXED)
    except PackageNotFoundError:
        return ""


def name_of(requirement: str) -> str:
    return canonical(re.split(r"[\s<>=!~\[;@]", requirement.strip(), maxsplit=1)[0])


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _is_requirement(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith(("#", "-"))


if __name__ == "__main__":
    if sys.argv[1:] == ["--torch"]:
        print(torch_version())
        sys.exit(0)
    sys.exit(main(sys.argv[1:]))
