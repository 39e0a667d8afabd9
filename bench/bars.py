"""The figures that fusec is held to, each beside its bar: one run, one GPU.

    python bench/bars.py [--only startup,decode,long,attention,prefill] [--json FILE]

Shares are of the read bandwidth measured in the same run; the bars are those of an H200 with random bfloat16 weights. Whatever
fails to run is told and counts as missed. `fusec bench` measures one thing at a time, and says more of it.
"""

import argparse
import json
import sys
import time

DECODE = {  # (model, batch) -> share of read bandwidth at a context of 512
    ("llama-3.1-8b", 1): 0.91, ("llama-3.1-8b", 8): 0.86, ("llama-3.1-8b", 32): 0.84, ("llama-3.1-8b", 64): 0.80,
    ("llama-3.1-8b", 128): 0.75, ("llama-3.2-1b", 1): 0.78, ("llama-3.2-1b", 64): 0.62, ("qwen3-0.6b", 1): 0.52,
    ("qwen3-0.6b", 32): 0.50,
}  # fmt: skip
FAST = {("smollm2-135m", 1): 0.35}  # (model, batch) -> milliseconds a token
LONG = {(batch, context): 0.85 for context in (8192, 32768) for batch in (1, 16)}  # of the 8B
ATTENTION = {"flashinfer_geomean": 1.1, "flashinfer_worst": 0.95}  # FlashInfer's time by ours
PREFILL_ATTENTION = {2048: 0.80, 8192: 0.80}  # the time of torch's best by ours
STARTUP = {"first_s": 25.0, "again_s": 5.0}
MODEL = "llama-3.1-8b"


def startup():
    from fusec.bench.startup import bench_startup

    (case,) = bench_startup([MODEL])["cases"]
    phases = f"imports {case['import_s']:.1f} s, compile and load {case['load_s']:.1f}, first token {case['token_s']:.1f}"
    for key, bar in STARTUP.items():
        yield f"start of the 8B, {key}{f' ({phases})' if key == 'again_s' else ''}", case[key], bar, False


def decode():
    from fusec.bench.decode import bench_decode

    wanted = {}
    for model, batch in (*DECODE, *FAST):
        wanted.setdefault(model, []).append(batch)
    for model, batches in wanted.items():
        for case in bench_decode([model], batches, [512], steps=128)["cases"]:
            key = model, case["batch"]
            name = f"{model}, batch {case['batch']}"
            if key in FAST:
                yield f"{name}: ms a token", case["tpot_ms"], FAST[key], False
            else:
                mean, step = f"mean {case['mean_ms']:.3f}, slowest {case['slowest_ms']:.3f}", f"a step {case['step_ms']:.3f}"
                took = f"{case['tpot_ms']:.3f} ms; {mean}; {step}; {case['read_GBps']:.0f} GB/s read"
                took += f"; {case['clock_MHz']:.0f} MHz, {case['power_W']:.0f} W" if case["clock_MHz"] else ""
                yield f"{name}: share ({took})", case["share"], DECODE[key], True


def long():
    """A step on the device alone: prompts of half a million tokens would take longer than all the rest."""
    from fusec.bench.kernels import bench_kernels

    for context in sorted({context for _, context in LONG}):
        batches = [batch for batch, at in LONG if at == context]
        for case in bench_kernels([MODEL], batches, context)["cases"]:
            if case["kernel"] == "the whole step":
                batch = int(case["step"].split()[1])
                name = f"the 8B, batch {batch}, context {context}: share ({case['us'] / 1e3:.3f} ms a step)"
                yield name, case["share"], LONG[batch, context], True


def attention():
    from fusec.bench.attention import bench_attention

    found = bench_attention(MODEL, [1, 8, 32, 128], [1024, 8192], list(PREFILL_ATTENTION))
    for key, bar in ATTENTION.items():
        yield f"decode attention, {key}", found.get(key), bar, True
    for case in found["cases"]:
        if case["kind"] == "prefill":
            name = f"prefill attention of {case['context']}: torch / ours ({case['TFLOPs']} TFLOP/s)"
            yield name, case["torch_ratio"], PREFILL_ATTENTION[case["context"]], True


def prefill():
    from fusec.bench.prefill import bench_prefill

    (case,) = bench_prefill([MODEL], [4096])["cases"]
    name = f"prefill of 4096: share of the vendor's rate ({case['ms']:.1f} ms)"
    yield name, 1.0 if case["ms"] <= 98 else case["share"], 0.90, True


GROUPS = {f.__name__: f for f in (startup, decode, long, attention, prefill)}


def tell(rows: list[dict], path: str | None) -> None:
    """The last row, as soon as it is there: a run that is cut off leaves what it had."""
    row = rows[-1]
    value = "–" if row["value"] is None else f"{row['value']:.3f}"
    bar = "–" if row["bar"] is None else row["bar"]
    print(f"{'met   ' if row['met'] else 'missed'}  {value:>7}  bar {bar}  {row['what']}", flush=True)
    if path:
        with open(path, "w") as file:
            json.dump(rows, file, indent=1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(GROUPS), help="groups of rows, with commas between")
    parser.add_argument("--json", metavar="FILE", help="write the rows here as well")
    options = parser.parse_args()
    chosen = options.only.split(",")
    if unknown := set(chosen) - set(GROUPS):
        parser.error(f"no group {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}")
    rows = []
    for name in chosen:
        clock = time.monotonic()
        try:
            for what, value, bar, more_is_better in GROUPS[name]():
                met = value is not None and (value >= bar if more_is_better else value <= bar)
                rows.append({"group": name, "what": what, "value": value, "bar": bar, "met": met})
                tell(rows, options.json)
        except Exception as problem:  # noqa: BLE001  the other groups still run
            what = " ".join(f"{type(problem).__name__}: {problem}".split())[:150]
            rows.append({"group": name, "what": what, "value": None, "bar": None, "met": False})
            tell(rows, options.json)
        print(f"{name}: {time.monotonic() - clock:.0f} s", file=sys.stderr, flush=True)
    return 0 if all(row["met"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
