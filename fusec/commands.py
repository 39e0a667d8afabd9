"""The commands that work on source files and models: compile, check, fmt, pull, explain."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import click

from .cli import json_option, print_json, read_config, tell, tell_diagnostics, working
from .codegen.candidates import FORMS, TOKENS
from .diagnostics import Diagnostic, DiagnosticError, as_dict
from .errors import UsageError, UserError

MODEL_HELP = "Sizes from a model folder, a .gguf file or a config.json; else the program's own defaults."


@click.command("compile", short_help="Compile a .fuse program.")
@click.argument("source")
@click.option("--model", metavar="DIR|FILE", help=MODEL_HELP)
@click.option("--target", metavar="sm_NN", help="GPU to write cubins for.  [default: the GPU that is here, else sm_90]")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default="bfloat16", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Build folder.  [default: build/NAME]")
@click.option("--source-only", is_flag=True, help="Write kernels.py and program.py, no cubins.")
@click.option("--print-after", multiple=True, metavar="PASS", help="Print the graph after this pass and stop; may be repeated.")
@click.option("--print-after-all", is_flag=True, help="Print the graph after every pass and stop.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Check the graph's rules between passes.")
@json_option("Print the summary as JSON.")
def compile(source, model, target, dtype, out, source_only, print_after, print_after_all, verify, as_json):
    """Compile SOURCE to a build folder: kernels.py, program.py, the graph as text, cubins and a manifest.

    Needs no checkpoint and no GPU.
    """
    from .compiler import compile as run

    printing = print_after or print_after_all
    if printing:
        check_passes(print_after)
    config = read_config(model)
    warnings = warn(source, config)
    compiled = run(Path(source), config, dtype=dtype, verify=verify, keep_stages=True)
    if printing:
        return print_stages(compiled, print_after)
    from .build import write_build
    from .explain import explain_program

    out = out or Path("build") / Path(source).stem
    with working("writing source") as update:
        report = write_build(
            compiled,
            out,
            target or target_here(),
            source_only,
            lambda done, total: update(f"compiling kernels: {done} of {total}"),
        )
    if as_json:
        return print_json(summary(compiled, warnings) | report.as_dict())
    print(explain_program(compiled, report), end="")
    seconds = ", ".join(f"{name} {time:.1f} s" for name, time in report.seconds.items())
    tell(
        f"\n{out}: {count(len(report.files) + 1, 'file')}"
        + (f", cubins for {report.target}" if report.target else "")
        + f" ({seconds})"
    )


def target_here() -> str:
    """The architecture of the GPU that is here, else sm_90. Asks the driver: torch would take seconds to import."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "sm_90"
    try:
        ask = [tool, "--query-gpu=compute_cap", "--format=csv,noheader"]
        found = subprocess.run(ask, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "sm_90"
    match = re.match(r"(\d+)\.(\d+)", found)
    return f"sm_{match[1]}{match[2]}" if match else "sm_90"


def warn(source, config) -> list[Diagnostic]:
    """The warning for a config that a program does not serve, told on stderr: it may explain an error that follows."""
    from .language import check_architecture, read

    warnings = check_architecture(read(Path(source)), config)
    if warnings:
        tell_diagnostics(warnings, as_json=False)
        tell("")
    return warnings


def summary(compiled, warnings) -> dict:
    """What `explain_program` says, as data: the launches of a step, layers that repeat once, and what was not fused."""
    from .explain import fold, refusals

    return {
        "model": compiled.graph.name,
        "source": str(compiled.source),
        "dtype": compiled.dtype,
        "launches": len(compiled.module.launches),
        "layers": [
            {"name": run.name, "count": run.count, "kernels": [launch.function for launch in run.launches]}
            for run in fold(compiled.module)
        ],
        "not_fused": [{"from": a, "to": b, "why": why, "count": n} for (a, b, why), n in refusals(compiled).items()],
        "warnings": [as_dict(warning) for warning in warnings],
    }


def check_passes(wanted) -> None:
    """Raises UsageError for a pass that does not exist."""
    from .diagnostics import did_you_mean
    from .passes import PIPELINE

    known = list(dict.fromkeys(["elaborate", *(p.__name__ for p in PIPELINE)]))
    for name in wanted:
        if name not in known:
            raise UsageError(f"no pass {name}", expected=", ".join(known), hint=did_you_mean(name, known))


def print_stages(compiled, wanted) -> None:
    """The graph after each wanted pass (none: all of them); layers that repeat are shown once."""
    from .ir.text import print_graph

    for name, graph in compiled.stages:
        if not wanted or name in wanted:
            print(f"# after {name}\n{print_graph(graph, fold_layers=True)}")


@click.command(short_help="Report every mistake in .fuse programs.")
@click.argument("files", nargs=-1, required=True)
@click.option("--model", metavar="DIR|FILE", help=MODEL_HELP)
@json_option("Print the findings as JSON.")
def check(files, model, as_json):
    """Check FILES: parse them, bind their config, work out every dim."""
    config, found = read_config(model), []
    for file in files:
        new = findings(Path(file), config)
        if new and not as_json:
            tell_diagnostics(new, as_json)
            tell("")
        found += new
    errors = sum(diagnostic.level == "error" for diagnostic in found)
    if as_json:
        tell_diagnostics(found, as_json)
    else:
        warned = f", {count(len(found) - errors, 'warning')}" if len(found) > errors else ""
        tell(f"{count(len(files), 'file')} checked, {count(errors, 'error')}{warned}")
    return 3 if errors else 0


def findings(file: Path, config) -> list[Diagnostic]:
    """What is wrong with one program, and what may be."""
    from .language import check_architecture, load, read

    found = []
    try:
        found += check_architecture(read(file), config)
        load(file, config)
    except DiagnosticError as error:
        found += error.diagnostics
    return found


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


@click.command(short_help="Lay out .fuse programs in the one way.")
@click.argument("files", nargs=-1)
@click.option("--check", "check_only", is_flag=True, help="Change nothing; exit 1 if a file would change.")
@click.option("--stdin", "from_stdin", is_flag=True, help="Format standard input to standard output.")
def fmt(files, check_only, from_stdin):
    """Format FILES in place."""
    from .language import format_source

    if from_stdin == bool(files):
        raise UsageError(
            "fmt formats files, or standard input", expected="FILES, or --stdin", found="both" if files else "neither"
        )
    if from_stdin:
        text = sys.stdin.read()
        formatted = format_source(text, "<stdin>")
        if not check_only:
            sys.stdout.write(formatted)
        return int(check_only and formatted != text)
    changed = 0
    for file in files:
        text = read_text(file)
        formatted = format_source(text, file)
        if formatted != text:
            changed += 1
            tell(f"{'would format' if check_only else 'formatted'} {file}")
            if not check_only:
                Path(file).write_text(formatted, encoding="utf-8")
    return int(check_only and changed > 0)


def read_text(file) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {file}", found=error.strerror) from None
    except UnicodeDecodeError:
        raise UserError(f"cannot read {file}", expected="UTF-8 text", found="other bytes") from None


@click.command(short_help="Fetch a model into the user's cache.")
@click.argument("name", default="smollm2")
def pull(name):
    """Fetch the model NAME (smollm2: SmolLM2-135M-Instruct, the default model) and print where it lies."""
    from fusec.runtime.hub import pull as fetch

    clock = time.perf_counter()
    path = fetch(name)
    tell(f"{name}: {path.stat().st_size / 1e6:.0f} MB, checked against its hash, {time.perf_counter() - clock:.1f} s")
    print(path)


@click.command(short_help="Explain a diagnostic (FUS021), or how a program compiles.")
@click.argument("subject", metavar="FUS0xx|FILE.fuse")
@click.option("--model", metavar="DIR|FILE", help=MODEL_HELP)
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default="bfloat16", show_default=True)
@json_option("Print JSON.")
def explain(subject, model, dtype, as_json):
    """Explain a diagnostic code, or what becomes of a program: kernels per layer, what was fused, what was not and why.

    Compiles no cubins; fusec compile adds registers, spills and shared memory.
    """
    if re.fullmatch(r"(?i)fus\d*", subject):
        from .language.codes import explain as text_of
        from .language.codes import registry

        text = text_of(subject)
        if as_json:
            code = registry()[subject.upper()]
            return print_json(
                {"code": code.code, "title": code.title, "text": code.text, "wrong": code.wrong, "right": code.right}
            )
        return print(text)
    from .compiler import compile as run
    from .explain import explain_program

    config = read_config(model)
    warnings = warn(subject, config)
    compiled = run(Path(subject), config, dtype=dtype)
    if as_json:
        return print_json(summary(compiled, warnings))
    print(explain_program(compiled), end="")


@click.command(short_help="Measure tiles for a model's shapes on this GPU.")
@click.argument("model", metavar="NAME|DIR")
@click.option("--budget", type=click.FloatRange(10), default=120.0, show_default=True, help="Seconds.")
@click.option("--form", "forms", multiple=True, type=click.Choice(FORMS), help="Only these forms.")
@click.option("--tokens", multiple=True, type=click.Choice(list(map(str, TOKENS["skinny"]))),
              help="Of the tiles for a few tokens, only those for up to so many.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16"]), default="bfloat16", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="The table.  [default: this GPU's, in the package]")
def tune(model, budget, forms, tokens, dtype, out):
    """Measure tiles for every contraction of MODEL (a name that bench knows, or a folder with a config.json; random weights).

    A tile is taken only if its results agree with another's. The table is written per GPU and merged with what it holds.
    """
    import torch

    from fusec.runtime.program import load_program

    from .bench.engine import need_gpu
    from .bench.shapes import config_of
    from .codegen import schedule
    from .tune import Tuner, write_table

    device = need_gpu("auto", "fusec tune")
    name, config = config_of(model)
    out = out or schedule.TABLES / f"{schedule.gpu_key(torch.cuda.get_device_name(device))}.json"
    with working(f"loading {name}"):
        program = load_program(config, load_format="random", dtype=dtype, device=device, max_tokens=4096)
    tuner = Tuner(program, say=tell)
    table = tuner.run(budget, forms or FORMS, lambda function, form, n, us, tiles: tell(
        f"{function}, {form} of {n} token{'s' if n > 1 else ''}: {us:.2f} µs with {tiles}"), tokens=[int(n) for n in tokens])
    write_table(table, out)
    print(out)
