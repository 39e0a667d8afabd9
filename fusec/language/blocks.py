"""Blocks as parts of a model: fields, their weights, stacks of them, and calls."""

from __future__ import annotations

import contextlib
import math

from ..diagnostics import Label
from ..ir import ops
from ..ir.graph import Dim, Value
from . import dims, syntax
from .expressions import Expressions
from .scope import POISON, BlockRef, Instance, Many, OpRef, Primitive, Problem, Routed, Scope, Silent, Stack, describe

_MOST_MEMBERS = 4096  # of a stack: layers are unrolled
_DEEPEST = 40  # calls inside one another


class Blocks(Expressions):
    """Adds fields and compile-time parameters to `Expressions`."""

    def __init__(self):
        super().__init__()
        self.weights: dict[tuple, Value | Many] = {}  # (key, axes) -> its tensors
        self.storage: dict[str, tuple] = {}  # key -> (shape, span of the field that named it first)
        self.depth = 0  # of calls
        self.site = None  # the user's line that led into the library, while inside it
        self.fields_at: dict[str, syntax.Field] = {}  # path of an instance -> the field that made it

    @contextlib.contextmanager
    def called_from(self, call):
        """Errors inside the library are told at the user's line that led there (`call`; None outside the library)."""
        before, self.site = self.site, call
        self.depth += 1
        try:
            yield
        except Problem as problem:
            if call is not None:
                problem.move_out_of_library(call)
            raise
        finally:
            self.site = before
            self.depth -= 1

    def not_endless(self, decl, node):
        """Refuses an op or block that calls itself, which inlining could never finish."""
        if self.depth > _DEEPEST:
            related = [Label(decl.name_span, "declared here")]
            raise Problem("FUS044", f"{decl.name} calls itself", node.span, "never ends", related=related)

    # ---- compile-time parameters ------------------------------------------------------------------------------------

    def bind(self, ref: OpRef | BlockRef, node: syntax.Subscript, scope: Scope):
        """`Linear[D -> F]`, `attend[K, mask=causal]`: the reference with these parameters bound."""
        bound, free = dict(ref.statics), [s for s in ref.decl.statics if s.name not in ref.statics]
        declared = Label(ref.decl.name_span, _signature(ref.decl))

        def refuse(at, text, hint=None):
            return Problem("FUS042", "wrong compile-time arguments", at.span, text, related=[declared], hint=hint)

        for argument in node.arguments:
            if isinstance(argument, syntax.Keyword):
                names = [s.name for s in ref.decl.statics]
                if argument.name not in names:
                    raise refuse(argument, f"{ref.decl.name} has no {argument.name}", self.suggest(argument.name, names))
                if argument.name in bound:
                    raise refuse(argument, f"{argument.name} is given twice")
                bound[argument.name] = self.static(argument.value, scope)
                free = [s for s in free if s.name != argument.name]
                continue
            wanted = 2 if isinstance(argument, syntax.Arrow) else 1
            if len(free) < wanted:
                raise refuse(argument, f"{ref.decl.name} takes {len(ref.decl.statics)}")
            if free[0].arrow != (wanted == 2):
                raise refuse(argument, "an arrow was expected" if free[0].arrow else "no arrow was expected")
            parts = (argument.source, argument.target) if wanted == 2 else (argument,)
            for parameter, part in zip(free, parts, strict=False):
                bound[parameter.name] = self.static(part, scope)
            free = free[wanted:]
        return type(ref)(ref.decl, ref.module, bound)

    def complete(self, ref: OpRef | BlockRef, node, scope: Scope) -> dict:
        """All compile-time parameters of `ref`, defaults filled in (they may use the earlier ones)."""
        if len(ref.statics) == len(ref.decl.statics):
            return ref.statics
        inner, values = Scope(ref.module, {}, scope.path, None, scope.routed, scope.call), {}
        for static in ref.decl.statics:
            if static.name in ref.statics:
                values[static.name] = ref.statics[static.name]
            elif static.default is not None:
                inner.names = values
                values[static.name] = self.value(static.default, inner)
            else:
                raise Problem("FUS042", "wrong compile-time arguments", node.span, f"{ref.decl.name} needs {static.name}",
                              related=[Label(ref.decl.name_span, _signature(ref.decl))], hint=f"write {_signature(ref.decl)}")
        return values

    def bind_primitive(self, primitive: Primitive, node: syntax.Subscript, scope: Scope):
        """`sum[K]`, `split[K -> A + B]`; index[K] is a value already."""
        first = node.arguments[0]
        if len(node.arguments) != 1 or not primitive.statics or isinstance(first, syntax.Keyword) \
                or isinstance(first, syntax.Arrow) != (primitive.statics == "arrow"):
            wanted = {"": "no brackets", "axis": "one dim in brackets", "arrow": "[A -> B] in brackets"}[primitive.statics]
            raise Problem("FUS042", "wrong compile-time arguments", node.span, f"{primitive.name} takes {wanted}")
        parts = (first.source, first.target) if primitive.statics == "arrow" else (first,)
        arguments = tuple(self.axis(self.static(part, scope), part) for part in parts)
        bound = Primitive(primitive.name, primitive.build, primitive.arity, primitive.statics, arguments)
        return bound.build(self, bound, (), node, scope) if primitive.name == "index" else bound

    # ---- fields -----------------------------------------------------------------------------------------------------

    def field(self, owner: Instance, field: syntax.Field, scope: Scope):
        """What a field's name stands for in the body: a weight, a block, or a stack of blocks."""
        found = owner.members.get(field.name)
        if found is None:
            found = owner.members[field.name] = self.make_field(owner, field)
        if isinstance(found, Value | Many) and scope.routed is not None and owner.stack is not None:
            return self.pick(found, owner.stack, field, scope)
        return found

    def make_field(self, owner: Instance, field: syntax.Field):
        scope = Scope(owner.module, dict(owner.statics), owner.path, None)
        path = ".".join(filter(None, (owner.path, *field.path)))
        if isinstance(field.type, syntax.Shape):
            if field.count is not None:
                raise Problem("FUS043", "a tensor cannot be stacked", field.name_span, "has a count",
                              hint="stack a block that holds it")
            with self.called_from(owner.field.type.span if owner.field and owner.module.is_std else None):
                return self.weight(owner, field, path, scope)
        tied = field.tied is not None and (field.condition is None or self.condition(field.condition, scope))
        if tied:
            path = self.tied_path(owner, field, scope)
        if field.count is None:
            return self.instance(owner, field, path, scope)
        if tied or owner.stack is not None:
            raise Problem("FUS043", "a stack cannot stand here", field.name_span, "is tied, or inside a routed stack")
        return Stack(owner, field, self.static(field.count, scope), path)

    def instance(self, owner, field, path, scope, stack=None) -> Instance:
        ref = self.static(field.type, scope)
        if ref is POISON:
            raise Silent
        if not isinstance(ref, BlockRef):
            raise Problem("FUS043", "a block or a shape was expected", field.type.span, f"this is {describe(ref)}")
        self.fields_at.setdefault(path, field)
        return Instance(ref, self.complete(ref, field.type, scope), path, field, ref.module,
                        stack if stack is not None else owner.stack)

    def tied_path(self, owner, field, scope) -> str:
        """The path whose weights a tied field shares."""
        name = field.tied.id if isinstance(field.tied, syntax.Name) else None
        other = next((f for f in owner.ref.decl.fields if f.name == name), None)
        if other is None:
            raise Problem("FUS043", "only a field of the same block can be tied to", field.tied.span, "is not one",
                          hint=self.suggest(name or "", [f.name for f in owner.ref.decl.fields]))
        target = self.field(owner, other, scope)
        if not isinstance(target, Instance):
            raise Problem("FUS043", "only a block can be tied to", field.tied.span, f"is {describe(target)}")
        return target.path

    def weight(self, owner: Instance, field: syntax.Field, key: str, scope: Scope):
        """The tensors that `weight : [O, I]` stores under one key."""
        axes = tuple(self.axis(self.static(axis, scope), axis) for axis in field.type.axes)
        known = self.weights.get((key, axes))
        if known is not None:
            return known
        here = owner.field or field
        shape, parts = dims.storage(axes)
        if None in shape:
            raise Problem("FUS020", "a weight has no run-time dims", field.type.span,
                          f"holds {dims.show(axes[shape.index(None)])}")
        first_shape, first = self.storage.setdefault(key, (shape, here))
        if first_shape != shape:
            raise Problem("FUS073", "tied weights of different shapes", here.type.span, f"stores {list(shape)}",
                          related=[Label(first.type.span, f"stores {list(first_shape)}")])
        origin_scope = Scope(owner.module, {}, owner.path)
        stack = () if owner.stack is None else (owner.stack,)
        values = []
        for part in parts:
            twice = next((d.name for d in part.dims if part.dims.count(d) > 1), None)
            if twice:
                raise Problem("FUS022", f"{twice} appears twice in one tensor", here.type.span,
                              f"would be stored as [{', '.join(map(dims.show, axes))}]",
                              hint=f"give one of them another name in config: {twice}2 = {twice}")
            values.append(ops.make(
                "weight", dtype="x", dims=stack + part.dims, key=key, shape=tuple(d.size for d in stack) + shape,
                offset=part.offset, strides=tuple(math.prod(shape) for _ in stack) + part.strides,
                origin=self.origin(_At(here.span), origin_scope)))
        result = self.weights[key, axes] = values[0] if len(values) == 1 else Many(tuple(values))
        return result

    def pick(self, weight, stack: Dim, field, scope: Scope):
        """A stacked weight, indexed by the tensor that routes."""
        if isinstance(weight, Many):
            return Many(tuple(self.pick(w, stack, field, scope) for w in weight.values))
        return self.make("gather", weight, scope.routed, dim=stack.name, node=field, scope=scope)

    # ---- stacks -----------------------------------------------------------------------------------------------------

    def count(self, stack: Stack) -> int:
        number = self.number(stack.count, stack.field.count)
        if not isinstance(number, int) or not 0 <= number <= _MOST_MEMBERS:
            raise Problem("FUS032", f"a stack has a whole number of members, at most {_MOST_MEMBERS}", stack.field.count.span,
                          f"this is {number}")
        return number

    def member(self, stack: Stack, index, node, scope: Scope):
        """`layers[3]`, or `experts[e]` with a tensor e."""
        if isinstance(index, Value):
            if not isinstance(stack.count, Dim):
                raise Problem("FUS020", "a routed stack is counted by a dim", stack.field.count.span,
                              f"this is {describe(stack.count)}")
            if index.dtype != "int":
                raise Problem("FUS050", "a stack is indexed by integers", node.arguments[0].span, f"this is {index.dtype}")
            inner = Scope(stack.owner.module, dict(stack.owner.statics), stack.path)
            if stack.field.index is not None:
                raise Problem("FUS043", "members of a routed stack are alike", stack.field.name_span, "names its index")
            routed = stack.members.get(-1)
            if routed is None:
                routed = stack.members[-1] = self.instance(stack.owner, stack.field, f"{stack.path}.{{}}", inner, stack.count)
            return Routed(routed, index)
        at = self.number(index, node.arguments[0])
        if not isinstance(at, int) or not 0 <= at < self.count(stack):
            raise Problem("FUS032", "no such member", node.arguments[0].span, f"the stack has {self.count(stack)}, this is {at}")
        return self.at(stack, at)

    def at(self, stack: Stack, index: int) -> Instance:
        found = stack.members.get(index)
        if found is None:
            names = dict(stack.owner.statics) | ({stack.field.index: index} if stack.field.index else {})
            scope = Scope(stack.owner.module, names, stack.path)
            found = stack.members[index] = self.instance(stack.owner, stack.field, f"{stack.path}.{index}", scope)
        return found

    def compose(self, stack: Stack, arguments, node, scope: Scope):
        """layers(x, …): each member applied to the result of the one before; the other arguments go to all."""
        if not arguments:
            raise Problem("FUS040", "wrong number of arguments", node.span, "a stack needs a value to pass through its members")
        result = arguments[0]
        for index in range(self.count(stack)):
            result = self.enter(self.at(stack, index), [result, *arguments[1:]], node, scope)
            if result is POISON:
                return POISON
        return result

    # ---- calls ------------------------------------------------------------------------------------------------------

    def enter(self, instance: Instance, arguments, node, scope: Scope, routed=None):
        """Calls a block. The values it makes carry its path."""
        decl = instance.ref.decl
        self.count_arguments(decl.name, len(decl.params), arguments, node, decl)
        self.not_endless(decl, node)
        if any(a is POISON for a in arguments):
            return POISON
        call = scope.call or (node.span if instance.module.is_std else None)
        inner = Scope(instance.module, dict(instance.statics), instance.path, instance,
                      scope.routed if routed is None else routed, call)
        with self.called_from(call):
            self.check_arguments(decl, arguments, node, inner, instance.field)
            inner.names.update((param.name, a) for param, a in zip(decl.params, arguments, strict=True))
            return self.attempt(lambda: self.check_result(decl, self.run_body(decl.body, inner), inner))


class _At:
    """Stands for a node where only a span is at hand."""

    __slots__ = ("span",)

    def __init__(self, span):
        self.span = span


def _signature(decl) -> str:
    """`Linear[I -> O]`, as declared."""
    text = ""
    for before, static in zip((None, *decl.statics), decl.statics, strict=False):
        separator = "" if before is None else " -> " if before.arrow else ", "
        text += separator + static.name + ("=…" if static.default is not None else "")
    return f"{decl.name}[{text}]" if text else decl.name
