"""The text rules of the house, over every file that is or would be committed; prints what breaks one, exits 1 then."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 60
LONG_MODULE_REASON = "# Long because "
"""A comment that starts so, in a module over the limit, says why it is not two."""

MAX_MODELS_BYTES = 6_000_000
"""All committed sample models together."""

# Character classes keep these patterns from matching this file.
FORBIDDEN = (
    (re.compile(r"\b(TO[D]O|FIX[M]E|XX[X])\b"), "unfinished work"),
    (re.compile(r"(files\.python[h]osted|py[p]i|registry\.np[m]js|deb\.debia[n])\.or[g]"), "a registry's host"),
    (re.compile(r"(?<![\w.])/(wor[k]|roo[t]|hom[e]/\w+)/"), "a path of one machine"),
    (re.compile(r"pytest\.(mark\.)?(ski[p]|xfai[l])"), "a test that hides something"),
)
PACKAGES = ("agent/", "cloud_sync/", "models/")
SAMPLES = "examples/models/"


def committed_files(root: Path) -> list[str]:
    """Paths, relative to root, of all files that git tracks or would add."""
    command = [
        "git",
        "-c",
        "safe.directory=*",
        "-C",
        str(root),
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return sorted(name for name in set(listed.split("\0")) if name and (root / name).is_file())


def text_faults(name: str, text: str) -> Iterator[str]:
    """Say what a file's text breaks, one line each."""
    for number, line in enumerate(text.splitlines(), 1):
        for pattern, meaning in FORBIDDEN:
            if pattern.search(line):
                yield f"{name}:{number}: {meaning}: {line.strip()[:80]}"


def module_faults(name: str, text: str) -> Iterator[str]:
    """Say where a Python module or one of its functions is too long."""
    lines = text.count("\n")
    if name.startswith(PACKAGES) and lines > MAX_MODULE_LINES and LONG_MODULE_REASON not in text:
        yield f"{name}: {lines} lines; over {MAX_MODULE_LINES} wants `{LONG_MODULE_REASON}...`"
    for node in ast.walk(ast.parse(text, name)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES and not name.startswith("examples/train/"):
                yield f"{name}:{node.lineno}: `{node.name}` has {length} lines; at most {MAX_FUNCTION_LINES}"


def faults(root: Path, names: list[str]) -> Iterator[str]:
    """Say everything that is wrong with these files."""
    for name in names:
        try:
            text = (root / name).read_text("utf-8")
        except UnicodeDecodeError:  # a model, an image
            continue
        if not name.startswith(SAMPLES) and name != "LICENSE":
            yield from text_faults(name, text)
        if name.endswith(".py"):
            yield from module_faults(name, text)
    size = sum((root / name).stat().st_size for name in names if name.startswith(SAMPLES))
    if size > MAX_MODELS_BYTES:
        yield f"{SAMPLES}: {size} bytes; at most {MAX_MODELS_BYTES}"


def main() -> int:
    """Check the repository that this file lies in."""
    root = Path(__file__).resolve().parent.parent
    names = committed_files(root)
    found = list(faults(root, names))
    for line in found:
        print(line)
    print(f"text rules: {len(names)} files, {len(found)} faults")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
