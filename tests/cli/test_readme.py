"""What the README shows is what the compiler reads and writes, and its links lead somewhere."""

import re
from pathlib import Path

from fusec.compiler import compile
from fusec.explain import explain_program

ROOT = Path(__file__).parents[2]
BLOCK = r"(<!-- {kind}: (\S+) -->\n```python\n)(.*?)(```\n)"


def test_the_excerpt_of_a_program_is_real():
    ((_, file, text, _),) = re.findall(BLOCK.format(kind="fuse"), (ROOT / "README.md").read_text(), re.S)
    assert text in (ROOT / file).read_text()


def test_the_excerpt_of_a_kernel_is_real(golden):
    """pytest --update-golden writes the kernel as it is now into the README."""
    source = compile(ROOT / "examples" / "llama.fuse").module.kernels_py

    def current(block):
        name = block[2]
        function = re.search(rf"^@triton\.jit[^\n]*\ndef {name}\(.*?(?=\n\n\n|\Z)", source, re.M | re.S)[0]
        return f"{block[1]}{function.rstrip()}\n{block[4]}"

    golden("../../README.md", re.sub(BLOCK.format(kind="kernel"), current, (ROOT / "README.md").read_text(), flags=re.S))


def test_the_excerpt_of_what_explain_says_is_real():
    ((shown,),) = [re.findall(r"^\$ fusec explain examples/llama\.fuse\n(.*?)```", (ROOT / "README.md").read_text(), re.M | re.S)]
    said = explain_program(compile(ROOT / "examples" / "llama.fuse"))
    for line in shown.splitlines():
        assert line == "…" or line in said.splitlines()


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = re.sub(r"```.*?```|`[^`\n]*`(?!\])", "", page.read_text(), flags=re.S)
        for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
