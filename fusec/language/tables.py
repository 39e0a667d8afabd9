"""The parser, from a cache of its tables in the user's own folder: building them takes ten times as long as reading them."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from importlib import resources
from pathlib import Path


def lark_parser():
    """lark's parser for `grammar/fuse.lark`. A cache that is absent, stale or unreadable is rebuilt."""
    import lark
    from lark.grammar import Rule
    from lark.indenter import Indenter
    from lark.lexer import TerminalDef

    class Indentation(Indenter):
        NL_type, INDENT_type, DEDENT_type = "_NL", "_INDENT", "_DEDENT"
        OPEN_PAREN_types, CLOSE_PAREN_types = ["LPAR", "LSQB"], ["RPAR", "RSQB"]
        tab_len = 8

    grammar = resources.files("fusec.grammar").joinpath("fuse.lark").read_text(encoding="utf-8")
    file = cache_folder() / f"parser-{hashlib.sha256(f'{lark.__version__} {grammar}'.encode()).hexdigest()[:16]}.json"
    try:
        data, memo = _decode(json.loads(file.read_text(encoding="utf-8")))
        data["options"]["postlex"] = Indentation()
        return lark.Lark._load_from_dict(data, memo)
    except Exception:  # noqa: BLE001 - whatever is wrong with a cache, the grammar is the truth
        pass
    parser = lark.Lark(grammar, parser="lalr", postlex=Indentation(), maybe_placeholders=True, propagate_positions=True)
    data, memo = parser.memo_serialize([TerminalDef, Rule])
    _write(file, json.dumps(_encode((data | {"options": data["options"] | {"postlex": None}}, memo))))
    return parser


def cache_folder() -> Path:
    """The user's folder for what can be computed again."""
    return Path(os.environ.get("FUSEC_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fusec")


def _write(file: Path, text: str):
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=file.parent, delete=False) as temporary:
            temporary.write(text)
        os.replace(temporary.name, file)
    except OSError:
        pass


def _encode(value):
    """JSON knows no integer keys: such a table becomes {"": [key, value, …]}."""
    if isinstance(value, dict):
        if any(not isinstance(key, str) for key in value):
            return {"": [item for key, entry in value.items() for item in (key, _encode(entry))]}
        return {key: _encode(entry) for key, entry in value.items()}
    return [_encode(entry) for entry in value] if isinstance(value, list | tuple) else value


def _decode(value):
    if isinstance(value, dict):
        if "" in value:
            items = value[""]
            return {key: _decode(entry) for key, entry in zip(items[::2], items[1::2], strict=True)}
        return {key: _decode(entry) for key, entry in value.items()}
    return [_decode(entry) for entry in value] if isinstance(value, list) else value
