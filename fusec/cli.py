"""The command line: `fusec compile llama.fuse`, `fusec run --prompt …` and their neighbours.

Commands are imported when they are called, so that `fusec --help` answers at once. Results go to stdout, everything else to
stderr. Exit statuses: 0 ok, 1 failed, 2 usage, 3 diagnostics in a source, 4 verification mismatch, 5 no device or not enough
memory, 130 interrupted.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import click

from . import __version__, config_file
from .diagnostics import DiagnosticError, as_dict, render
from .errors import UserError

# command -> (where it lives, what it does)
COMMANDS = {
    "compile": ("fusec.commands", "Compile a .fuse program: source, cubins and a summary."),
    "check": ("fusec.commands", "Report every mistake in .fuse programs."),
    "fmt": ("fusec.commands", "Lay out .fuse programs in the one way."),
    "run": ("fusec.run", "Answer a prompt."),
    "pull": ("fusec.commands", "Fetch a model into the user's cache."),
    "explain": ("fusec.commands", "Explain a diagnostic (FUS021), or how a program compiles."),
    "tune": ("fusec.commands", "Measure tiles for a model's shapes on this GPU."),
    "doctor": ("fusec.doctor", "Say what is installed, what is missing, and how to mend it."),
    "bench": ("fusec.bench.cli", "Measure decoding, prefill and kernels."),
}  # fmt: skip


class Commands(click.Group):
    """The table above as a click group. A command's module is imported only when the command is called."""

    def list_commands(self, context):
        return list(COMMANDS)

    def get_command(self, context, name):
        if name not in COMMANDS:
            return None
        command = getattr(import_module(COMMANDS[name][0]), name)
        command.context_settings.setdefault("help_option_names", ["-h", "--help"])
        return command

    def invoke(self, context):
        try:
            return super().invoke(context)
        except DiagnosticError as error:  # told here, where the context still knows whether JSON was asked for
            tell_diagnostics(error.diagnostics, context.meta.get(JSON, False))
            return error.exit_code

    def resolve_command(self, context, args):
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            raise click.UsageError(f"no command {args[0]}" + (f"\nhint: did you mean {near[0]}?" if near else ""), context)
        return super().resolve_command(context, args)

    def format_commands(self, context, formatter):
        with formatter.section("Commands"):
            formatter.write_dl([(name, help) for name, (_, help) in COMMANDS.items()])


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, "-V", "--version", message="fusec %(version)s")
def cli():
    """A compiler from a one-page description of a transformer to a fast, readable inference program.

    \b
    fusec pull smollm2                          fetch the default model, once
    fusec run --prompt "What is a GPU?"         answer with it
    fusec compile examples/llama.fuse           see the kernels that a model becomes
    """


def main(argv: list[str] | None = None, program: str = "fusec") -> int:
    """Runs one command line and returns its exit status. Every error a user can cause is told once, without a traceback."""
    try:
        status = cli.main(argv, prog_name=program, standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        tell(usage_text(error))
        return 2
    except (KeyboardInterrupt, click.Abort):
        return 130
    except BrokenPipeError:  # the reader has seen enough; nothing is left to say, nor to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except UserError as error:
        tell(paint(str(error)))
        return error.exit_code
    except MemoryError:
        tell(paint("error: not enough memory\nhint: take a smaller model or another dtype"))
        return 5
    except Exception as error:
        return unexpected(error)


def unexpected(error: Exception) -> int:
    """What no check foresaw: the device's memory, or a bug of ours, told in one line."""
    if os.environ.get("FUSEC_DEBUG"):
        import traceback

        traceback.print_exception(error)
        return 1
    if type(error).__name__ == "OutOfMemoryError":
        hint = "lower --max-model-len, or take a smaller model"
        tell(paint(f"error: not enough memory on the device\n  found: {first_line(error)}\nhint: {hint}"))
        return 5
    if type(error).__name__ == "VerifyError":
        tell(paint(f"error: this is a bug in fusec: a pass broke a rule of the graph\n  found: {error}"))
        return 4
    tell(paint(f"error: this is a bug in fusec: {type(error).__name__}: {first_line(error)}\nhint: FUSEC_DEBUG=1 shows where"))
    return 1


def usage_text(error: click.ClickException) -> str:
    """click's errors in the form of ours."""
    if type(error).__name__ == "NoArgsIsHelpError":  # a group alone: the message is its help
        return error.format_message()
    message = error.format_message().replace("\n\n", "\n").strip()
    text = f"error: {message[:1].lower()}{message[1:]}".rstrip(".")
    possible = getattr(error, "possibilities", None)
    if possible:
        text = f"error: no such option {error.option_name}\nhint: did you mean {' or '.join(sorted(possible))}?"
    context = getattr(error, "ctx", None)
    if context is not None and "hint:" not in text:
        text += f"\nhint: {context.command_path} --help"
    return paint(text)


def first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0]


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def colored(stream) -> bool:
    """Whether to colour what goes to `stream`: only for a terminal, and never under NO_COLOR (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str) -> str:
    """An error message with its first word in colour, where colour is wanted."""
    head, mark, rest = text.partition("error:")
    return f"{head}\x1b[1;31merror\x1b[0m:{rest}" if mark and colored(sys.stderr) else text


def print_json(value) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


JSON = "fusec.json"  # in click's context: whether this command line asks for JSON


def json_option(help):
    """The option --json: results, and what is wrong with a source, go to stdout as JSON. `main` tells the latter by itself."""

    def remember(context, parameter, value):
        context.meta[JSON] = value
        return value

    return click.option("--json", "as_json", is_flag=True, callback=remember, help=help)


def tell_diagnostics(diagnostics, as_json: bool) -> None:
    """What the compiler found: for a reader on stderr, or as a list of JSON objects on stdout."""
    if as_json:
        print_json([as_dict(diagnostic) for diagnostic in diagnostics])
    elif diagnostics:
        tell("\n\n".join(render(diagnostic, colored(sys.stderr)) for diagnostic in diagnostics))


def read_config(model: str | None) -> dict | None:
    """The config of a folder, a .gguf file, a config.json, or a model that fusec can find; None for None. Reads no weights."""
    if model is None:
        return None
    path = Path(model).expanduser()
    if not path.is_file() or path.suffix == ".gguf":
        from fusec.runtime.hub import resolve

        path = resolve(model)
    if path.suffix == ".gguf":
        from fusec.runtime.checkpoint import open_checkpoint

        return open_checkpoint(path).config
    return config_file.read(path / "config.json" if path.is_dir() else path)


@contextmanager
def working(text: str, told: bool = True):
    """Shows on a terminal that something takes time; yields a function that changes the text."""
    if not told or not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console

    with Console(stderr=True).status(text) as status:
        yield status.update
