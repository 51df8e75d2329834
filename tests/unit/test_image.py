"""The Dockerfile, .dockerignore and docker/install.py, as far as they can be held to without building an image."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tomllib
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NVIDIAS = "2.10.0a0+b4e4ee81d3.nv25.12"


def load_install() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install", ROOT / "docker/install.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


install = load_install()


def instructions() -> list[tuple[str, str]]:
    """(FROM, arguments), … of the Dockerfile, continued lines joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined if line.strip())]


def of(kind: str) -> list[str]:
    return [rest for word, rest in instructions() if word == kind]


def default(argument: str) -> str:
    return next(rest.partition("=")[2] for rest in of("ARG") if rest.startswith(f"{argument}="))


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {install.name_of(line): line.partition("==")[2] for line in lines if line and not line.startswith("#")}


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a file or folder out: patterns go from the root, `**/` from any folder, and take what is beneath."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert not any(pattern.startswith("!") for pattern in patterns)
    parts = path.split("/")
    for pattern in patterns:
        anywhere = pattern.startswith("**/")
        pattern = pattern.removeprefix("**/")
        assert "/" not in pattern, "this test knows no such pattern"
        if any(fnmatch(part, pattern) for part in (parts if anywhere else parts[:1])):
            return True
    return False


def test_both_variants_start_from_a_version() -> None:
    stages = [rest.split() for rest in of("FROM")]
    assert [stage[1:] for stage in stages] == [["AS", "gpu"], ["AS", "cpu"], []]
    assert stages[2][0] == "${VARIANT}" and default("VARIANT") == "gpu"
    for image in (stages[0][0], stages[1][0]):
        assert re.search(r":\d+\.\d+[\w.-]*$", image), f"{image}: no version"
    assert stages[0][0].startswith("nvcr.io/nvidia/pytorch:")
    python = re.search(r"python:(\d+\.\d+)", stages[1][0])
    assert python is not None and python.group(1) in ("3.11", "3.12"), "requires-python"


def test_every_installation_leaves_the_images_torch_alone() -> None:
    """By docker/install.py, or without dependencies at all; and the torch of the CPU's variant is the pinned one."""
    installing = [run for run in of("RUN") if "install" in run]
    commands = [part.strip() for run in installing for part in run.split("&&") if re.search(r"\bpip install\b|install\.py", part)]
    assert len(commands) == 3
    for command in commands:
        assert "--no-deps" in command or 'python docker/install.py "${EXTRAS}"' in command, command
    assert f"torch=={pins()['torch']}" in commands[0]
    assert "$TORCH_INDEX" in commands[0]


def test_what_the_image_installs_is_pinned() -> None:
    for requirement in install.requirements(PROJECT, default("EXTRAS")):
        assert install.name_of(requirement) in pins(), f"constraints.txt does not pin {requirement}"


def test_it_runs_as_a_user_with_a_number_and_both_entries_are_at_hand() -> None:
    words = [word for word, _ in instructions()]
    user = of("USER")
    assert len(user) == 1 and re.fullmatch(r"[1-9]\d*:[1-9]\d*", user[0]), "a name cannot be seen not to be root from outside"
    assert words.index("USER") > max(position for position, word in enumerate(words) if word in ("RUN", "COPY")), "the code is not its own"
    assert "ENTRYPOINT" not in words, "NVIDIA's, which hands on what is asked for, stays"
    assert of("CMD") == ['["dsvl", "--help"]']
    assert "-e ." in of("RUN")[-1], "train.py and dsvl read one conf/"


def test_what_is_copied_is_there_and_not_ignored() -> None:
    sources = [source for rest in of("COPY") for source in rest.split()[:-1]]
    needed = ["train.py", "conf", "dsvl_train", "data_recipes", "launch", PROJECT["readme"], *PROJECT["license-files"]]
    for source in [*sources, *needed]:
        assert (ROOT / source).exists(), source
        assert source == "." or not ignored(source), source
    if shutil.which("git") and (ROOT / ".git").exists():
        tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
        out = {name for name in tracked if ignored(name)}
        assert all(name.split("/")[0] in (".github", ".ci", "Dockerfile", ".dockerignore") for name in out), out


def test_nothing_that_git_ignores_goes_into_an_image() -> None:
    for pattern in (ROOT / ".gitignore").read_text().split():
        example = pattern.rstrip("/").replace("*", "x")
        assert ignored(example) and ignored(f"data_recipes/{example}"), pattern
    for path in (".git/config", "weights/model.safetensors", "image.sqsh", ".venv311/bin/python"):
        assert ignored(path), path


def test_the_readme_builds_as_the_dockerfile_says() -> None:
    readme, dockerfile = (ROOT / "README.md").read_text(), (ROOT / "Dockerfile").read_text()
    for words in ("docker build -t dsvl .", "--build-arg VARIANT=cpu", "--gpus all --ipc host", 'runs:/opt/dsvl_train/runs"'):
        assert words in readme and words in dockerfile, words
    assert of("WORKDIR") == ["/opt/dsvl_train"]


# --------------------------------------------------------------------------------------------------------- docker/install.py


def test_what_is_present_stays_and_the_rest_is_pinned() -> None:
    ours = ["# versions", "torch==2.13.0", "numpy==2.4.6", "PyYAML==6.0.3", "hydra-core==1.3.8", "scikit-learn==1.9.1"]
    present = {"torch": NVIDIAS, "pyyaml": "6.0.2"}
    images_own = ["# of the image", "", "torch==2.10.0a0", "hydra_core==1.3.2", "numpy<2.2 ; python_version<'4'"]
    assert install.constraints(ours, present, images_own) == ["pyyaml==6.0.2", f"torch=={NVIDIAS}", "scikit-learn==1.9.1"]


def test_extras_add_to_the_requirements() -> None:
    wanted = install.requirements(PROJECT, "demo,slurm")
    assert wanted[: len(PROJECT["dependencies"])] == PROJECT["dependencies"]
    assert set(wanted) >= {*PROJECT["optional-dependencies"]["demo"], *PROJECT["optional-dependencies"]["slurm"]}
    assert install.requirements(PROJECT, "") == PROJECT["dependencies"]
    with pytest.raises(ValueError, match=r"no extra is called 'gpu'; there are demo, cuda"):
        install.requirements(PROJECT, "gpu")


def test_packages_are_found_once_and_odd_versions_are_left_to_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    there = [
        ("torch", NVIDIAS),
        ("Flash_Attn", "2.7.4.post1+25.12"),
        ("devscripts", "2.23.4ubuntu5.1"),
        ("torch", "2.4.0"),
        ("pip", "25.0"),
    ]
    packages = [SimpleNamespace(metadata={"Name": name}, version=version) for name, version in there]
    monkeypatch.setattr(install, "distributions", lambda: packages)
    assert install.installed() == {"torch": NVIDIAS, "flash-attn": "2.7.4.post1+25.12"}


@pytest.mark.parametrize(("before", "after", "code"), [(NVIDIAS, NVIDIAS, 0), (NVIDIAS, "2.13.0", 1), ("", "2.13.0", 0)])
def test_a_torch_that_was_replaced_ends_the_build(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], before: str, after: str, code: int
) -> None:
    of_the_image = tmp_path / "constraint.txt"
    of_the_image.write_text("pillow==12.0.0\n")
    monkeypatch.setenv("PIP_CONSTRAINT", str(of_the_image))
    monkeypatch.setattr(install, "torch_version", lambda: before)
    monkeypatch.setattr(install, "installed", lambda: {"torch": before} if before else {})
    calls: list[list[str]] = []

    def run(command: Sequence[str], **options: bool) -> SimpleNamespace:
        if "pip" in command:
            file = Path(command[command.index("--constraint") + 1])
            calls.append([*command[: command.index("--constraint")], *file.read_text().splitlines()])
        return SimpleNamespace(stdout=f"{after}\n")

    monkeypatch.setattr(install.subprocess, "run", run)
    assert install.main(["demo"]) == code
    ((_, *call),) = calls
    assert call[:3] == ["-m", "pip", "install"]
    assert (f"torch=={before}" in call) == bool(before) and (f"torch=={pins()['torch']}" in call) == (not before)
    assert f"matplotlib=={pins()['matplotlib']}" in call and not any(line.startswith("pillow") for line in call)
    assert ("was replaced by 2.13.0" in capsys.readouterr().err) == (code == 1)
