"""The generated op table of the reference."""

from pathlib import Path

import pytest

from fusec.ir.interpreter import torch_function
from fusec.ir.ops import OPS
from fusec.ir.optable import KINDS, missing, table
from fusec.ir.verify import ATTRS


def test_the_committed_table_is_current():
    committed = Path(__file__).parents[2] / "docs" / "ops.md"
    assert committed.read_text(encoding="utf-8") == table(), "run: python -m fusec.ir.optable > docs/ops.md"


@pytest.mark.parametrize("op", OPS.values(), ids=list(OPS))
def test_every_op_has_every_column(op):
    assert op.kind in KINDS
    assert missing(op) == []
    assert all(name in op.doc for name in ATTRS.get(op.name, {}))
    if op.kind == "elementwise" and op.name not in ATTRS:
        torch_function(op.name)
        assert all(f"{{{i}}}" in text for text in (op.triton, op.torch) for i in range(op.arity))
