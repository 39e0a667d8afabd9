"""fuse: primitives are partitioned into kernels.

    before   a graph of primitives          after   a graph of `kernel` values, each with its body, read through `get`

A contraction, and a body that a template implements, own a launch: the *anchors*. Around them, by the fewest bytes moved:

* An anchor's result is followed forward: elementwise values, splits, joins and cache writes that need nothing computed later
  join it (its epilogue). A value that is cheap to compute again from what is stored anyway is left to its readers.
* What an anchor reads is followed backward: elementwise values and reductions over the contracted dims are computed on the way in
  (its prologue, or beside it when only the epilogue wants the reduction).
* What is left forms row kernels: elementwise values and reductions over the same dims of each row.

A kernel never depends on itself through another: an epilogue takes in only values of a lower level than its anchor (the level
counts the anchors below a value). Each refusal is recorded with its reason in `graph.attrs["refusals"]`.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from ..ir.graph import Graph, N, T, Value
from ..ir.ops import OPS, make
from .analysis import RUNTIME, axis, cone, is_anchor, levels, statics
from .extract import block_name, extract, joined_name
from .select_rows import bottleneck


@dataclass(frozen=True)
class Refusal:
    """Why `user` is not computed by the kernel that computes `value`."""

    value: Value
    user: Value
    why: str


@dataclass(eq=False)
class Group:
    """One kernel in the making. members: the values it computes.  outputs: those it stores.  rows: the dims of a row kernel's
    rows."""

    kind: str
    anchor: Value | None
    members: set[Value]
    outputs: list[Value]
    rows: tuple[str, ...] = ()


def fuse(graph: Graph) -> Graph:
    fuser = Fuser(graph)
    fuser.form_lookups()
    fuser.form_anchors()
    fuser.form_rows()
    return fuser.assemble()


class Fuser:
    def __init__(self, graph: Graph):
        self.graph, self.static = graph, statics(graph)
        self.order = graph.walk()
        self.position = {value: i for i, value in enumerate(self.order)}
        self.users, self.level = graph.users(), levels(graph, self.static)
        self.owner: dict[Value, Group] = {}  # stored value -> the kernel that stores it
        self.groups: list[Group] = []
        self.refusals: list[Refusal] = []
        self.wanted: list[Value] = []

    def stored(self, value: Value) -> bool:
        """In memory when a kernel starts: an input, a weight, a result of another kernel."""
        return value in self.owner or value.op in ("input", "get") or value in self.static

    def form_lookups(self):
        """A row looked up in a table of weights is stored, with the elementwise values that it alone feeds (a scale, a sum of
        two tables)."""
        for value in self.order:
            if value.op == "gather" and value.inputs[0] in self.static and value not in self.static:
                while (reader := self.only_reader(value)) and self.level[reader] == self.level[value]:
                    value = reader
                if value not in self.owner:
                    self.add_root(value)

    def only_reader(self, value: Value) -> Value | None:
        """The elementwise value that alone reads `value`, if there is one."""
        readers = self.users.get(value, ())
        alone = len(readers) == 1 and OPS[readers[0].op].kind == "elementwise" and value not in self.graph.outputs
        return readers[0] if alone else None

    # ---- anchors and their epilogues -------------------------------------------------------------------------------

    def form_anchors(self):
        for value in self.order:
            if value in self.static:
                continue
            if value.op == "contract":
                if value.inputs[1] not in self.static:
                    self.refusals.append(
                        Refusal(
                            value.inputs[0], value, "both operands change with every token: only a template can contract them"
                        )
                    )
                members = self.epilogue(value)
                group = Group(
                    "contract",
                    value,
                    members,
                    [v for v in sorted(members, key=self.position.__getitem__) if self.leaves_group(v, members)],
                )
            elif value.op in ("via", "top"):
                group = Group(value.attrs.get("template", value.op), value, {value}, [value])
            else:
                continue
            self.groups.append(group)
            self.owner.update((v, group) for v in group.outputs)

    def leaves_group(self, value: Value, members) -> bool:
        return value in self.graph.outputs or any(u not in members for u in self.users.get(value, ()))

    def epilogue(self, anchor: Value) -> set[Value]:
        members, spaces = {anchor}, {anchor: frozenset(axis(anchor))}
        queue = [(self.position[u], u) for u in self.users.get(anchor, ())]
        queue = [p for p, _ in queue]
        heapq.heapify(queue)
        visited = set()
        while queue:
            position = heapq.heappop(queue)
            user = self.order[position]
            if position in visited:
                continue
            visited.add(position)
            why = self.refuses(user, anchor, members, spaces)
            if why:
                self.refusals.append(Refusal(anchor, user, why))
                continue
            members.add(user)
            for reader in self.users.get(user, ()):
                heapq.heappush(queue, self.position[reader])
        # what its readers can compute from values stored anyway is theirs to compute
        for value in sorted(members - {anchor}, key=self.position.__getitem__, reverse=True):
            unread = not any(u in members for u in self.users.get(value, ())) and value not in self.graph.outputs
            if unread and self.recomputable(value, anchor, members):
                members.discard(value)
        return members

    def recomputable(self, value: Value, anchor: Value, members) -> bool:
        """`value` is elementwise over results that the kernel stores for other readers."""
        if OPS[value.op].kind != "elementwise":
            return False
        if value.op == "cast" and value.attrs["to"] == "f32" and value.inputs[0].dtype == "x":
            return True  # half the bytes, and no other number
        inside = [i for i in value.inputs if i in members]
        return all(i is not anchor and (self.read_elsewhere(i, members) or self.recomputable(i, anchor, members)) for i in inside)

    def read_elsewhere(self, value: Value, members) -> bool:
        """Some kernel that cannot compute `value` itself reads it: an anchor does, or an elementwise value that has further
        operands."""
        return any(
            u not in members and (is_anchor(u, self.static) or len(u.inputs) > 1 and len(set(u.inputs)) > 1)
            for u in self.users.get(value, ())
        )

    def refuses(self, user: Value, anchor: Value, members, spaces) -> str | None:
        """None if `user` can be computed where `anchor`'s result lies in registers; else the reason why not. Fills `spaces`."""
        kind = OPS[user.op].kind
        inside = [i for i in user.inputs if i in members]
        if user.op == "split":
            if inside[0] is not anchor and inside[0].op != "split":
                return "it takes apart what was just put together"
            spaces[user] = frozenset(axis(user))
            return None
        if user.op == "cache":
            spaces[user] = None
            return None
        if any(spaces[i] is None for i in inside):
            return "it reads a joined value, which exists only in memory"
        if user.op == "join":
            if len(inside) < len(user.inputs):
                return "some of the parts it joins are computed elsewhere"
            lacking = [set(user.names) - {user.attrs["dim"]} - set(i.names) for i in user.inputs]
            if any(lacking):
                return f"a part that it joins is repeated for each {', '.join(sorted(set().union(*lacking)))}"
            spaces[user] = None
            return None
        if kind == "reduction":
            return f"it reduces over {', '.join(user.attrs['over'])}, which the contraction's tiles divide"
        if kind != "elementwise":
            return f"{user.op} starts a kernel of its own"
        if len({spaces[i] for i in inside}) > 1 or frozenset(axis(user)) != spaces[inside[0]]:
            return "its operands lie over different dims"
        for operand in user.inputs:
            if operand not in members and operand not in self.static and self.level[operand] >= self.level[anchor]:
                return "another operand is computed later"
        spaces[user] = spaces[inside[0]]
        return None

    # ---- what anchors read, and the rest ---------------------------------------------------------------------------

    def form_rows(self):
        for value in self.order:  # rows are picked from a table that lies in memory
            if value.op == "gather" and value not in self.static:
                self.wanted.append(value.inputs[0])
        for group in self.groups:
            anchor = group.anchor
            if group.kind == "contract":
                over = anchor.attrs["over"]
                for operand in anchor.inputs:
                    self.want_unless(self.computable(operand, over, {*self.rows(anchor), *over}), operand)
                for value in group.members - {anchor}:
                    for operand in value.inputs:
                        if operand not in group.members:
                            beside = self.computable(operand, over, {*self.rows(anchor), *over}) and not set(axis(operand))
                            plain = self.computable(operand, (), set(value.names))
                            self.want_unless(beside or plain, operand)
            elif anchor is not None:
                self.wanted += anchor.inputs
        self.wanted += self.graph.outputs
        roots: dict[Value, None] = {}
        while self.wanted:
            value = self.wanted.pop()
            if value in roots or self.stored(value):
                continue
            roots[value] = None
            self.wanted += self.foreign_reductions(value) + self.taken_from_memory(value)
        for root in sorted(roots, key=self.position.__getitem__):
            self.add_root(root)
        self.merge_rows()

    def rows(self, value: Value) -> tuple[str, ...]:
        return tuple(n for n in value.names if n in RUNTIME)

    def want_unless(self, fine: bool, value: Value):
        """Unless `fine`, `value` is to be stored; or the one value below it from which the rest can be computed on the way in."""
        if not fine and not self.stored(value):
            point = bottleneck([value], self.position, self.static)
            self.wanted.append(point if point is not None and self.nearer(point, value) else value)

    def nearer(self, point: Value, value: Value) -> bool:
        """`point` lies below `value` with reductions over one set of dims between, and is no literal matter of the inputs."""
        between = cone(value, lambda v: v is point or self.stored(v))
        reduced = {v.attrs["over"] for v in between if OPS[v.op].kind == "reduction"}
        return (
            not self.stored(point)
            and len(reduced) <= 1
            and all(OPS[v.op].kind in ("elementwise", "reduction") for v in between)
            and set(point.names) == set(value.names)
        )

    def computable(self, value: Value, over, dims) -> bool:
        """`value` can be computed on the way in: elementwise over `dims`, with reductions over all of `over` and nothing
        else, from no more than one stored value of that size (else it is cheaper to store it)."""
        inside = cone(value, self.stored)
        reads = {
            i
            for v in inside
            for i in v.inputs
            if self.stored(i) and i not in self.static and axis(i) and set(i.names) == set(value.names) | set(over)
        }
        if len(reads) > 1:
            return False
        for v in inside:
            kind = OPS[v.op].kind
            if v.op == "gather":
                if v.inputs[0] in self.static:
                    return False
            elif kind == "reduction":
                if set(v.attrs["over"]) != set(over):
                    return False
            elif v.op == "split" and OPS[v.inputs[0].op].kind == "reduction":
                return False
            elif kind not in ("elementwise",) and v.op not in ("split", "index"):
                return False
            if not set(v.names) <= set(dims) | {N.name, T.name}:
                return False
        return True

    def foreign_reductions(self, root: Value) -> list[Value]:
        """Reductions below `root` over other dims than the topmost one: they need a kernel of their own."""
        reductions = [v for v in reversed(cone(root, self.stored)) if OPS[v.op].kind == "reduction"]
        return [v for v in reductions if set(v.attrs["over"]) != set(reductions[0].attrs["over"])]

    def taken_from_memory(self, root: Value) -> list[Value]:
        """What is read below `root` at other places than it is computed at: a joined value, a reduction that is split."""
        reads = [(v, i) for v in cone(root, self.stored) if v.op not in ("join", "cache") for i in v.inputs if not self.stored(i)]
        return [i for v, i in reads if i.op == "join" or v.op == "split" and OPS[i.op].kind == "reduction"]

    def row_dims(self, root: Value) -> tuple[str, ...]:
        reductions = [v for v in cone(root, self.stored) if OPS[v.op].kind == "reduction"]
        return reductions[-1].names if reductions else self.rows(root) or ("T",)

    def add_root(self, root: Value):
        rows = self.row_dims(root)
        members = set(cone(root, self.stored))
        reads = {i for v in members for i in v.inputs if self.stored(i) and i not in self.static}
        for group in reversed(self.groups):
            if group.kind != "rows" or self.level[group.outputs[0]] != self.level[root] or group.rows != rows:
                continue
            theirs = {i for v in group.members for i in v.inputs if i not in self.static}
            if any(i in group.outputs and (i.op == "join" or v.op == "split") for v in members for i in v.inputs):
                continue
            if any(self.needs(self.owner[i], group) for i in reads if i in self.owner and self.owner[i] is not group):
                continue
            if reads & (theirs | set(group.outputs)):
                group.outputs.append(root)
                group.members |= members
                self.owner[root] = group
                return
        group = Group("rows", None, members, [root], rows)
        self.groups.append(group)
        self.owner[root] = group

    def needs(self, group: Group, other: Group) -> bool:
        """`group` reads what `other` stores, or what others make of it, all at one level."""
        seen, stack = set(), [group]
        while stack:
            current = stack.pop()
            if current is other:
                return True
            if current not in seen and current.kind == "rows":
                seen.add(current)
                stack += {self.owner[i] for v in current.members for i in v.inputs if i in self.owner}
        return False

    def merge_rows(self):
        """Row kernels that could run side by side become one launch, each with its own section (q and k, each normed by
        heads)."""
        depth, merged = {}, {}
        for group in [g for g in self.groups if g.kind == "rows"]:
            reads = {self.owner[i] for v in group.members for i in v.inputs if i in self.owner}
            level = self.level[group.outputs[0]]
            depth[group] = max(
                (depth[r] + 1 for r in reads if r in depth and r is not group and self.level[r.outputs[0]] == level), default=0
            )
            runtime = tuple(n for n in group.rows if n in RUNTIME)
            first = merged.setdefault((level, depth[group], runtime), group)
            if first is not group:
                first.members |= group.members
                first.outputs += group.outputs
                self.owner.update(dict.fromkeys(group.outputs, first))
                self.groups.remove(group)

    # ---- the graph of kernels --------------------------------------------------------------------------------------

    def assemble(self) -> Graph:
        pieces = {}
        for group in self.groups:
            pieces[group] = self.extract(group)
        while unread := self.unread({leaf for _, leaves in pieces.values() for leaf in leaves}):
            for group in {self.owner[value] for value in unread}:
                group.outputs = [value for value in group.outputs if value not in unread]
                pieces.pop(group)
                if group.outputs:
                    pieces[group] = self.extract(group)
            self.groups = [group for group in self.groups if group.outputs]
        new: dict[Value, Value] = {}

        pending, done, stack = set(), set(), list(reversed(self.groups))
        while stack:
            group = stack[-1]
            if group in done:
                stack.pop()
                continue
            body, leaves = pieces[group]
            waiting = [self.owner[leaf] for leaf in leaves if leaf in self.owner and self.owner[leaf] not in done]
            if waiting:
                if group in pending:
                    raise AssertionError(f"kernels {body.name} and {pieces[waiting[0]][0].name} need each other")
                pending.add(group)
                stack.extend(waiting)
                continue
            origin = (group.anchor or group.outputs[-1]).origin
            kernel = make(
                "kernel",
                *[new.get(leaf, leaf) for leaf in leaves],
                kind=group.kind,
                name=body.name,
                body=body,
                dtype="x",
                dims=(),
                origin=origin,
            )
            for i, output in enumerate(group.outputs):
                new[output] = make("get", kernel, index=i, dtype=output.dtype, dims=output.dims, origin=output.origin)
            done.add(group)
            stack.pop()
        return Graph(
            self.graph.name,
            self.graph.inputs,
            tuple(new.get(o, o) for o in self.graph.outputs),
            self.graph.attrs | {"refusals": tuple(self.refusals)},
        )

    def extract(self, group: Group) -> tuple[Graph, list[Value]]:
        return extract(self.name(group), group.outputs, lambda v: v not in group.members and self.stored(v) and not inlined(v))

    def unread(self, leaves) -> set[Value]:
        """Stored values that no kernel reads after all: those that did read them compute them themselves."""
        outputs = {value for group in self.groups for value in group.outputs}
        return outputs - leaves - set(self.graph.outputs)

    def name(self, group: Group) -> str:
        """After the weights a kernel contracts with, the template, or the block whose values it stores."""
        if group.kind == "contract":
            weights = [v for v in cone(group.anchor.inputs[1], lambda v: False) if v.op == "weight" and len(v.dims) > 1]
            block = group.anchor.origin.path.rpartition(".")[2]
            if len(weights) == 1 and block.isidentifier():
                return block  # a tied head is called a head
            return joined_name([block_name(v.attrs["key"]) for v in weights]) or "contract"
        if group.kind == "rows":
            named = sorted((o for o in group.members if o.op == "gather" or o in group.outputs), key=self.position.__getitem__)
            paths = [o.origin.path.rpartition(".")[2] for o in named]
            return joined_name([p for p in paths if p and not p.isdigit()]) or "rows"
        return group.kind


def inlined(value: Value) -> bool:
    """Literals and iotas are written into the kernel's text."""
    return value.op == "const" or value.op == "index"
