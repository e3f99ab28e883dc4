"""English documentation from Debian and Python packages: paragraphs, and questions with the answers that they hold.

A page is one file of a package. Pages, not lines, are held out.
"""

import ast
import gzip
import hashlib
import html
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from debian import members

MANUALS = (
    "apt", "bash", "bind9-dnsutils", "coreutils", "cron", "curl", "diffutils", "dpkg", "e2fsprogs", "findutils", "gawk",
    "git-man", "gnupg", "grep", "gzip", "iproute2", "iptables", "less", "login", "man-db", "manpages", "manpages-dev",
    "mosquitto", "mosquitto-clients", "mount", "net-tools", "nftables", "openssh-client", "openssl", "passwd",
    "podman", "postgresql-client-15", "procps", "rsync", "sed", "sqlite3", "strace", "sudo", "systemd", "tar",
    "tcpdump", "tmux", "udev", "util-linux", "wget", "xz-utils", "zstd",
)  # fmt: skip
LIBRARIES = ("numpy", "scipy", "sklearn", "pandas", "statsmodels")
SPACE = re.compile(r"\s+")
TAG = re.compile(r"<[^<>]*>")
BLOCK = re.compile(r"<p\b[^>]*>(.*?)</p>", re.DOTALL)
TITLE = re.compile(r"<title>([^<]*)</title>")
ROLE = re.compile(r":[\w:+-]+:`[~!]?([^`<]*?)\s*(?:<[^`]*>)?`")
LINK = re.compile(r"`([^`<]+?)\s*(?:<[^`]*>)?`_{0,2}")
DIRECTIVE = re.compile(r"^(\s*)\.\. (?:py:)?(\w+):: (.+)$")
MACRO = re.compile(r"^\.(?:B|I|BR|RB|IR|RI|BI|IB|SM|SB)\s+(.*)$")
ABBREVIATIONS = ("e.g.", "i.e.", "etc.", "vs.", "cf.", "Mr.", "St.", "approx.", "viz.")
ASK = {
    "function": ("What does {}() do?", "Explain {}().", "What is {}() for?", "How does {}() work?"),
    "method": ("What does {}() do?", "Explain the method {}().", "What is {}() for?"),
    "class": ("What is {}?", "What is the class {} for?", "Explain {}."),
    "exception": ("When is {} raised?", "What is {}?"),
    "data": ("What is {}?", "What does {} mean?"),
    "attribute": ("What is {}?", "What does {} mean?"),
    "module": ("What is the {} module for?", "What does the {} module do?", "Tell me about {} in Python."),
    "command": ("What does {} do?", "What is {}?", "What is {} for?", "Explain {}."),
    "call": ("What does {}() do?", "What is {} for?", "Explain {}()."),
    "option": ("What does the option {} do?", "What is the option {} for?"),
    "task": ("How do I {}?", "How can I {}?"),
}
KINDS = {"staticmethod": "method", "classmethod": "method", "c:function": "function"}


@dataclass(frozen=True)
class Pair:
    """A question of a kind (a key of `ASK`) about a name, and its answer."""

    kind: str
    name: str
    answer: str


@dataclass
class Page:
    """One file of documentation."""

    name: str
    passages: list[str] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)


def first_sentence(text: str, most: int = 240) -> str:
    """The first sentence, ending in a full stop; empty if it is too long or no sentence."""
    for found in re.finditer(r"[.:](?=\s|$)", text):
        part = text[: found.end()]
        if not part.endswith(ABBREVIATIONS):
            part = part[:-1] + "."
            return part if 15 <= len(part) <= most and part[0].isalpha() else ""
    return ""


def tidy(text: str) -> str:
    """Reduce white space, and quotation marks and dashes to plain ones."""
    for old, new in (
        ("\u2019", "'"),
        ("\u2018", "'"),
        ("\u201c", '"'),
        ("\u201d", '"'),
        ("\u2014", "-"),
        ("\xa0", " "),
    ):
        text = text.replace(old, new)
    return SPACE.sub(" ", text).strip()


def is_prose(text: str) -> bool:
    """Whether the paragraph is English sentences in plain ASCII rather than a table or code."""
    letters = sum(character.isalpha() or character == " " for character in text)
    return len(text) >= 60 and text.isascii() and letters > 0.85 * len(text) and text[-1] in ".:!?"


def _plain_rst(text: str) -> str:
    text = ROLE.sub(r"\1", text)
    text = LINK.sub(r"\1", text).replace("``", "").replace("**", "").replace("\\", "")
    return tidy(re.sub(r"\*(\w[^*]*)\*|\|(\w+)\|", lambda m: m[1] or m[2], text))


def _rst_blocks(source: str) -> list[str]:
    return [block for block in re.split(r"\n\s*\n", source) if block.strip()]


def python_page(name: str, source: str) -> Page:
    """A page of the Python documentation (reStructuredText)."""
    page = Page(name)
    blocks = _rst_blocks(source)
    for block, following in zip(blocks, [*blocks[1:], ""], strict=True):
        heading = re.search(r":mod:`!?([\w.]+)` --- (.+)", block)
        if heading:
            about = _plain_rst(heading[2]).rstrip(".")
            page.pairs.append(Pair("module", heading[1], f"The {heading[1]} module: {about}."))
        found = DIRECTIVE.match(block.splitlines()[0])
        kind = KINDS.get(found[2], found[2]) if found else ""
        if found and kind in ASK and not following.strip().startswith(".."):
            answer = first_sentence(_plain_rst(following))
            called = re.split(r"[(\s]", found[3].strip())[0]
            if answer and re.fullmatch(r"[\w.]+", called):
                page.pairs.append(Pair(kind, called, answer))
        text = _plain_rst(block)
        if (
            not found
            and "::" not in block
            and not block.lstrip().startswith(("..", ">>>", "+", "=", "|"))
            and is_prose(text)
        ):
            page.passages.append(text)
    return page


def _plain_man(line: str) -> str:
    found = MACRO.match(line)
    line = found[1].replace('" "', "").replace('"', "") if found else line
    line = re.sub(r"\\f(?:\[\w*\]|\(\w\w|.)|\\[&|^/,:%]|\\s[-+]?\d", "", line)
    line = re.sub(
        r"\\\((\w\w|[^ ]{2})|\\\[\w+\]", lambda m: {"aq": "'", "lq": '"', "rq": '"'}.get(m[1] or "", ""), line
    )
    return line.replace("\\-", "-").replace("\\e", "\\").replace("\\'", "'").replace("\\~", " ").replace("\\ ", " ")


def _man_sections(source: str) -> dict[str, list[tuple[str, str]]]:
    """Each section's paragraphs as (tag, text); the tag is an option's or empty."""
    sections: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] = []
    lines: list[str] = []
    tag, wants_tag, example = "", False, False
    for raw in [*source.splitlines(), ".PP"]:
        if raw.startswith((".nf", ".EX")):
            example = True
        if raw.startswith((".fi", ".EE")):
            example = False
        if (
            raw.startswith((".SH", ".SS", ".PP", ".P", ".LP", ".TP", ".IP", ".HP", ".sp", ".RS", ".RE"))
            and raw[:3] != ".PD"
        ):
            if lines:
                current.append((tag, tidy(" ".join(lines))))
                lines, tag = [], ""
            if raw.startswith(".SH"):
                current = sections.setdefault(raw[3:].strip().strip('"').upper(), [])
            wants_tag = raw.startswith(".TP")
            tag = (
                tidy(_plain_man(raw[3:].strip().split('"')[1]))
                if raw.startswith('.IP "') and raw.count('"') > 1
                else tag
            )
        elif example or raw.startswith(("'", '.\\"')) or (raw.startswith(".") and not MACRO.match(raw)):
            continue
        elif wants_tag:
            tag, wants_tag = tidy(_plain_man(raw)), False
        else:
            lines.append(_plain_man(raw))
    return sections


def manual_page(name: str, source: str) -> Page:
    """A page of the manual (troff with the man macros)."""
    page = Page(name)
    sections = _man_sections(source)
    naming = re.match(r"([\w.+-]+)(?:, [^ ]+)* - (.+)", " ".join(text for _, text in sections.get("NAME", [])))
    described = next((text for _, text in sections.get("DESCRIPTION", []) if is_prose(text)), "")
    command = naming[1] if naming else ""
    if naming and naming[2].isascii():
        short = f"{command}: {naming[2].rstrip('.')}."
        call = "call" if re.search(r"\.[23]\w*$", name) else "command"
        page.pairs.append(Pair(call, command, f"{short} {first_sentence(described)}".strip()))
    for paragraphs in sections.values():
        for tag, text in paragraphs:
            answer = first_sentence(text) if tag.startswith("-") and command and text.isascii() else ""
            if answer and len(tag) < 40:
                page.pairs.append(Pair("option", f"{tag} of {command}", answer))
            if is_prose(text):
                page.passages.append(text)
    return page


def markup_page(name: str, source: str) -> Page:
    """A page of HTML or Mallard; a title that names a task makes a question."""
    page = Page(name)
    page.passages = [
        text for text in (tidy(html.unescape(TAG.sub("", p))) for p in BLOCK.findall(source)) if is_prose(text)
    ]
    title = tidy(TITLE.findall(source)[-1]) if TITLE.findall(source) else ""
    task = re.fullmatch(r"([A-Z][a-z]+) ((?:a|an|the|your|files|to|how) .*[a-z])", title)
    if task and page.passages and not task[1].endswith(("ing", "s")):
        page.pairs.append(Pair("task", f"{task[1].lower()} {task[2]}", first_sentence(page.passages[-1]) or ""))
    page.pairs = [pair for pair in page.pairs if pair.answer]
    return page


def library_page(name: str, source: str) -> Page:
    """A module of a Python library: its docstrings."""
    page = Page(name)
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
            continue
        text = re.split(r"\n\s*[-=]{3,}|\n\s*(?:Parameters|Returns|Examples)\b", ast.get_docstring(node) or "")[0]
        blocks = [_plain_rst(block) for block in _rst_blocks(text) if ".. " not in block]
        answer = first_sentence(blocks[0] if blocks and blocks[0].endswith(".") else f"{blocks[0]}." if blocks else "")
        if answer and answer.isascii() and not isinstance(node, ast.Module) and not node.name.startswith("_"):
            page.pairs.append(Pair("class" if isinstance(node, ast.ClassDef) else "function", node.name, answer))
        page.passages += [block for block in blocks if is_prose(block)]
    return page


def _libraries() -> Iterator[Page]:
    for library in LIBRARIES:
        found = importlib.util.find_spec(library)
        assert found is not None
        assert found.origin is not None
        root = Path(found.origin).parent
        for path in sorted(root.rglob("*.py")):
            if not {"tests", "_vendor", "externals"} & set(path.parts):
                yield library_page(str(path.relative_to(root.parent)), path.read_text("utf-8", "replace"))


def _text(data: bytes) -> str:
    return (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8", "replace")


def pages() -> Iterator[Page]:
    """Every page."""
    for found, data in members("python3.11-doc", r"\./usr/share/doc/python3\.11/html/_sources/(.*)\.rst\.txt"):
        if not found[1].startswith(("whatsnew", "about", "license")):
            yield python_page(f"python/{found[1]}", _text(data))
    for package in MANUALS:
        for found, data in members(package, r"\./usr/share/man/man\d/(.*)\.gz"):
            yield manual_page(f"{package}/{found[1]}", _text(data))
    for found, data in members("gnome-user-docs", r"\./usr/share/help/C/(.*)\.page"):
        yield markup_page(f"gnome/{found[1]}", _text(data))
    for found, data in members("debian-handbook", r"\./usr/share/doc/debian-handbook/html/en-US/(.*)\.html"):
        yield markup_page(f"handbook/{found[1]}", _text(data))
    yield from _libraries()


def held_out(page: Page) -> bool:
    """Whether the page is one of the twentieth that training never sees."""
    return hashlib.sha256(page.name.encode()).digest()[0] % 20 == 0


def load() -> tuple[list[Page], list[Page]]:
    """Pages to train on and held-out pages, without repeated answers or passages."""
    seen: set[str] = set()
    parts: tuple[list[Page], list[Page]] = ([], [])
    for page in pages():
        answers = {pair.answer: pair for pair in page.pairs if pair.answer not in seen}
        page.pairs = list(answers.values())
        page.passages = [text for text in dict.fromkeys(page.passages) if text not in seen]
        seen.update(answers, page.passages)
        if page.pairs or page.passages:
            parts[held_out(page)].append(page)
    return parts
