"""A Llama of any number of layers as graph text, for tests that want something of real shape."""

HEADER = """\
graph Llama
  source llama.fuse
  dims T, S, V={V}, D={D}, F={F}, G={G}, R={R}, K={K}, J={J}
  input %ids : int[T]   @ 40:13
  input %pos : int[T]   @ 40:26
  %embed = weight key="model.embed_tokens.weight" shape=({V}, {D}) offset=0 strides=({D}, 1) : x[V, D]   @ 41:3 model.embed_tokens
  %x0 = gather(%embed, %ids) dim="V"   @ 46:7 model.embed_tokens
  %theta = const value=10000.0   @ 14:11
  %slope = const value={slope}   @ 14:11
  %index = index : int[J]   @ 14:11
  %power = mul(%slope, %index)   @ 14:11
  %freqs = pow(%theta, %power)   @ 14:11
  %angle = mul(%pos, %freqs)   @ 14:11
  %cos = cos(%angle)   @ 14:11
  %sin = sin(%angle)   @ 14:11
"""

NORM = """\
  {out}f = cast({x}) to="f32"   @ std.fuse:90:3 {path}
  {out}s = mul({out}f, {out}f)   @ std.fuse:90:3 {path}
  {out}m = mean({out}s) over=("D",)   @ std.fuse:90:3 {path}
  {out}e = const value=1e-05   @ std.fuse:90:3 {path}
  {out}a = add({out}m, {out}e)   @ std.fuse:90:3 {path}
  {out}r = rsqrt({out}a)   @ std.fuse:90:3 {path}
  {out}n = mul({out}f, {out}r)   @ std.fuse:90:3 {path}
  {out}c = cast({out}n) to="x"   @ std.fuse:90:3 {path}
  {out}w = weight key="{path}.weight" shape=({D},) offset=0 strides=(1,) : x[D]   @ std.fuse:90:3 {path}
  {out} = mul({out}c, {out}w)   @ std.fuse:90:3 {path}
"""

ROPE = """\
  {out}f = cast({x}) to="f32"   @ std.fuse:60:3 {path}
  {out}a = split({out}f) dim="K" into=("J",) sizes=({J},) strides=(1,) offset=0   @ std.fuse:60:3 {path}
  {out}b = split({out}f) dim="K" into=("J",) sizes=({J},) strides=(1,) offset={J}   @ std.fuse:60:3 {path}
  {out}ac = mul({out}a, %cos)   @ std.fuse:60:3 {path}
  {out}bs = mul({out}b, %sin)   @ std.fuse:60:3 {path}
  {out}bc = mul({out}b, %cos)   @ std.fuse:60:3 {path}
  {out}as = mul({out}a, %sin)   @ std.fuse:60:3 {path}
  {out}l = sub({out}ac, {out}bs)   @ std.fuse:60:3 {path}
  {out}r = add({out}bc, {out}as)   @ std.fuse:60:3 {path}
  {out}j = join({out}l, {out}r) dim="K" size={K} parts=((("J",), (1,), 0), (("J",), (1,), {J}))   @ std.fuse:60:3 {path}
  {out} = cast({out}j) to="x"   @ std.fuse:60:3 {path}
"""

LINEAR = """\
  {out}w = weight key="{path}.weight" shape=({rows}, {columns}) offset=0 strides={strides} : x[{dims}]   @ 20:3 {path}
  {out} = contract({x}, {out}w) over={over}   @ 24:3 {path}
"""

ATTEND = """\
  {out}ck = cache({out}k) name="{path}.0"   @ 24:3 {path}
  {out}cv = cache({out}v) name="{path}.1"   @ 24:3 {path}
  {out} = via({out}q, {out}ck, {out}cv, %pos) body=attend template="attention" : x[T, G, R, K]   @ 24:10 {path}
    input %q : x[T, G, R, K]
    input %k : x[S, G, K]
    input %v : x[S, G, K]
    input %pos : int[T]
    %qk = mul(%q, %k)
    %d = sum(%qk) over=("K",)
    %scale = const value={scale}
    %s = mul(%d, %scale)
    %i = index : int[S]
    %mask = le(%i, %pos)
    %sf = cast(%s) to="f32"
    %inf = const value=-inf
    %masked = where(%mask, %sf, %inf)
    %max = max(%masked) over=("S",)
    %less = sub(%masked, %max)
    %e = exp(%less)
    %z = sum(%e) over=("S",)
    %p = div(%e, %z)
    %px = cast(%p) to="x"
    %pv = mul(%px, %v)
    %o = sum(%pv) over=("S",)
    return %o
"""


def llama_text(layers=2, *, V=50, D=16, F=24, G=2, R=2, K=4) -> str:
    sizes = dict(V=V, D=D, F=F, G=G, R=R, K=K, J=K // 2)

    def norm(out, x, path):
        return NORM.format(out=out, x=x, path=path, D=D)

    def linear(out, x, path, outward, inward):
        axes = []
        for names in (outward, inward):
            step, axis = 1, []
            for name in reversed(names):
                axis.insert(0, step)
                step *= sizes[name]
            axes.append((axis, step))
        (rows, n), (columns, k) = axes
        strides = tuple(s * k for s in rows) + tuple(columns)
        over = "(" + "".join(f'"{name}", ' for name in inward).rstrip() + ")"
        dims = ", ".join(outward + inward)
        return LINEAR.format(out=out, x=x, path=path, rows=n, columns=k, strides=strides, dims=dims, over=over)

    text = HEADER.format(**sizes, slope=-2 / K)
    for i in range(layers):
        path, x = f"model.layers.{i}", f"%x{i}"
        a, h, m = f"%a{i}", f"%h{i}", f"%m{i}"
        text += norm(f"{a}n", x, f"{path}.input_layernorm")
        for name, dims in (("q", "GRK"), ("k", "GK"), ("v", "GK")):
            out = f"{a}{name}" if name == "v" else f"{a}{name}p"
            text += linear(out, f"{a}n", f"{path}.self_attn.{name}_proj", dims, "D")
            if name != "v":
                text += ROPE.format(out=f"{a}{name}", x=out, path=f"{path}.self_attn", K=K, J=K // 2)
        text += ATTEND.format(out=a, path=f"{path}.self_attn", scale=K**-0.5)
        text += linear(f"{a}o", a, f"{path}.self_attn.o_proj", "D", "GRK")
        text += f"  {h} = add({x}, {a}o)   @ 36:7 {path}\n"
        text += norm(f"{m}n", h, f"{path}.post_attention_layernorm")
        text += linear(f"{m}g", f"{m}n", f"{path}.mlp.gate_proj", "F", "D")
        text += linear(f"{m}u", f"{m}n", f"{path}.mlp.up_proj", "F", "D")
        text += "".join(f"  {m}{line}   @ 29:13 {path}.mlp\n" for line in (
            f"neg = neg({m}g)", f"exp = exp({m}neg)", "one = const value=1", f"den = add({m}one, {m}exp)",
            f"act = div({m}g, {m}den)", f"mul = mul({m}act, {m}u)"))
        text += linear(f"{m}d", f"{m}mul", f"{path}.mlp.down_proj", "D", "F")
        text += f"  %x{i + 1} = add({h}, {m}d)   @ 37:3 {path}\n"
    text += norm("%n", f"%x{layers}", "model.norm") + linear("%logits", "%n", "lm_head", "V", "D")
    return text + "  return %logits\n"
