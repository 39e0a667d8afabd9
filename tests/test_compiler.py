"""What the compiler refuses before it begins."""

import pytest

from fusec.compiler import compile
from fusec.errors import UserError

OTHER_INPUT = """\
config
  D = hidden_size ?? 64

model M(x: [T, D]) -> [T, D]
  x * x
"""


@pytest.mark.parametrize("named", [[3], "LlamaForCausalLM", [], None])
def test_a_config_must_name_its_architecture(named):
    with pytest.raises(UserError, match="names no architecture"):
        compile(None, {"architectures": named})


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_model_takes_ids_and_positions(backend):
    with pytest.raises(UserError, match="the model asks for x"):
        compile(OTHER_INPUT, None, backend=backend)
