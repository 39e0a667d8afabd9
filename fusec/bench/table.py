"""Results for a reader (a table) and for a script (one JSON document)."""

from __future__ import annotations

import json
import sys


def emit(document: dict, columns: dict[str, tuple[str, str]], as_json: bool, rows: str = "cases") -> None:
    """Prints `document` to stdout: as JSON, or its list `rows` as a table.  columns: key -> (heading, format)."""
    if as_json:
        print(json.dumps(document, indent=2, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    facts = [f"{key} {value}" for key, value in document.items() if isinstance(value, (str, int, float)) and key != "command"]
    title = f"fusec bench {document['command']}"
    table = Table(title=title, caption=", ".join(facts), title_justify="left", caption_justify="left")
    entries = document[rows]
    shown = {key: column for key, column in columns.items() if any(entry.get(key) is not None for entry in entries)}
    for key, (heading, _) in shown.items():
        table.add_column(heading, justify="left" if any(isinstance(e.get(key), str) for e in entries) else "right")
    for entry in entries:
        table.add_row(*(cell(entry.get(key), form) for key, (_, form) in shown.items()))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def cell(value, form: str) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, str) else format(value, form)


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)
