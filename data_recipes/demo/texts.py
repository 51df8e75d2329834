"""The texts of the Python installation, as documents.

Three kinds, in this order: the language reference (`pydoc_data.topics`, what `help("assert")` prints), the docstrings of the standard
library (parsed from its source files, nothing is imported) and of the built-in types and functions, and Python's licence.

    collect_documents() -> split_documents() -> train and held-out documents

A document belongs to a *group* (a topic, a module), and a whole group is either trained on or held out. Which one is a function of
the group's text alone, never of the seed, so no run can train on what another run is tested with.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import importlib
import inspect
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

MAX_DOCUMENT_CHARS = 900
"""Longer texts are divided between paragraphs, so that a document fits the demo's short sequences."""
MIN_DOCUMENT_CHARS = 60
HELD_OUT_SHARE = 0.03
HELD_OUT_BYTES = 60_000
"""The held-out texts are about this many bytes, or HELD_OUT_SHARE of all if that is less."""
MAX_HELD_OUT_GROUP = 8_000
"""Bytes; a larger group is not held out, so that many groups are."""

_SKIPPED_PARTS = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "turtledemo", "pydoc_data", "__pycache__")
)
_SKIPPED_MODULES = frozenset(("ntpath", "__phello__", "antigravity"))
_PUBLIC_NAMES = {
    "posixpath": "os.path",
    "_collections_abc": "collections.abc",
    "_strptime": "time",
    "_pydecimal": "decimal",
    "_pydatetime": "datetime",
    "_pyio": "io",
}
_BUILTIN_MODULES = ("math", "cmath", "itertools", "time", "sys", "gc", "_operator", "_functools", "array", "zlib", "select", "_random")
_SECTION_LINE = re.compile(r"^[=*\-~^#_.]{4,}$")


@dataclass(frozen=True)
class Document:
    """A piece of text of at most about MAX_DOCUMENT_CHARS characters."""

    name: str
    """Where it is from: `topics/assert#0`, `json.dumps#0`."""
    group: str
    """Topic or module; a group is never divided between training and held-out."""
    text: str


@dataclass(frozen=True)
class Entry:
    """A documented name: the material of text-only conversations."""

    name: str
    """Qualified public name, e.g. `os.path.join`."""
    group: str
    text: str
    """Cleaned docstring."""


def collect_entries() -> list[Entry]:
    """Documented names of the standard library and the built-ins, without repeated docstrings, in a fixed order."""
    entries: list[Entry] = []
    seen: set[str] = set()
    for name, group, doc in [*_stdlib_docstrings(), *_builtin_docstrings()]:
        text = clean(doc)
        key = re.sub(r"\W+", "", text).lower()
        if len(text) < 20 or key in seen or not mostly_ascii(text):
            continue
        seen.add(key)
        entries.append(Entry(name, group, text))
    return entries


def collect_documents(entries: Iterable[Entry]) -> list[Document]:
    """All documents. The short docstrings of one module share documents, each under its name, as a reference manual sets them.

    Raises:
        ValueError: the installation holds less than 200 kB of text.
    """
    blocks: dict[str, list[str]] = {}
    for group, text in [*_topics(), *_licence()]:
        blocks.setdefault(group, []).extend(_paragraphs(clean(text)))
    for entry in entries:
        first, *rest = _paragraphs(entry.text)
        blocks.setdefault(entry.group, []).extend([f"{entry.name}\n{first}", *rest])
    documents = []
    seen: set[str] = set()
    for group, paragraphs in blocks.items():
        fresh = [p for p in paragraphs if len(p) < 40 or p not in seen]
        seen.update(fresh)
        for number, text in enumerate(_join_paragraphs(fresh)):
            if len(text) >= MIN_DOCUMENT_CHARS and mostly_ascii(text):
                documents.append(Document(f"{group}#{number}", group, text))
    size = sum(len(d.text) for d in documents)
    if size < 200_000:
        raise ValueError(
            f"found {size} characters of text in this Python installation ({sysconfig.get_paths()['stdlib']}), the demo needs 200000: "
            "use a Python that has its standard library's source files (python.org, pyenv, conda, or python3-dev packages)"
        )
    return documents


def split_documents(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents; a training document that repeats a held-out paragraph is dropped."""
    sizes: dict[str, int] = {}
    hashes: dict[str, bytes] = {}
    for d in documents:
        sizes[d.group] = sizes.get(d.group, 0) + len(d.text.encode())
        hashes[d.group] = hashlib.sha256(hashes.get(d.group, b"") + d.text.encode()).digest()
    budget = min(HELD_OUT_BYTES, int(HELD_OUT_SHARE * sum(sizes.values())))
    held_groups: set[str] = set()
    for group in sorted(sizes, key=lambda g: hashes[g]):
        if sizes[group] <= min(MAX_HELD_OUT_GROUP, budget):
            held_groups.add(group)
            budget -= sizes[group]
    held = [d for d in documents if d.group in held_groups]
    held_keys = {key for d in held for key in paragraph_keys(d.text)}
    train = [d for d in documents if d.group not in held_groups and held_keys.isdisjoint(paragraph_keys(d.text))]
    return train, held


def paragraph_keys(text: str) -> set[str]:
    """Normalised paragraphs of 60 characters or more, by which repeated text is recognised."""
    keys = (re.sub(r"\W+", "", p).lower() for p in text.split("\n\n"))
    return {k for k in keys if len(k) >= 60}


def clean(text: str) -> str:
    """Plain paragraphs: no tabs, no trailing blanks, no underlines of headings, at most one empty line in a row."""
    lines = [line.rstrip() for line in inspect.cleandoc(text.replace("\r\n", "\n")).split("\n")]
    lines = [line for line in lines if not _SECTION_LINE.match(line)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def mostly_ascii(text: str) -> bool:
    return sum(c > "\x7f" for c in text) <= 0.005 * len(text)


def first_sentence(text: str) -> str:
    """The first sentence of a docstring on one line."""
    paragraph = " ".join(text.split("\n\n", 1)[0].split())
    match = re.match(r"(.+?[.!?])(?: |$)", paragraph)
    return match.group(1) if match else paragraph


def _paragraphs(text: str) -> list[str]:
    """Paragraphs, those above MAX_DOCUMENT_CHARS divided between lines."""
    pieces = []
    for paragraph in text.split("\n\n"):
        while len(paragraph) > MAX_DOCUMENT_CHARS:
            cut = paragraph.rfind("\n", 0, MAX_DOCUMENT_CHARS)
            cut = cut if cut > 0 else MAX_DOCUMENT_CHARS
            pieces.append(paragraph[:cut])
            paragraph = paragraph[cut:].lstrip("\n")
        if paragraph.strip():
            pieces.append(paragraph)
    return pieces


def _join_paragraphs(paragraphs: list[str]) -> Iterator[str]:
    current = ""
    for paragraph in paragraphs:
        if current and len(current) + len(paragraph) + 2 > MAX_DOCUMENT_CHARS:
            yield current
            current = ""
        current = f"{current}\n\n{paragraph}" if current else paragraph
    if current:
        yield current


def _topics() -> list[tuple[str, str]]:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return []
    return [(f"topics/{name}", topics[name]) for name in sorted(topics)]


def _licence() -> list[tuple[str, str]]:
    places = [Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt", Path(sysconfig.get_config_var("prefix") or "/") / "LICENSE.txt"]
    return next(([("licence", p.read_text(encoding="utf-8", errors="replace"))] for p in places if p.is_file()), [])


def _stdlib_docstrings() -> Iterator[tuple[str, str, str]]:
    """(qualified name, module, docstring) of everything documented in the standard library's source files."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED_PARTS.intersection(parts) or parts[0] in _SKIPPED_MODULES or parts[0].startswith(("config-", "_sysconfigdata")):
            continue
        module = ".".join(p for p in parts if p != "__init__")
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        public = _PUBLIC_NAMES.get(module, module)
        yield from _docstrings_of(tree, public, public)


def _docstrings_of(node: ast.AST, name: str, group: str) -> Iterator[tuple[str, str, str]]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        doc = ast.get_docstring(node, clean=False)
        if doc:
            yield name, group, doc
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings_of(child, f"{name}.{child.name}", group)
        elif isinstance(child, ast.If | ast.Try | ast.With):
            yield from _docstrings_of(child, name, group)


def _builtin_docstrings() -> Iterator[tuple[str, str, str]]:
    """The same of built-in functions, the methods of built-in types, and some modules written in C."""
    for name, value in sorted(vars(builtins).items()):
        if name.startswith("_") or not (inspect.isclass(value) or inspect.isbuiltin(value)):
            continue
        if value.__doc__:
            yield name, "builtins", value.__doc__
        if inspect.isclass(value) and not issubclass(value, BaseException):
            for method, member in sorted(vars(value).items()):
                if not method.startswith("_") and getattr(member, "__doc__", None):
                    yield f"{name}.{method}", f"builtins.{name}", member.__doc__
    for module_name in _BUILTIN_MODULES:
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            continue
        public = module_name.lstrip("_")
        for name, value in sorted(vars(module).items()):
            if not name.startswith("_") and (inspect.isclass(value) or inspect.isbuiltin(value)) and value.__doc__:
                yield f"{public}.{name}", public, value.__doc__
