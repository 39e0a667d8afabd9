"""The command line of the benchmarks: `fusec bench decode | prefill | kernels | attention | startup`."""

from __future__ import annotations

from importlib import import_module

import click

from ..cli import json_option
from ..errors import UsageError


class Numbers(click.ParamType):
    """Whole numbers above zero, with commas between."""

    name = "N,N…"

    def convert(self, value, param, context):
        if isinstance(value, list):
            return value
        try:
            numbers = [int(part) for part in str(value).split(",")]
        except ValueError:
            numbers = [0]
        if min(numbers) < 1:
            self.fail(f"{value!r} is no list of positive integers, such as 1,8", param, context)
        return numbers


def common(command):
    """The options that every benchmark has."""
    for option in (
        json_option("One JSON document on stdout."),
        click.option("--dtype", default="auto", show_default=True, help="bfloat16, float16 or float32."),
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
    ):
        command = option(command)
    return command


def models(default):
    return click.option("--model", "model", default=default, show_default=True, metavar="NAME|DIR[,…]",
                        help="llama-3.1-8b, llama-3.2-1b, qwen3-0.6b, smollm2-135m, or a folder with a config.json.")


def split(model: str) -> list[str]:
    names = [name.strip() for name in model.split(",") if name.strip()]
    if not names:
        raise UsageError("no model was named", expected="--model NAME or --model DIR")
    return names


def show(module: str, function: str, as_json: bool, *args, **options) -> None:
    from .table import emit

    home = import_module(f"fusec.bench.{module}")
    emit(getattr(home, function)(*args, **options), home.COLUMNS, as_json)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def bench():
    """Measure compiled programs against what the machine allows, in the same run. Weights are random, shapes are real."""


@bench.command()
@models("llama-3.1-8b")
@click.option("--batch", type=Numbers(), default="1,8", show_default=True, help="Sequences decoded together.")
@click.option("--context", type=Numbers(), default="512", show_default=True, help="Tokens of each prompt.")
@click.option("--steps", type=click.IntRange(1), default=128, show_default=True, help="Tokens timed.")
@common
def decode(model, batch, context, steps, device, dtype, as_json):
    """Time per output token, and the share of read bandwidth that it reaches."""
    show("decode", "bench_decode", as_json, split(model), batch, context, steps=steps, device=device, dtype=dtype)


@bench.command()
@models("llama-3.1-8b")
@click.option("--tokens", type=Numbers(), default="4096", show_default=True, help="Tokens of the prompt.")
@common
def prefill(model, tokens, device, dtype, as_json):
    """Time to the first token of a prompt, against the vendor's matmul on the same shapes."""
    show("prefill", "bench_prefill", as_json, split(model), tokens, device=device, dtype=dtype)


@bench.command()
@models("llama-3.1-8b")
@click.option("--batch", type=Numbers(), default="1", show_default=True, help="Sequences decoded together.")
@click.option("--context", type=click.IntRange(1), default=512, show_default=True, help="Tokens of history.")
@click.option("--tokens", type=click.IntRange(2), default=None, help="A prefill step of so many tokens instead of decoding.")
@common
def kernels(model, batch, context, tokens, device, dtype, as_json):
    """Each generated kernel of a step: time, bytes, share of the limit, and the .fuse lines it implements."""
    show("kernels", "bench_kernels", as_json, split(model), batch, context, tokens, device=device, dtype=dtype)


@bench.command()
@models("llama-3.1-8b")
@click.option("--batch", type=Numbers(), default="1,8,32,64,128", show_default=True, help="Sequences of the decoding cases.")
@click.option("--context", type=Numbers(), default="1024,8192", show_default=True, help="Tokens of history.")
@click.option("--prefill", "tokens", type=Numbers(), default="2048,8192", show_default=True, help="Lengths of the prefill cases.")
@common
def attention(model, batch, context, tokens, device, dtype, as_json):
    """The paged attention kernels against torch, and FlashInfer where it is installed."""
    show("attention", "bench_attention", as_json, split(model)[0], batch, context, tokens, device=device, dtype=dtype)


@bench.command()
@models("llama-3.1-8b")
@common
def startup(model, device, dtype, as_json):
    """Seconds from the start of Python to the first token: with empty compile caches, and again."""
    show("startup", "bench_startup", as_json, split(model), device=device, dtype=dtype)
