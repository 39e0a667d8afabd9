"""A model's config.json."""

from __future__ import annotations

import json
from pathlib import Path

from .errors import UserError


def read(path: Path) -> dict:
    """The keys of the config.json at `path`. Raises UserError where there is no JSON object."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}", expected="a JSON object", found=str(error)) from None
    if not isinstance(config, dict):
        raise UserError(f"cannot read {path}", expected="a JSON object", found=type(config).__name__)
    return config
