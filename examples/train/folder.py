"""Writes the files that every example model folder has beside its weights."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent
MODELS = EXAMPLES / "models"
INPUTS = EXAMPLES / "inputs"

Scalar = str | int | float
Table = Mapping[str, Scalar | Sequence[str]]


def _value(value: Scalar | Sequence[str]) -> str:
    """One TOML value; JSON's spelling of strings, numbers and lists is also TOML's."""
    return json.dumps(value if isinstance(value, str | int | float) else list(value), ensure_ascii=False)


def _lines(table: Table) -> list[str]:
    return [f"{key} = {_value(value)}" for key, value in table.items()]


def write_description(
    folder: Path,
    head: Table,
    limits: Table,
    budget: Table,
    provenance: Table,
    evaluation: Table,
    golden: Sequence[Table],
) -> None:
    """Write `spillway.toml`, the publisher's description of the folder."""
    lines = _lines(head)
    tables = {"limits": limits, "budget": budget, "provenance": provenance, "provenance.evaluation": evaluation}
    for name, table in tables.items():
        lines += ["", f"[{name}]", *_lines(table)]
    for sample in golden:
        lines += ["", "[[golden]]", *_lines(sample)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spillway.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented UTF-8 JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON object."""
    value = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(value, dict)
    return value
