"""`manifest.json`: what a whole checkpoint holds, so that damage is found and named.

It is the last file written into a checkpoint, and holds its own digest, so a byte that changed in it is found as well.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any

from dsvl_train.checkpoints.durable import FileEntry, hash_file, write_file

MANIFEST_FILE = "manifest.json"
_FORMAT = 1
_SOFTWARE = ("dsvl_train", "torch", "megatron-core", "safetensors", "numpy")


class DamagedCheckpointError(ValueError):
    """A checkpoint is not what its manifest says; names the files."""

    def __init__(self, folder: Path, problems: Iterable[str]) -> None:
        self.folder, self.problems = folder, list(problems)
        super().__init__(f"{folder} is damaged: {'; '.join(self.problems)}")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


def software_versions() -> dict[str, str]:
    """Of Python and of the packages that a checkpoint depends on."""
    versions = {"python": platform.python_version()}
    for name in _SOFTWARE:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed as a package"
    return versions


@dataclass
class Manifest:
    """What a checkpoint holds, and where it comes from."""

    step: int
    files: dict[str, FileEntry]
    """Path inside the folder, with slashes -> content. All files but the manifest itself."""
    layout: dict[str, Any] = field(default_factory=dict)
    """Of the run that wrote it; for people, readers do not need it."""
    software: dict[str, str] = field(default_factory=software_versions)
    saved_at: str = field(default_factory=_now)
    """UTC, ISO 8601; sorts as text."""

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(entry.bytes for entry in self.files.values())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a folder, durably; it must be the last file written there."""
    plain = {"format": _FORMAT, **asdict(manifest)}
    write_file(folder / MANIFEST_FILE, _text(plain).encode())


def manifest_of(folder: Path, step: int) -> Manifest:
    """A manifest of what a folder holds now, every file read."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST_FILE)
    return Manifest(step, {path.relative_to(folder).as_posix(): hash_file(path) for path in files})


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        DamagedCheckpointError: it is missing, or not as it was written.
    """
    path = folder / MANIFEST_FILE
    try:
        text = path.read_bytes().decode()
        plain = json.loads(text)
        del plain["sha256"]
        if _text(plain) != text:
            raise ValueError("its content and its digest disagree")
        if plain.pop("format") != _FORMAT:
            raise ValueError("written by another version of dsvl_train")
        files = {_inside(name): FileEntry(**entry) for name, entry in plain.pop("files").items()}
        return Manifest(files=files, **plain)
    except FileNotFoundError:
        raise DamagedCheckpointError(folder, [f"{MANIFEST_FILE} is missing"]) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(folder, [f"{MANIFEST_FILE} is damaged ({error})"]) from error


def find_damage(folder: Path, files: Mapping[str, FileEntry], *, full: bool) -> list[str]:
    """Compare files with what the manifest says of them; one clause for each that differs.

    Args:
        full: also read and hash them; otherwise their sizes alone are compared.
    """
    return [f"{name} {problem}" for name, entry in files.items() if (problem := _damage(folder / name, entry, full))]


def find_strangers(folder: Path, manifest: Manifest) -> list[str]:
    """Files with tensors that a reader would take for a part of the checkpoint, and that the manifest does not know."""
    return [f"{path.name} is not a part of it" for path in sorted(folder.glob("*.safetensors")) if path.name not in manifest.files]


def check(folder: Path, *, full: bool) -> Manifest:
    """The manifest of a checkpoint that is whole.

    Raises:
        DamagedCheckpointError: it is not; names every file that is missing, too short, too long or (with `full`) changed.
    """
    manifest = read_manifest(folder)
    problems = find_damage(folder, manifest.files, full=full) + find_strangers(folder, manifest)
    if problems:
        raise DamagedCheckpointError(folder, problems)
    return manifest


def _damage(path: Path, entry: FileEntry, full: bool) -> str:
    try:
        if not path.is_file():
            return "is missing"
        size = path.stat().st_size
        if size != entry.bytes:
            return f"has {size} bytes and had {entry.bytes}"
        if full and hash_file(path).sha256 != entry.sha256:
            return "has changed (its SHA-256 is another)"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    return ""


def _text(plain: dict[str, Any]) -> str:
    """JSON whose last line is the digest of what stands before it."""
    body = json.dumps(plain, indent=1)[: -len("\n}")] + ","
    return f'{body}\n "sha256": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name:
        raise ValueError(f"{name!r} is not the name of a file in the folder")
    return name
