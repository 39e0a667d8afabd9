"""Expressions: compile-time arithmetic is done here and now, run-time arithmetic becomes values of the graph."""

from __future__ import annotations

import math
import operator

from ..ir import ops
from ..ir.graph import Dim, Origin, Value
from . import dims, syntax
from .scope import (
    POISON,
    UNSUPPORTED,
    BlockRef,
    Many,
    Missing,
    OpRef,
    Primitive,
    Problem,
    Scope,
    Silent,
    Stack,
    Table,
    describe,
    show_dims,
)

_OPERATORS = {"+": "add", "-": "sub", "*": "mul", "/": "div", "%": "mod", "^": "pow", "<": "lt", "<=": "le", ">": "gt",
              ">=": "ge", "==": "eq", "and": "and", "or": "or"}


def _divide(a, b):
    exact = isinstance(a, int) and isinstance(b, int) and b and a % b == 0
    return a // b if exact else a / b


def _power(a, b):
    small = isinstance(a, int) and isinstance(b, int) and 0 <= b < 64
    return a ** b if small else math.pow(a, b)


_FOLD = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": _divide, "%": operator.mod, "^": _power, "<": operator.lt,
         "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne,
         "and": lambda a, b: a and b, "or": lambda a, b: a or b}


class Expressions:
    """Evaluates expressions. `errors` collects diagnostics; `regions` is the stack of value sets made inside `via` bodies."""

    def __init__(self):
        self.errors, self.regions = [], []

    # ---- making values ----------------------------------------------------------------------------------------------

    def origin(self, node, scope: Scope) -> Origin:
        span = scope.call or node.span
        line, column = span.source.position(span.start)
        return Origin(span.source.name, line, column, scope.path)

    def make(self, op, *inputs, node, scope, **attrs) -> Value:
        """A value of primitive `op`; numbers among the operands become constants."""
        origin = self.origin(node, scope)
        operands = tuple(i if isinstance(i, Value) else self.constant(i, node, scope) for i in inputs)
        try:
            value = ops.make(op, *operands, origin=origin, **attrs)
        except ops.ShapeError as error:
            raise Problem("FUS021", "dimension mismatch", scope.call or node.span, str(error)) from None
        return self.keep(value)

    def keep(self, value: Value) -> Value:
        if self.regions:
            self.regions[-1].add(value)
        return value

    def constant(self, number, node, scope) -> Value:
        number = self.number(number, node)
        number = int(number) if isinstance(number, bool) else number
        return self.keep(ops.make("const", value=number, origin=self.origin(node, scope)))

    # ---- conversions ------------------------------------------------------------------------------------------------

    def number(self, value, node):
        """A compile-time number (a dim stands for its size)."""
        if isinstance(value, bool | int | float):
            return value
        if isinstance(value, dims.Axis):
            size = dims.size(value)
            if size is None:
                raise Problem("FUS051", f"{dims.show(value)} has no size at compile time", node.span, "is known only at run time")
            return size
        self.known(value, node)
        raise Problem("FUS043", "a number was expected", node.span, f"this is {describe(value)}")

    def known(self, value, node):
        """Refuses a key that the config lacks."""
        if isinstance(value, Missing):
            raise self.missing_key(value.key, node)
        return value

    def axis(self, value, node) -> dims.Axis:
        """An axis; the literal 1 is the axis of one element."""
        if isinstance(value, dims.Axis):
            return value
        if value is POISON:
            raise Silent
        if value == 1 and isinstance(value, int):
            return dims.UNIT
        hint = None
        if isinstance(value, int) and not isinstance(value, bool):
            hint = "give it a name in config, then use the name"
        elif isinstance(value, float):
            hint = "sizes must divide evenly"
        raise Problem("FUS020", "a dim was expected", node.span, f"this is {describe(value)}", hint=hint)

    def sized(self, value, node) -> dims.Axis:
        """An axis that may be part of another."""
        axis = self.axis(value, node)
        if dims.size(axis) is None:
            raise Problem("FUS020", "a run-time dim stands alone", node.span, f"{dims.show(axis)} has no size at compile time")
        return axis

    # ---- expressions ------------------------------------------------------------------------------------------------

    def value(self, node, scope: Scope):
        """The value of an expression in a body, in config, or in a condition."""
        return _EVALUATE[type(node)](self, node, scope)

    def _number(self, node, scope):
        return node.value

    def _name(self, node, scope):
        value = self.lookup(node, scope)
        if value is UNSUPPORTED:
            raise Problem("FUS033", "the program does not cover this config", node.span, "is what the config chooses here")
        return value

    def _attribute(self, node, scope):
        """`table.key`, of a table of the config."""
        table = self.value(node.value, scope)
        if isinstance(table, Table):
            return self.config_key(node.name, table.entries, f"{table.key}.")
        if table is None or isinstance(table, Missing):
            return Missing(f"{table.key}.{node.name}" if table is not None else node.span.text)
        if table is POISON:
            return POISON
        raise Problem("FUS043", f"nothing here is called {node.name}", node.span, f"{node.value.span.text} is {describe(table)}")

    def _negate(self, node, scope):
        value = self.value(node.value, scope)
        if value is POISON:
            return POISON
        if isinstance(value, Many):
            return Many(tuple(self.make("neg", v, node=node, scope=scope) for v in value.values))
        return self.make("neg", value, node=node, scope=scope) if isinstance(value, Value) else -self.number(value, node.value)

    def _binary(self, node, scope):
        left = self.value(node.left, scope)
        if node.operator in ("and", "or") and isinstance(left, bool) and left is (node.operator == "or"):
            return left
        return self.arithmetic(node, left, self.value(node.right, scope), scope)

    def arithmetic(self, node, left, right, scope):
        """`left operator right` for any mixture of numbers, tensors and several tensors."""
        if left is POISON or right is POISON:
            return POISON
        if isinstance(left, Many) or isinstance(right, Many):
            return self.each(node, (left, right), lambda a, b: self.arithmetic(node, a, b, scope))
        if isinstance(left, Value) or isinstance(right, Value):
            if node.operator == "@":
                return self.contract(node, left, right, scope)
            for side, value in ((node.left, left), (node.right, right)):
                if not isinstance(value, Value):
                    self.number(value, side)
            if node.operator == "!=":
                raise Problem("FUS043", "tensors cannot be compared with !=", node.span, hint="use where(a == b, …, …)")
            if node.operator == "^" and isinstance(left, int | Dim):
                left = float(self.number(left, node.left))
            return self.make(_OPERATORS[node.operator], left, right, node=node, scope=scope)
        if node.operator == "@":
            raise Problem("FUS043", "@ contracts two tensors", node.span, f"these are {describe(left)} and {describe(right)}")
        if node.operator in ("==", "!=") and not (isinstance(left, dims.Axis) or isinstance(right, dims.Axis)):
            return _FOLD[node.operator](self.known(left, node.left), self.known(right, node.right))
        left, right = self.number(left, node.left), self.number(right, node.right)
        try:
            return _FOLD[node.operator](left, right)
        except (ZeroDivisionError, OverflowError, ValueError):
            raise Problem("FUS032", "this number has no value", node.span, f"is {left} {node.operator} {right}") from None

    def each(self, node, operands, function):
        """Applies `function` to each of several tensors; single operands take part in every application."""
        counts = {len(o.values) for o in operands if isinstance(o, Many)}
        if len(counts) > 1:
            raise Problem("FUS041", "different numbers of tensors", node.span,
                          f"combines {' and '.join(map(str, sorted(counts)))}")
        (count,) = counts
        columns = [o.values if isinstance(o, Many) else (o,) * count for o in operands]
        return Many(tuple(function(*row) for row in zip(*columns, strict=True)))

    def contract(self, node, left, right, scope):
        """`left @ right`: sums products over every dim they share. Dims that route to experts run in parallel."""
        for side, value in ((node.left, left), (node.right, right)):
            if not isinstance(value, Value):
                raise Problem("FUS043", "@ contracts two tensors", side.span, f"this is {describe(value)}")
        parallel = {d.name for d in scope.routed.dims} if scope.routed is not None else set()
        over = tuple(n for n in left.names if n in right.names and n not in parallel)
        if not over:
            raise Problem("FUS024", "nothing to contract", scope.call or node.span,
                          f"shares no dim: {show_dims(left.dims)} on the left, {show_dims(right.dims)} on the right")
        self.keep_tokens_apart(over, node, scope)
        return self.make("contract", left, right, over=over, node=node, scope=scope)

    def keep_tokens_apart(self, names, node, scope):
        """Refuses work along T, or along S outside the body of a template."""
        if "T" in names:
            raise Problem("FUS060", "tokens are mixed outside attention", scope.call or node.span, "works along T",
                          hint="only cache and attend look at other tokens, so that T may be the packed tokens of any batch")
        if "S" in names and not self.regions:
            raise Problem("FUS061", "no template implements this efficiently", scope.call or node.span,
                          "works along the history S", hint="put it into an op via attention, or call attend")

    def _choice(self, node, scope):
        return self.value(node.value if self.condition(node.condition, scope) else node.otherwise, scope)

    def condition(self, node, scope) -> bool:
        value = self.value(node, scope)
        if value is POISON:
            raise Silent
        self.known(value, node)
        if isinstance(value, Value | Many):
            raise Problem("FUS051", "a choice is made at compile time", node.span, f"this is {describe(value)}",
                          hint="for a choice at run time use where(condition, a, b)")
        if not isinstance(value, bool):
            raise Problem("FUS032", "true or false was expected", node.span, f"this is {describe(value)}",
                          hint="compare it: … > 0, … == …")
        return value

    def _default(self, node, scope):
        value = self.value(node.value, scope)
        return self.value(node.otherwise, scope) if value is None or isinstance(value, Missing) else value

    def _cast(self, node, scope):
        value, like = self.value(node.value, scope), self.value(node.like, scope)
        if value is POISON or like is POISON:
            return POISON
        if not isinstance(like, Value):
            raise Problem("FUS043", "a tensor whose dtype to take was expected", node.like.span, f"this is {describe(like)}")
        return self.cast(value, like.dtype, node, scope)

    def cast(self, value, to, node, scope):
        if value is POISON:
            return POISON
        if isinstance(value, Many):
            return Many(tuple(self.cast(v, to, node, scope) for v in value.values))
        if isinstance(value, Value) and value.dtype == to:
            return value
        return self.make("cast", value, to=to, node=node, scope=scope)

    # ---- brackets ---------------------------------------------------------------------------------------------------

    def static(self, node, scope: Scope):
        """The value of an expression in brackets, where arithmetic on dims builds axes."""
        if isinstance(node, syntax.Binary) and node.operator in "+*/":
            left, right = self.static(node.left, scope), self.static(node.right, scope)
            if left is POISON or right is POISON:
                return POISON
            shaped = isinstance(left, dims.Axis) or isinstance(right, dims.Axis)
            if node.operator == "/" and isinstance(left, Dim) and isinstance(right, int):
                if left.size is None or left.size % right:
                    raise Problem("FUS023", f"{left.name} does not divide by {right}", node.span, f"{left.name} is {left.size}")
                return Dim(f"{left.name}/{right}", left.size // right)
            fractional = isinstance(left, float) or isinstance(right, float)
            if node.operator == "*" and shaped and not fractional or node.operator == "+" and (shaped or left == right == 1):
                left, right = self.sized(left, node.left), self.sized(right, node.right)
                return dims.nest(left, right) if node.operator == "*" else dims.concat(left, right)
            return self.arithmetic(node, left, right, scope)
        if isinstance(node, syntax.Choice):
            return self.static(node.value if self.condition(node.condition, scope) else node.otherwise, scope)
        value = self.value(node, scope)
        self.known(value, node)
        if isinstance(value, Value | Many):
            raise Problem("FUS051", "brackets hold what is known at compile time", node.span, f"this is {describe(value)}",
                          hint="pass it in parentheses")
        return value

    def _subscript(self, node, scope):
        target = self.value(node.value, scope)
        if target is POISON:
            return POISON
        if isinstance(target, OpRef | BlockRef):
            return self.bind(target, node, scope)
        if isinstance(target, Primitive):
            return self.bind_primitive(target, node, scope)
        argument = node.arguments[0]
        if len(node.arguments) != 1 or isinstance(argument, syntax.Arrow | syntax.Keyword):
            raise Problem("FUS042", "one index was expected", node.span, f"{describe(target)} takes one index")
        index = self.value(argument, scope)
        if index is POISON:
            return POISON
        if isinstance(target, Stack):
            return self.member(target, index, node, scope)
        if isinstance(target, Value):
            return self.gather(target, index, node, scope)
        if target is None or isinstance(target, Missing):
            return target
        if isinstance(target, list):
            at = self.number(index, argument)
            if not isinstance(at, int) or not 0 <= at < len(target):
                raise Problem("FUS032", "no such element", argument.span, f"the list has {len(target)} elements, this is {at}")
            return target[at]
        raise Problem("FUS043", "this takes no brackets", node.value.span, f"is {describe(target)}")

    def gather(self, table, index, node, scope):
        """`table[ids]`: rows of the table's first dim."""
        argument = node.arguments[0]
        if not isinstance(index, Value) or index.dtype != "int":
            raise Problem("FUS050", "a tensor is indexed by integers", argument.span, f"this is {describe(index)}"
                          + (f" of {index.dtype}" if isinstance(index, Value) else ""))
        if not table.dims:
            raise Problem("FUS021", "dimension mismatch", node.value.span, "has no dim to index")
        self.keep_tokens_apart((table.dims[0].name,), node, scope)
        return self.make("gather", table, index, dim=table.dims[0].name, node=node, scope=scope)

    def _call(self, node, scope):
        function = self.value(node.function, scope)
        arguments = [self.value(a, scope) for a in node.arguments]
        if function is POISON or any(a is POISON for a in arguments):
            return POISON
        for argument, written in zip(arguments, node.arguments, strict=True):
            self.known(argument, written)
        return self.apply(function, arguments, node, scope)


_EVALUATE = {
    syntax.Number: Expressions._number, syntax.String: Expressions._number, syntax.Name: Expressions._name,
    syntax.Attribute: Expressions._attribute, syntax.Subscript: Expressions._subscript, syntax.Call: Expressions._call,
    syntax.Negate: Expressions._negate, syntax.Binary: Expressions._binary, syntax.Choice: Expressions._choice,
    syntax.Default: Expressions._default, syntax.Cast: Expressions._cast,
}
