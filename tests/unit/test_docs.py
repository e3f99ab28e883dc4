"""The pages are true where a machine can tell: links, configuration examples, tables beside the code, named tests."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.config import Config, parse_config
from cloud_sync.gateway.config import GatewaySettings
from cloud_sync.strict_toml import parse_toml
from models.errors import HTTP_STATUS, RETRYABLE
from models.session import _SEQ2SEQ_TASKS, _TASKS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "examples").rglob("*.md"),
        *(ROOT / "systemd").glob("*.md"),
    ]
)
CONFIGS = ROOT / "examples" / "config"
LINK = re.compile(r"\]\(([^()\s]+)\)")
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
NAMED_TEST = re.compile(r"((?:tests|bench)/[\w/]+\.py)(?:::(\w+))?")


def text_of(page: str) -> str:
    return (ROOT / page).read_text("utf-8")


def section(page: str, heading: str) -> str:
    """A page's text from a heading (without its signs) to the next of any depth."""
    found = re.search(rf"^#+ {re.escape(heading)}$(.*?)(?=^#+ |\Z)", text_of(page), re.DOTALL | re.MULTILINE)
    assert found, f"{page} has no heading {heading!r}"
    return found[1]


def rows(text: str) -> list[list[str]]:
    """The cells of every table row, rules and heads left out."""
    lines = [line.strip().strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line] for line in lines]
    return [row for at, row in enumerate(cells) if not set(row[0]) <= set("-: ") and not _is_head(cells, at)]


def _is_head(cells: list[list[str]], at: int) -> bool:
    return at + 1 < len(cells) and set("".join(cells[at + 1])) <= set("-: ") and bool("".join(cells[at + 1]))


def anchors(page: Path) -> set[str]:
    """The anchors that headings make, as GitHub forms them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_link_is_broken(page: Path) -> None:
    for target in LINK.findall(FENCE.sub("", page.read_text("utf-8"))):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(there), f"{page.name}: {target}"


def test_both_readmes_show_the_same_commands_and_tables_of_models() -> None:
    english, chinese = text_of("README.md"), text_of("README.zh.md")
    blocks = [[uncommented(block) for block in FENCE.findall(readme)] for readme in (english, chinese)]
    assert blocks[0] == blocks[1]
    models = [
        re.findall(r"^\| `([a-z0-9-]+)`.*?\| ([a-z-]+) \|", readme, re.MULTILINE) for readme in (english, chinese)
    ]
    assert models[0] == models[1] != []


def uncommented(block: str) -> str:
    """A block without its comments, which each README writes in its own language."""
    return re.sub(r" +# .*$", "", block, flags=re.MULTILINE)


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_a_readme_tells_each_sample_model_with_its_measured_accuracy(page: str) -> None:
    table = {name: row for row in rows(text_of(page)) for name in re.findall(r"^`([a-z0-9-]+)`", row[0])}
    for folder in sorted(path.parent for path in (ROOT / "examples" / "models").glob("*/spillway.toml")):
        described = tomllib.loads((folder / "spillway.toml").read_text("utf-8"))
        row = table[folder.name]
        assert row[1] == described["task"]
        told = re.findall(r"\d+\.\d+", row[3])
        assert told
        assert told == list(measures(described))[: len(told)], f"{folder.name}: {row[3]}"


def measures(described: dict[str, Any]) -> Iterator[str]:
    """The numbers of an evaluation as a README rounds them, in their order."""
    for name, value in described["provenance"]["evaluation"].items():
        if "accuracy" in name:
            yield f"{value * 100:.1f}"
        elif name == "perplexity":
            yield f"{value:.1f}"
        elif isinstance(value, float) and name != "r2":
            yield f"{value:.2f}"


AGENTS_OWN = {"receive_maximum", "clean_start", "session_expiry_s"}
"""Settings of a link that the programs choose themselves; a gateway also the last."""


@pytest.mark.parametrize(
    ("name", "kind", "parse"),
    [
        ("spillway.toml", Config, parse_config),
        ("gateway.toml", GatewaySettings, lambda text: parse_toml(text, GatewaySettings)),
    ],
)
def test_an_example_configuration_names_every_key_with_its_default(
    name: str, kind: type[msgspec.Struct], parse: Callable[[str], object]
) -> None:
    example = (CONFIGS / name).read_text("utf-8")
    everything = re.sub(r"^# (?=[a-z_]+ = )", "", example, flags=re.MULTILINE)
    assert parse(everything) == parse(example), "a commented line is not the default"
    link = tomllib.loads(re.sub(r"^# (?=[a-z_]+ = )", "", text_of("examples/config/spillway.toml"), flags=re.MULTILINE))
    document = tomllib.loads(everything)
    for part, section_kind in sections(kind):
        given = document if not part else document[part]
        if part in {"models", "pools", "bindings"}:
            many = given.values() if isinstance(given, dict) else given
            given = {key: value for one in many for key, value in one.items()}
        if part == "cloud":
            given = link["local"] | given  # the keys that all links have are explained once
        fields = {field.name for field in msgspec.structs.fields(section_kind)}
        lacking = fields - {name for name, _ in sections(kind) if part == ""} - given.keys() - AGENTS_OWN
        assert not lacking, f"[{part}] lacks {lacking}"


def sections(config: type[msgspec.Struct]) -> list[tuple[str, type[msgspec.Struct]]]:
    """The configuration itself under "", and each of its sections."""
    found = [("", config)]
    for field in msgspec.structs.fields(config):
        for kind in (field.type, *getattr(field.type, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
                found += [(field.name, kind)]
    return found


def test_the_protocol_page_has_every_error_code_with_status_and_whether_to_retry() -> None:
    told = {row[0].strip("`"): (int(row[1]), row[2] == "yes") for row in rows(section("docs/protocol.md", "3. Errors"))}
    assert told == {code: (status, code in RETRYABLE) for code, status in HTTP_STATUS.items()}


def test_the_protocol_page_has_every_reason_that_routing_gives() -> None:
    told = {row[0].strip("`") for row in rows(section("docs/protocol.md", "4. Reasons"))}
    assert told == called_with("agent/routing.py", {"_elsewhere": 2, "Route": 1})


def test_the_protocol_page_has_every_task_that_a_worker_can_do() -> None:
    named = {
        name for row in rows(section("docs/protocol.md", "2. Bodies")) for name in re.findall(r"^`([a-z-]+)`$", row[0])
    }
    assert named == {*_TASKS, *_SEQ2SEQ_TASKS, "text-generation"}


def test_the_protocol_page_explains_every_code_that_can_keep_a_version_away() -> None:
    told = set(re.findall(r"`([a-z_]+)`", section("docs/protocol.md", "8. Codes of a version that does not come")))
    for path in (*(ROOT / "cloud_sync").glob("*.py"), *((ROOT / "agent" / f"{name}.py") for name in TELLING)):
        name = str(path.relative_to(ROOT))
        errors = {"TrustError": 0, "FetchError": 0, "StoreError": 0, "Failure": 0}
        assert told_as_code(name) <= told, name
        assert called_with(name, errors) <= told, name


TELLING = ("activation", "supervisor")
"""The agent's modules that say what became of a version."""


def told_as_code(path: str) -> set[str]:
    """The words that a module passes as `code` to what it tells of a model."""
    calls = [node for node in ast.walk(ast.parse(text_of(path))) if isinstance(node, ast.Call)]
    tells = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "tell"]
    given = [word.value for call in tells for word in call.keywords if word.arg == "code"]
    return {word.value for word in given if isinstance(word, ast.Constant) and isinstance(word.value, str)} - {""}


def called_with(path: str, positions: dict[str, int]) -> set[str]:
    """The words that a module passes to these functions, each at its position."""
    words = set()
    for node in ast.walk(ast.parse(text_of(path))):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        at = positions.get(name)
        word = node.args[at] if at is not None and at < len(node.args) else None
        if isinstance(word, ast.Constant) and isinstance(word.value, str):
            words.add(word.value)
    return words


def test_every_promise_names_a_test_or_a_benchmark_that_exists() -> None:
    promises = rows(text_of("docs/specification.md"))
    assert promises
    unheld = [row[0] for row in promises if not NAMED_TEST.search(row[-1])]
    named = {found for row in promises for found in NAMED_TEST.findall(row[-1])}
    assert not unheld
    assert not [f"{path}::{function}" for path, function in sorted(named) if not is_there(path, function)]


def is_there(path: str, function: str) -> bool:
    """Whether a file is there, and has this function if one is named."""
    return (ROOT / path).is_file() and (not function or f"def {function}(" in text_of(path))
