"""Syntax tree + config -> graph. Every op and block call is inlined, every layer unrolled, every size a number."""

from __future__ import annotations

from ..diagnostics import Diagnostic, DiagnosticError, Label, Span, did_you_mean
from ..ir import ops
from ..ir.graph import Dim, Graph, S, Value, walk
from ..ir.graph import substitute as substitute_values
from . import dims, primitives, syntax
from .blocks import Blocks
from .config import bind_config, config_key, missing_key
from .names import check_names
from .scope import (
    ABSENT,
    POISON,
    BlockRef,
    Instance,
    Many,
    Module,
    OpRef,
    Primitive,
    Problem,
    Routed,
    Scope,
    Silent,
    Stack,
    describe,
    show_dims,
)

_TEMPLATES = ("attention",)
_DTYPES = {"int": "int", "f32": "f32", "bool": "bool"}


def elaborate(program: syntax.Program, library: Module | None, config: dict | None) -> Graph:
    """The graph of the program's model, with sizes from `config` (the keys of config.json; None: the program's own defaults).

    Raises DiagnosticError with everything found wrong.
    """
    module = Module(program, {}, library)
    elaborator = Elaborator(config)
    elaborator.errors += check_names(program, module)
    graph = elaborator.run(module)
    if elaborator.errors:
        errors = sorted(elaborator.errors, key=lambda d: (d.label.span.start if d.label.span.source is program.source else 0))
        raise DiagnosticError(errors)
    return graph


class Elaborator(Blocks):
    """One run. `config` is the checkpoint's, `read` the keys that the program asked for."""

    config_key, missing_key = config_key, missing_key

    def __init__(self, config):
        super().__init__()
        self.config, self.read = config, set()
        self.caches = {}

    def run(self, module: Module) -> Graph | None:
        for decl in module.program.declarations:
            if isinstance(decl, syntax.Op):
                module.names.setdefault(decl.name, OpRef(decl, module))
            elif isinstance(decl, syntax.Block) and not decl.is_model:
                module.names.setdefault(decl.name, BlockRef(decl, module))
        models = [d for d in module.program.of(syntax.Block) if d.is_model]
        bind_config(self, module)
        if len(models) != 1:
            nowhere = Span(module.program.source, 0, 0)
            here = Label(models[1].name_span, "is a second one") if models else Label(nowhere, "has none")
            hint = None if models else "declare it with model Name(ids: int[T], pos: int[T]) -> [T, V]"
            self.errors.append(Diagnostic("FUS005", "a program has one model", here, hint=hint))
            return None
        try:
            return self.model(models[0], module)
        except Silent:
            return None
        except Problem as problem:
            self.report(problem)
            return None

    def report(self, problem: Problem):
        if self.site is not None:
            problem.move_out_of_library(self.site)
        key = (problem.diagnostic.code, problem.diagnostic.label.span)
        if key not in {(d.code, d.label.span) for d in self.errors}:
            self.errors.append(problem.diagnostic)

    def model(self, decl: syntax.Block, module: Module) -> Graph | None:
        instance = Instance(BlockRef(decl, module), {}, "", None, module)
        scope = Scope(module, {}, "", instance)
        arguments = []
        for param in decl.params:
            if param.type is None:
                raise Problem("FUS020", f"the model's argument {param.name} has no type", param.span,
                              hint=f"write {param.name}: int[T]")
            dtype, _, axes = self.type(param.type, scope)
            arguments.append(ops.make("input", dtype=dtype, dims=tuple(d for a in axes for d in dims.dims_of(a)), name=param.name,
                                      origin=self.origin(param, scope)))
        result = self.enter(instance, arguments, decl, scope)
        if result is POISON or result is None:
            return None
        if not isinstance(result, Value):
            raise Problem("FUS041", "a model returns one tensor", decl.body.result.span, f"this is {describe(result)}")
        if "S" in result.names:
            raise Problem("FUS061", "no template implements this efficiently", decl.body.result.span, "still has the history S")
        return Graph(decl.name, tuple(arguments), (result,))

    # ---- names ------------------------------------------------------------------------------------------------------

    def lookup(self, node: syntax.Name, scope: Scope):
        if node.id in scope.names:
            return scope.names[node.id]
        if scope.instance is not None:
            for field in scope.instance.ref.decl.fields:
                if field.name == node.id:
                    return self.field(scope.instance, field, scope)
        found = scope.module.find(node.id)
        if found is not ABSENT:
            return found
        if scope.config and node.id not in scope.module.pending:
            return self.config_key(node.id)
        raise Silent  # names.py has reported it

    def suggest(self, name, known):
        return did_you_mean(name, known)

    # ---- statements -------------------------------------------------------------------------------------------------

    def run_body(self, body: syntax.Body, scope: Scope):
        """Evaluates a body's lets and its result. A let that fails is reported, and its names hold POISON."""
        for let in body.lets:
            self.let(let, scope)
        return self.attempt(lambda: self.value(body.result, scope))

    def attempt(self, evaluate):
        try:
            return evaluate()
        except Silent:
            return POISON
        except Problem as problem:
            self.report(problem)
            return POISON

    def let(self, let: syntax.Let, scope: Scope):
        values = [self.attempt(lambda node=node: self.value(node, scope)) for node in let.values]
        names = [n.id for n in let.names]
        if len(values) == 1 and len(names) > 1:
            if isinstance(values[0], Many):
                values = list(values[0].values)
            elif values[0] is POISON:
                values *= len(names)
        if len(values) != len(names):
            found = len(values) if len(values) > 1 or len(names) == 1 else 1
            self.report(Problem("FUS041", "wrong number of results", let.names[0].span.to(let.names[-1].span),
                                f"{len(names)} name{'s' * (len(names) > 1)} for {found} result{'s' * (found > 1)}"))
            values = [POISON] * len(names)
        if self.errors and scope.instance is not None:  # a let that hides a field was reported: say no more about either
            fields = {f.name for f in scope.instance.ref.decl.fields}
            values = [POISON if n in fields else v for n, v in zip(names, values, strict=True)]
        scope.names.update(zip(names, values, strict=True))

    # ---- calls ------------------------------------------------------------------------------------------------------

    def apply(self, function, arguments, node, scope):
        """Calls whatever can be called."""
        if isinstance(function, OpRef):
            return self.call_op(function, arguments, node, scope)
        if isinstance(function, Primitive):
            self.count_arguments(function.name, function.arity, arguments, node, None)
            if arguments or function.arity:
                return function.build(self, function, arguments, node, scope)
        if isinstance(function, Instance):
            return self.enter(function, arguments, node, scope)
        if isinstance(function, Routed):
            return self.enter(function.instance, arguments, node, scope, routed=function.index)
        if isinstance(function, Stack):
            return self.compose(function, arguments, node, scope)
        hint = "declare a field for it: name : Block[…]" if isinstance(function, BlockRef) else None
        raise Problem("FUS043", "this cannot be called", node.function.span, f"is {describe(function)}", hint=hint)

    def count_arguments(self, name, wanted, arguments, node, decl):
        if wanted is not None and len(arguments) != wanted:
            takes = ", ".join(p.name for p in decl.params) or "none" if decl is not None else ""
            related = [Label(decl.name_span, f"takes {takes}")] if decl is not None else []
            raise Problem("FUS040", "wrong number of arguments", node.span,
                          f"{name} takes {wanted} argument{'s' * (wanted != 1)}, this gives {len(arguments)}", related=related)

    def call_op(self, ref: OpRef, arguments, node, scope: Scope):
        decl = ref.decl
        self.count_arguments(decl.name, len(decl.params), arguments, node, decl)
        self.not_endless(decl, node)
        call = scope.call or (node.span if ref.module.is_std else None)
        inner = Scope(ref.module, {}, scope.path, None, scope.routed, call)
        with self.called_from(call):
            inner.names.update(self.complete(ref, node, inner))
            self.check_arguments(decl, arguments, node, inner, None)
            if decl.via:
                return self.region(decl, arguments, node, scope, inner)
            inner.names.update((param.name, a) for param, a in zip(decl.params, arguments, strict=True))
            return self.check_result(decl, self.run_op_body(decl, inner), inner)

    def run_op_body(self, decl, inner):
        """The body of an op. Errors leave through the call, which is where a reader looks for them."""
        for let in decl.body.lets:
            self.let(let, inner)
        return self.value(decl.body.result, inner)

    def region(self, decl: syntax.Op, arguments, node, scope: Scope, inner: Scope):
        """A `via` value: its body is the elaborated op, with the call's tensors, and whatever else it reads, as inputs."""
        if decl.via not in _TEMPLATES:
            raise Problem("FUS062", f"unknown template {decl.via}", decl.name_span, "is implemented via it",
                          hint=did_you_mean(decl.via, _TEMPLATES) or f"templates: {', '.join(_TEMPLATES)}")
        operands, inputs = [], []
        made = set()
        self.regions.append(made)
        try:
            for param, argument in zip(decl.params, arguments, strict=True):
                if isinstance(argument, Value):
                    operands.append(argument)
                    argument = ops.make("input", dtype=argument.dtype, dims=argument.dims, name=param.name,
                                        origin=argument.origin)
                    made.add(argument)
                    inputs.append(argument)
                inner.names[param.name] = argument
            result = self.check_result(decl, self.run_op_body(decl, inner), inner)
        finally:
            self.regions.pop()
        if result is POISON:
            return POISON
        result = primitives.tensor(result, decl.body.result)
        if "S" in result.names:
            raise Problem("FUS061", "no template implements this efficiently", node.span, "still has the history S",
                          related=[Label(decl.body.result.span, "must reduce S")])
        captured = {}
        for value in walk((result,)):
            for operand in value.inputs if value in made else ():
                if operand not in made and operand not in captured:
                    name = f"captured{len(captured)}"
                    captured[operand] = ops.make("input", dtype=operand.dtype, dims=operand.dims, name=name,
                                                 origin=operand.origin)
        if not any("S" in operand.names for operand in (*operands, *captured)):
            raise Problem("FUS061", "no template implements this efficiently", node.span, "reads no history",
                          related=[Label(decl.name_span, f"is implemented via {decl.via}")],
                          hint="pass it cache(…), which returns the history, or leave via out")
        body = Graph(decl.name, (*inputs, *captured.values()), (result,))
        body = substitute_values(body, captured) if captured else body
        return self.make("via", *operands, *captured, dtype=result.dtype, dims=result.dims, template=decl.via, body=body,
                         node=node, scope=scope)

    def cache_name(self, scope: Scope, argument) -> str:
        """A name for one cache: the block's path and what is kept, as the program calls it."""
        label = argument.id if isinstance(argument, syntax.Name) else "cache"
        name = f"{scope.path}.{label}" if scope.path else label
        count = self.caches[name] = self.caches.get(name, 0) + 1
        return name if count == 1 else f"{name}{count}"

    # ---- annotations ------------------------------------------------------------------------------------------------

    def type(self, node, scope: Scope) -> tuple[str, bool, tuple]:
        """A type annotation -> (dtype, whether more dims are allowed, its axes)."""
        if isinstance(node, syntax.Shape):
            return "x", node.rest, tuple(self.axis(self.static(a, scope), a) for a in node.axes)
        if isinstance(node, syntax.Subscript) and isinstance(node.value, syntax.Name) and node.value.id in _DTYPES:
            return _DTYPES[node.value.id], False, tuple(self.axis(self.static(a, scope), a) for a in node.arguments)
        raise Problem("FUS043", "not a type", node.span, "is no shape", hint="write [T, D], [.., D] or int[T]")

    def check_arguments(self, decl, arguments, node, scope: Scope, field):
        """Compares the arguments of a call with the declared types of its parameters."""
        for param, argument in zip(decl.params, arguments, strict=True):
            if param.type is None or argument is POISON:
                continue
            dtype, rest, axes = self.type(param.type, scope)
            wanted = tuple(dict.fromkeys(d for a in axes for d in dims.dims_of(a)))
            if not isinstance(argument, Value):
                raise Problem("FUS043", "a tensor was expected", node.span, f"{param.name} is {describe(argument)}",
                              related=[Label(param.span, "declared here")])
            if not self.fits(argument, wanted, rest, scope):
                self.mismatch(decl, param, argument, wanted, rest, node, scope, field)
            if dtype != "x" and argument.dtype != dtype:
                raise Problem("FUS050", "wrong precision", node.span, f"{param.name} must be {dtype}, this is {argument.dtype}",
                              related=[Label(param.span, "declared here")])

    def fits(self, value: Value, wanted, rest, scope: Scope) -> bool:
        names, expected = set(value.names), {d.name for d in wanted}
        if scope.routed is not None:
            expected = expected | (names & {d.name for d in scope.routed.dims})
        return expected <= names if rest else expected == names

    def check_result(self, decl, result, scope: Scope):
        """Compares what a body returns with the declared result."""
        if decl.result is None or result is POISON:
            return result
        dtype, rest, axes = self.type(decl.result, scope)
        wanted = tuple(dict.fromkeys(d for a in axes for d in dims.dims_of(a)))
        related = [Label(decl.result.span, "declared here")]
        if not isinstance(result, Value):
            raise Problem("FUS041", "wrong number of results", decl.body.result.span, f"returns {describe(result)}",
                          related=related)
        if not self.fits(result, wanted, rest, scope):
            least = "at least " if rest else ""
            raise Problem("FUS021", "dimension mismatch", decl.body.result.span,
                          f"returns {show_dims(result.dims)}; {decl.name} declares {least}{show_dims(wanted)}", related=related)
        if result.dtype != dtype:
            raise Problem("FUS050", "wrong precision", decl.body.result.span, f"is {result.dtype}, {decl.name} declares {dtype}",
                          related=related, hint="write the cast: (…) as x" if dtype == "x" else f"write {dtype}(…)")
        return result

    def mismatch(self, decl, param, argument, wanted, rest, node, scope, field):
        """Reports an argument with the wrong dims, and blames the field that most likely lost or added one."""
        called = node.function.span if isinstance(node, syntax.Call) else node.span
        least = "at least " if rest else ""
        text = f"expects {least}{show_dims(wanted)}; this has {show_dims(argument.dims)}"
        sized = [d for d in wanted if d.size is not None]  # no field loses or adds T or S
        lost = [d for d in sized if d.name not in argument.names]
        related, hint = [], None
        if S in wanted and "T" in argument.names:
            given = node.arguments[decl.params.index(param)]
            hint = f"write cache({given.span.text}): it returns the history, T becoming S"
        culprit = self.producer(argument, sized) if lost else None
        if culprit is not None:
            related.append(Label(culprit.type.span, f"{lost[0].name} was expected here"))
            hint = hint or _corrected(culprit, sized)
        elif field is not None:
            related.append(Label(field.type.span, "declared here"))
        else:
            related.append(Label(param.span, "declared here"))
        raise Problem("FUS021", "dimension mismatch", called, text, related=related, hint=hint)

    def producer(self, value: Value, wanted) -> syntax.Field | None:
        """The first declared of the weights behind `value` whose output has some but not all of the wanted dims: of q, k and v it
        is q's dims that an attention's result has."""
        names, seen, queue, found = {d.name for d in wanted}, set(), [value], []
        while queue and len(seen) < 500:
            value = queue.pop(0)
            if value in seen:
                continue
            seen.add(value)
            if value.op == "weight":
                field = self.fields_at.get(value.origin.path)
                target = {d.name for d in value.dims}
                if field is not None and target & names and not names <= target and isinstance(field.type, syntax.Subscript):
                    found.append(field)
            queue += value.inputs
        return min(found, key=lambda field: field.type.span.start, default=None)


def _corrected(field: syntax.Field, wanted: tuple[Dim, ...]) -> str | None:
    """The hint that mends `Linear[D -> G*K]` when G, R and K were wanted."""
    type = field.type
    if len(type.arguments) != 1 or not isinstance(type.arguments[0], syntax.Arrow):
        return None
    arrow = type.arguments[0]
    return f"write {type.value.span.text}[{arrow.source.span.text} -> {'*'.join(d.name for d in wanted)}]"
