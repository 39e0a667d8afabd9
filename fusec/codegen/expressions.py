"""Expressions of the graph as lines of Triton.

Inside a kernel arithmetic is float32 (integers and booleans stay what they are): values are widened as they are loaded and
rounded as they are stored. An `Emitter` writes the expression of a value at given *coordinates*: for each dim, the text of an
index and the side of the tile on which it runs. Templates own the tiling; everything between a load and a store is written
here, from the op table.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.graph import Value
from ..ir.ops import OPS

INFIX = ("add", "sub", "mul", "div", "lt", "le", "gt", "ge", "eq", "and", "or")
WIDTH = 100  # longest expression written on one line


@dataclass(frozen=True)
class Index:
    """The index of one dim: Python text, and the masks (names) that guard it."""

    text: str
    masks: tuple[str, ...] = ()


class Params:
    """The pointers a kernel takes, in order of first use. `roles` says what each one is: ("input", i), ("output", i),
    ("slots",)…"""

    def __init__(self):
        self.roles: dict[str, tuple] = {}

    def pointer(self, name: str, role: tuple) -> str:
        """The parameter that plays `role`, called after `name`."""
        label, n = f"{name}_ptr", 1
        while self.roles.get(label, role) != role:
            n += 1
            label = f"{name}_{n}_ptr"
        self.roles[label] = role
        return label


class Emitter:
    """Writes values of one kernel body at one set of coordinates.

    coords: dim name -> Index.  given: values that already have a name (a contraction's result, a finished reduction).
    lines: where statements go.  users: who reads a value, to decide what deserves a name.  policy: a further argument of
    every load.
    """

    def __init__(
        self,
        body,
        params: Params,
        coords: dict[str, Index],
        given: dict[Value, str],
        lines: list[str],
        names: Names,
        users=None,
        policy: str = "",
    ):
        self.policy = policy
        self.body, self.params, self.coords, self.lines, self.names = body, params, coords, lines, names
        self.users = users if users is not None else body.users()
        self.known: dict[Value, str] = dict(given)

    def at(self, **coords: Index) -> Emitter:
        """The same kernel at other coordinates (another row, another part of a tile). What does not lie along them is known."""
        known = {value: text for value, text in self.known.items() if not coords.keys() & set(value.names)}
        kept = {name: index for name, index in self.coords.items() if name != "*" or not coords.keys() & set(index.text[0])}
        return Emitter(self.body, self.params, kept | coords, known, self.lines, self.names, self.users, self.policy)

    def write(self, value: Value) -> str:
        """The text of `value`: a name or a short expression. Statements it needs are appended to `lines`."""
        if value in self.known:
            return self.known[value]
        text = self.expression(value)
        worth = self.reads(value) > 1 or len(text) > WIDTH
        if worth and value.op not in ("const", "index") and not text.isidentifier():
            text = self.assign(self.names.of(value), text)
        self.known[value] = text
        return text

    def reads(self, value: Value) -> int:
        """How often the text of `value` would be written."""
        return sum(user.inputs.count(value) for user in self.users.get(value, ())) + (value in self.body.outputs)

    def assign(self, name: str, text: str) -> str:
        self.lines.append(f"{name} = {strip(text)}")
        return name

    def expression(self, value: Value) -> str:
        op = value.op
        if op == "input":
            return self.load(value)
        if op == "const":
            return literal(value.attrs["value"])
        if op == "index":
            return self.coords[value.dims[0].name].text
        if op == "cast":
            text = self.write(value.inputs[0])
            return f"{text}.to(tl.float32)" if value.inputs[0].dtype in ("int", "bool") and value.attrs["to"] != "int" else text
        if op == "split":
            return self.write_split(value)
        if op == "gather":
            table, ids = value.inputs
            text = self.write(ids)
            row = text if text.isidentifier() else self.assign(self.names.fresh("row"), text)
            masks = tuple(dict.fromkeys(m for d in ids.dims for m in self.coords[d.name].masks))
            return self.at(**{value.attrs["dim"]: Index(row, masks)}).write(table)
        if OPS[op].kind == "elementwise":
            operands = [self.write(i) for i in value.inputs]
            if op in ("add", "sub", "mul", "div", "maximum", "minimum", "pow"):  # an integer operand of a real result
                operands = [
                    f"{t}.to(tl.float32)" if i.dtype == "int" and i.op != "const" and value.dtype in ("x", "f32") else t
                    for t, i in zip(operands, value.inputs, strict=True)
                ]
            spelling = OPS[op].triton
            text = spelling.format(*(map(strip, operands) if spelling.startswith("tl.") else operands))
            return f"({text})" if op in INFIX or op == "neg" else text
        raise NotImplementedError(f"{op} has no place in an expression of {self.body.name}")

    def write_split(self, value: Value) -> str:
        """A component of an axis: the same value at a computed index."""
        a = value.attrs
        terms = [term(self.coords[name].text, stride) for name, stride in zip(a["into"], a["strides"], strict=True)]
        terms += [str(a["offset"])] if a["offset"] or not terms else []
        masks = tuple(dict.fromkeys(m for name in a["into"] for m in self.coords[name].masks))
        return self.at(**{a["dim"]: Index(f"({' + '.join(terms)})" if len(terms) > 1 else terms[0], masks)}).write(
            value.inputs[0]
        )

    def load(self, value: Value) -> str:
        """A stored value at the current coordinates; rows are contiguous, in the order of its dims."""
        pointer = self.params.pointer(value.attrs["name"], ("input", self.body.inputs.index(value)))
        offset, masks = self.address(value)
        mask = f", mask={' & '.join(masks)}, other=0" if masks else ""
        text = f"tl.load({pointer}{' + ' + offset if offset else ''}{mask}{self.policy})"
        if value.dtype in ("x", "f32", "weak"):
            text += ".to(tl.float32)"
        return self.assign(self.names.fresh(value.attrs["name"]), text)

    def address(self, value: Value) -> tuple[str, tuple[str, ...]]:
        strides = row_major(value.dims)
        terms, masks = [], []
        flat = self.coords.get("*")  # dims that together are one flat index
        names = list(value.names)
        if flat is not None:
            group = flat.text[0]
            at = find(names, group)
            if at is not None and len(group) > 1:
                terms.append((at, term(flat.text[1], strides[at + len(group) - 1])))
                masks += flat.masks
                names[at : at + len(group)] = [None] * len(group)
        for i, name in enumerate(names):
            if name is not None:
                index = self.coords[name]
                terms.append((i, term(index.text, strides[i])))
                masks += index.masks
        return " + ".join(t for _, t in sorted(terms) if t != "0"), tuple(dict.fromkeys(masks))


class Names:
    """Fresh, readable names for one kernel."""

    def __init__(self, taken=()):
        self.taken = set(taken)

    def fresh(self, label: str) -> str:
        label = "".join(c if c.isalnum() else "_" for c in label).strip("_").lower() or "v"
        label = f"v{label}" if label[0].isdigit() else label
        name, n = label, 1
        while name in self.taken:
            n += 1
            name = f"{label}_{n}"
        self.taken.add(name)
        return name

    def of(self, value: Value) -> str:
        return self.fresh(
            value.op if value.op not in INFIX and value.op not in ("cast", "where", "neg", "join", "split") else "v"
        )


def find(names, group) -> int | None:
    return next((i for i in range(len(names) - len(group) + 1) if tuple(names[i : i + len(group)]) == tuple(group)), None)


def term(text: str, stride) -> str:
    if text == "0":
        return "0"
    return text if stride == 1 else f"{text} * {stride}"


def row_major(dims) -> list:
    """Elements between neighbours along each dim; the run-time dim comes first and has the stride of a whole row."""
    strides, step = [], 1
    for dim in reversed(dims):
        strides.insert(0, step)
        step *= dim.size or 1
    return strides


def literal(number) -> str:
    if number in (float("inf"), float("-inf")):
        return f'float("{number}")'
    return repr(number) if number >= 0 else f"({number!r})"


def strip(text: str) -> str:
    """Without one pair of parentheses around the whole."""
    if not (text.startswith("(") and text.endswith(")")):
        return text
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0 and i < len(text) - 1:
            return text
    return text[1:-1]


def coordinates(dims, flat: str, masks=(), lines=None, names: Names | None = None) -> dict[str, Index]:
    """Indices of `dims` (sized, row-major) from one flat index: `k = n % K`, `g = n // K`… written to `lines`."""
    if not dims:
        return {}
    if len(dims) == 1:
        return {dims[0].name: Index(flat, masks)}
    table, step = {"*": Index((tuple(d.name for d in dims), flat), masks)}, 1
    for i, dim in enumerate(reversed(dims)):
        text = flat if step == 1 else f"{flat} // {step}"
        if i < len(dims) - 1:
            text = f"{text} % {dim.size}"
        name = names.fresh(f"i_{dim.name}")
        lines.append(f"{name} = {text}")
        table[dim.name] = Index(name, masks)
        step *= dim.size
    return table
