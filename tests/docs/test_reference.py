"""docs/reference/ is what the code generates, and tells something of every key, command and option."""

from __future__ import annotations

import re

import pytest
from documents import ROOT, generator

from cascade.config import Config


@pytest.fixture(scope="module")
def pages():
    return generator().pages()


def test_the_pages_in_the_repository_are_those_that_the_code_generates(pages):
    folder = ROOT / "docs/reference"
    assert {p.name for p in folder.iterdir()} == set(pages)
    for name, text in pages.items():
        assert (folder / name).read_text(encoding="utf-8") == text, f"docs/reference/{name} is old: run `make docs`"


def test_every_row_says_what_it_is(pages):
    for name, text in pages.items():
        rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| key", "| arg"))]
        assert len(rows) > 20
        for row in rows:
            about = re.split(r"(?<!\\)\|", row)[-2].strip()
            is_choice = row.startswith("| `{")  # its subcommands have sections of their own
            assert about or is_choice, f"{name} says nothing of {row}"


def test_every_key_of_every_section_is_there_once(pages):
    schema = Config.model_json_schema()
    for section, definition in {"Config": schema, **schema["$defs"]}.items():
        for key in definition["properties"]:
            assert pages["config.md"].count(f'<a id="{section.lower()}.{key}"></a>') == 1


def test_every_link_within_a_page_has_its_anchor(pages):
    for text in pages.values():
        for anchor in re.findall(r"\]\(#([^)]+)\)", text):
            assert f'<a id="{anchor}"></a>' in text


def test_sections_that_stand_in_several_places_name_them_all(pages):
    assert "## `probe.lora`, `training.lora`" in pages["config.md"]
    assert "## `tiers[].endpoints[]`, `judge.model.endpoints[]`" in pages["config.md"]


def test_defaults_and_bounds_are_those_of_the_config(pages):
    text = pages["config.md"]
    assert "`folds` | integer ≥ 2 | `2` |" in text
    assert "`lora` | [section](#lora) | `{rank: 8, epochs: 2.0}` |" in text
    assert "`mode` | `live`, `batch` | `live` |" in text
    assert "`budget_usd` | number ≥ 0 | required |" in text
