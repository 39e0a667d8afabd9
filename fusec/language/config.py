"""The `config` section: names bound to keys of the checkpoint's config.json, with defaults."""

from __future__ import annotations

import json

from ..diagnostics import Diagnostic, Label, Span, nearest
from ..ir.graph import Dim
from . import dims, syntax
from .scope import POISON, Missing, Problem, Scope, Table

# Keys that change what a model computes, and the values that stand for "not used". A program that never reads such a key does not
# compute the model of a config that sets it to anything else.
_MEANINGFUL = {
    "attention_bias": (None, False), "mlp_bias": (None, False), "qkv_bias": (None, False), "clip_qkv": (None,),
    "sliding_window": (None, 0), "attn_logit_softcapping": (None,), "final_logit_softcapping": (None,),
    "partial_rotary_factor": (None, 1, 1.0), "num_experts": (None, 0, 1), "num_local_experts": (None, 0, 1),
    "n_routed_experts": (None, 0, 1), "kv_lora_rank": (None,), "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0), "logits_scaling": (None, 1, 1.0), "logit_scale": (None, 1, 1.0),
    "use_qk_norm": (None, False), "qk_layernorm": (None, False), "use_parallel_residual": (None, False),
}

_EXPERTS = {"num_experts", "num_local_experts", "n_routed_experts"}  # one fact under three names


def bind_config(elaborator, module):
    """Binds every name of the program's `config` section in `module`: whole numbers become dims of that name."""
    lets = [let for section in module.program.of(syntax.Config) for let in section.lets]
    module.pending = {name.id for let in lets for name in let.names}
    for let in lets:
        module.pending -= {name.id for name in let.names}
        scope = Scope(module, {}, config=True)
        elaborator.let(let, scope)
        written = let.values if len(let.values) == len(let.names) else let.names
        for name, value in zip(let.names, written, strict=True):
            bound = scope.names[name.id]
            module.names[name.id] = elaborator.attempt(lambda n=name.id, b=bound, v=value: _named(elaborator, n, b, v))
    if elaborator.config is not None:
        at = Span(module.program.source, 0, 0)
        sections = module.program.of(syntax.Config)
        elaborator.errors += extra_keys(elaborator.config, elaborator.read, sections[0].span if sections else at)


def _named(elaborator, name: str, value, node):
    if isinstance(value, Missing):
        elaborator.report(elaborator.missing_key(value.key, node))
        return POISON
    if isinstance(value, dims.Axis):
        value = elaborator.number(value, node)
    if isinstance(value, int) and not isinstance(value, bool):
        return Dim(name, value)
    return value


def config_key(elaborator, key: str, entries: dict | None = None, prefix: str = ""):
    """The value of a key of the config, or of one of its tables: a number, text, list, boolean, Table, or Missing."""
    full = prefix + key
    elaborator.read.add(full)
    value = (elaborator.config if entries is None else entries or {}) or {}
    value = value.get(key)
    return Missing(full) if value is None else Table(full, value) if isinstance(value, dict) else value


def missing_key(elaborator, key: str, node) -> Problem:
    """The error for a key without a value and without a default."""
    if elaborator.config is None:
        return Problem("FUS030", f"no value for {key}", node.span, "has no default, and no config was given",
                       hint=f"write {key} ?? value, or name a checkpoint with --model")
    near = nearest(key, flat_keys(elaborator.config))
    meant = f"did you mean {near}? otherwise " if near else ""
    return Problem("FUS030", f"the config has no {key}", node.span, "is not in config.json",
                   hint=f"{meant}give it a default: {key} ?? value")


def extra_keys(config: dict, read: set[str], span: Span) -> list[Diagnostic]:
    """Keys of the config that change the model and that the program never reads."""
    tops = {key.split(".")[0] for key in read}
    found = [k for k, neutral in _MEANINGFUL.items() if k in config and config[k] not in neutral and k not in tops]
    if tops & _EXPERTS:
        found = [k for k in found if k not in _EXPERTS]
    if config.get("use_sliding_window") is False:
        found = [k for k in found if k != "sliding_window"]
    for table in ("rope_scaling", "rope_parameters"):
        value = config.get(table)
        kind = value.get("rope_type", value.get("type", "default")) if isinstance(value, dict) else "default"
        if kind != "default" and f"{table}.rope_type" not in read and f"{table}.type" not in read:
            found.append(table)
    return [Diagnostic("FUS031", f"the config sets {key}, which this program never reads", Label(span, f"does not bind {key}"),
                       notes=(f"{key} is {json.dumps(config[key])}: the model of this config computes something else",),
                       hint="use a program for this architecture, or bind the key and use it") for key in found]


def key_path(node) -> tuple[str, ...] | None:
    """a.b.c -> ("a", "b", "c")."""
    if isinstance(node, syntax.Name):
        return (node.id,)
    if isinstance(node, syntax.Attribute):
        before = key_path(node.value)
        return None if before is None else (*before, node.name)
    return None


def flat_keys(config: dict) -> list[str]:
    """Every key of a config, nested ones dotted."""
    nested = [(key, value if isinstance(value, dict) else ()) for key, value in config.items()]
    return [name for key, inner in nested for name in (key, *(f"{key}.{k}" for k in inner))]


