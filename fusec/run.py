"""`python -m fusec.run --prompt …`: one answer, streamed.

Tokens go to stdout; what was loaded, compiled and measured goes to stderr.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

import click

from .cli import json_option, main, print_json, read_config, tell, working
from .commands import warn
from .errors import UsageError


@click.command(short_help="Answer a prompt.")
@click.option("--prompt", metavar="TEXT", help="What to answer; - reads standard input.")
@click.option(
    "--model",
    metavar="MODEL",
    help="A folder, a .gguf file, a Hugging Face id, or a name that fusec pull knows.  [default: smollm2]",
)
@click.option("--system", metavar="TEXT", help="A system message, before the prompt.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it stands, without the model's chat template.")
@click.option("--max-tokens", type=int, default=512, show_default=True, help="Longest answer, in tokens.")
@click.option(
    "--temperature",
    type=float,
    default=0.0,
    show_default=True,
    help="0 takes the most probable token: the same answer every time.",
)
@click.option(
    "--top-p", type=float, default=1.0, show_default=True, help="Draw from the smallest set of tokens of this probability."
)
@click.option("--top-k", type=int, default=0, show_default=True, help="Draw from the K best tokens; 0: from all.")
@click.option("--seed", type=int, default=0, show_default=True, help="Above temperature 0, the same seed gives the same answer.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="auto: float32 on a CPU; on a GPU the checkpoint's own half precision.",
)
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:N]", help="auto: the GPU if there is one.")
@click.option(
    "--source", metavar="FILE.fuse", help="The program of the model.  [default: found by the checkpoint's architecture]"
)
@click.option("--max-model-len", type=int, metavar="N", help="Longest prompt and answer together, in tokens.")
@click.option("--enforce-eager", is_flag=True, help="On a GPU: no CUDA graphs.")
@click.option("--offline", is_flag=True, help="Never ask the Hugging Face Hub.")
@click.option("--quiet", "-q", is_flag=True, help="Print the answer and nothing else.")
@json_option("Print one JSON object when the answer is complete.")
def run(prompt, model, system, raw, as_json, **options):
    """Answer a prompt with a compiled model.

    \b
    fusec run --prompt "What is a GPU? Answer in two sentences."
    fusec run --model ./Qwen3-0.6B --prompt - < question.txt
    """
    if prompt is None:
        expected, hint = "--prompt TEXT, or --prompt - for standard input", 'fusec run --prompt "What is a GPU?"'
        raise UsageError("there is no prompt", expected=expected, hint=hint)
    if raw and system:
        raise UsageError("--system needs a chat template, and --raw leaves it out", hint="drop one of them")
    if not (prompt := sys.stdin.read() if prompt == "-" else prompt).strip():
        raise UsageError("the prompt is empty", expected="some text")
    session = Session(model, options, told=not (options["quiet"] or as_json))
    conversation = [{"role": "system", "content": system}] if system else []
    session.answer(prompt if raw else [*conversation, {"role": "user", "content": prompt}], as_json)


class Session:
    """One model, loaded, and what there is to say about it. options: the command line's. told: whether to say it."""

    def __init__(self, model: str | None, options: dict, *, told: bool):
        from fusec.runtime.hub import resolve

        self.options, self.told = options, told
        self.params = None
        path = resolve(model, options["offline"])
        if options["source"] and not options["quiet"]:
            warn(options["source"], read_config(path))
        self.name = path.name if path.suffix == ".gguf" else model
        clock = time.perf_counter()
        with working(f"loading {self.name}", told) as update:
            from fusec.runtime.llm import LLM
            from fusec.runtime.sampling import SamplingParams

            self.params = SamplingParams(
                **{name: options[name] for name in ("max_tokens", "temperature", "top_p", "top_k", "seed")}
            )
            self.imports = time.perf_counter() - clock
            self.llm = LLM(
                path,
                source=options["source"],
                dtype=options["dtype"],
                device=options["device"],
                offline=options["offline"],
                max_model_len=options["max_model_len"],
                enforce_eager=options["enforce_eager"],
                max_num_seqs=1,
                seed=options["seed"],
                progress=lambda done, total: update(f"loading {self.name}: {done} of {total} tensors"),
            )
        self.program = self.llm.program
        self.compile_seconds = sum(self.program.compiled.seconds.values())
        self.load_seconds = time.perf_counter() - clock - self.imports - self.compile_seconds
        if told:
            self.describe()

    def describe(self) -> None:
        count, size = parameters(self.program)
        dtype = str(self.program.dtype).removeprefix("torch.")
        sizes = f"{count / 1e6:,.1f} M parameters, {dtype}, {size / 1e9:.2f} GB"
        tell(f"model    {self.name}: {sizes}, loaded in {self.load_seconds:.1f} s")
        kernels = kernels_per_layer(self.program.compiled)
        shape = f"{kernels} kernels a layer, " if kernels else ""
        made = "from the cache" if "cache" in self.program.compiled.seconds else f"compiled in {self.compile_seconds:.1f} s"
        tell(f"program  {Path(self.program.compiled.source).name}: {shape}{made}")
        tell(f"device   {device_name(self.program.device)}: {self.backend}")

    @property
    def backend(self) -> str:
        if self.program.device.type == "cuda":
            graphs = "no CUDA graphs" if self.options["enforce_eager"] else "CUDA graphs"
            return f"generated Triton kernels, paged KV cache, {graphs}"
        import torch

        return f"torch backend, paged KV cache, {torch.get_num_threads()} threads"

    def answer(self, prompt, as_json: bool) -> None:
        """Streams the answer to stdout, or prints it whole as JSON."""
        warm = self.warm_up(prompt)
        stream = self.llm.stream(prompt, self.params)
        try:
            for piece in stream:
                if not as_json:
                    sys.stdout.write(piece)
                    sys.stdout.flush()
        finally:
            if not as_json:
                sys.stdout.write("\n")
        output, metrics = stream.output.outputs[0], stream.output.metrics
        if as_json:
            print_json(
                {
                    "text": output.text,
                    "token_ids": output.token_ids,
                    "finish_reason": output.finish_reason,
                    "prompt_tokens": metrics.prompt_tokens,
                    "model": self.name,
                    "source": str(self.program.compiled.source),
                    "backend": "triton" if self.program.device.type == "cuda" else "torch",
                    "device": device_name(self.program.device),
                    "dtype": str(self.program.dtype).removeprefix("torch."),
                    "timings": {
                        "load_s": self.load_seconds,
                        "compile_s": self.compile_seconds,
                        "warm_up_s": warm,
                        "time_to_first_token_s": metrics.time_to_first_token,
                        "prefill_tokens_per_s": metrics.prefill_tokens_per_second,
                        "decode_tokens_per_s": metrics.decode_tokens_per_second,
                    },
                }
            )
        if self.told:
            tell(summary(metrics, output.finish_reason))

    def warm_up(self, prompt) -> float:
        """Seconds. On a GPU the first steps compile the kernels and capture the graphs; the answer's own times leave that out."""
        if self.program.device.type != "cuda":
            return 0.0
        from dataclasses import replace

        clock = time.perf_counter()
        with working("compiling kernels", self.told):
            for _ in self.llm.stream(prompt, replace(self.params, max_tokens=min(4, self.params.max_tokens or 4))):
                pass
        seconds = time.perf_counter() - clock
        if self.told:
            tell(f"warm-up  kernels and graphs ready in {seconds:.1f} s")
        return seconds


def summary(metrics, finish_reason) -> str:
    """The last line: how long it took."""
    text = f"\n{metrics.prompt_tokens} prompt tokens, first token after {metrics.time_to_first_token:.2f} s"
    text += f", {metrics.output_tokens} tokens"
    speed = metrics.decode_tokens_per_second
    text += f" at {speed:.1f} tok/s" if speed else ""
    return text + (" (cut at --max-tokens)" if finish_reason == "length" else "")


def parameters(program) -> tuple[int, int]:
    """Parameters of a loaded program, and the bytes they take. Tied tensors count once."""
    from fusec.runtime.weights import checkpoint_shapes

    module = program.compiled.module
    values = [weight.value for weight in module.weights.values()] if module else program.compiled.graph.outputs
    count = sum(math.prod(shape) for shape in checkpoint_shapes(values).values())
    return count, count * program.dtype.itemsize


def kernels_per_layer(compiled) -> str | None:
    """Launches of a layer, such as "5" or "5 or 6" where layers differ; None for a program that torch runs."""
    if compiled.module is None:
        return None
    from .explain import fold

    return " or ".join(str(n) for n in sorted({len(run.launches) for run in fold(compiled.module) if run.count > 1})) or None


def device_name(device) -> str:
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    return "CPU"


if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]], program="fusec"))
