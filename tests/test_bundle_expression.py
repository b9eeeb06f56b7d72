"""Safe expressions against Python's own eval on the same text, and refusals."""

import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from volcast.export.bundle_expression import (
    Component,
    Load,
    Loader,
    Noise,
    Timesteps,
    Unreadable,
    WeightFile,
    evaluate,
)

VALUES = {
    "root": "/b",
    "size": [256, 192, 128],
    "n": 3,
    "old": 0,
    "name": "x",
    "net": Component("net"),
    "sch": Component("sch"),
    "ckpt": WeightFile("/b/m.pt"),
    "f": Loader("net"),
    "a#b": 7,
}


def read(text):
    return evaluate(text, lambda id: VALUES[id.replace("::", "#")])


PLAIN = (
    "1 + 2 * 3 - 4 // 2",
    "-7 % 3 + 0.5",
    "[1] + [2, 3]",
    "(1, 2) + (3,)",
    "'a' + str(0.1) + 'b'",
    "{'a': [1, 2]}['a'][-1]",
    "[5, 6, 7][1:]",
    "1 if 2 < 3 <= 3 and not False else 0 / 0",
    "None is None or 1 / 0",
    "len([1, 2]) + max(1, 2.5) + min([4, 3]) + round(2.6) + int('3') + float(1) + int(bool(2))",
    "list((1, 2)) + list(tuple([3]))",
    "'ab' * 3",
    "f'{1 + 1}x'",
    "[0] * -4",
)


@pytest.mark.parametrize("text", PLAIN)
def test_agrees_with_python(text):
    assert read(text) == eval(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("@root + '/models'", "/b/models"),
        ("[1] + [@size[0]//4, @a::b, @a#b]", [1, 64, 7, 7]),
        ("f'{@root}/{@name}.pt'", "/b/x.pt"),
        ("@net.to(@device)", Component("net")),
        (
            "torch.load(@root + '/m.pt', map_location=@device)['unet'].to(x())",
            WeightFile("/b/m.pt", ("unet",)),
        ),
        ("float(@ckpt['scale_factor'])", WeightFile("/b/m.pt", ("scale_factor",))),
        (
            "torch.randn((1, 3, *@size))" if False else "torch.randn([1] + @size).to(@d)",
            Noise((1, 256, 192, 128)),
        ),
        ("torch.rand(1, 1, 4, 4)", Noise((1, 1, 4, 4))),
        ("@sch.set_timesteps(num_inference_steps=@n, device=@d)", Timesteps("sch", 3)),
        ("@net.load_old_state_dict if bool(@old) else @net.load_state_dict", Loader("net")),
        ("@f(@ckpt)", Load("net", WeightFile("/b/m.pt"))),
        (
            "@net.load_state_dict(load_file('u.safetensors'), strict=True)",
            Load("net", WeightFile("u.safetensors")),
        ),
    ],
)
def test_recognises_without_running(text, value):
    assert read(text) == value


REFUSED = (
    "__import__('os').system('true')",
    "().__class__.__bases__[0].__subclasses__()",
    "(lambda: 1)()",
    "[x for x in [1]]",
    "open('f')",
    "eval('1')",
    "@root.format(1)",
    "9 ** 9 ** 9",
    "'a' * 10 ** 9",
    "[0] * 100000",
    "[[0] * 900] * 900000",
    "'%999999999d' % 1",
    "2 ** 100",
    "9223372036854775807 + 1",
    "1 << 10000000000",
    "int('9' * 5000)",
    "str([1])",
    "1 / 0",
    "[1][7]",
    "'mail@root'",
    "b'bytes'",
    "1j",
    "...",
    "(x := 1)",
    "*[1]",
    "",
    "1 +",
    "(" * 300,
    "-" * 3000 + "1",
    "1" + "+1" * 3000,
    "\0",
    "torch.load('f', map_location='cpu').run()",
    "torch.load(7)",
    "@net.parameters",
    "@net['x']",
    "torch.randn('a')",
    "@net.load_state_dict({})",
)


@pytest.mark.parametrize("text", REFUSED)
def test_refuses(text):
    with pytest.raises(Unreadable) as caught:
        read(text)
    assert "\n" not in str(caught.value)


PURE = {"str": str, "int": int, "len": len, "min": min, "tuple": tuple, "round": round}
LEAVES = st.one_of(
    st.integers(-9, 9).map(str),
    st.sampled_from(["0.5", "'s'", "[1, 2]", "(3,)", "True", "None", "{'k': 1}", "len", "str", "open"]),
)
CODE = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.tuples(
            inner, st.sampled_from(["+", "-", "*", "/", "//", "%", "**", "==", "<", "and", "or", "if"]), inner
        ).map(lambda t: f"({t[0]} if {t[2]} else 1)" if t[1] == "if" else f"({t[0]} {t[1]} {t[2]})"),
        st.tuples(inner, inner).map(lambda t: f"{t[0]}[{t[1]}]"),
        st.tuples(st.sampled_from(["str", "int", "len", "min", "tuple", "round", "open"]), inner).map(
            lambda t: f"{t[0]}({t[1]})"
        ),
        inner.map(lambda t: f"[{t}, -({t})]"),
    ),
    max_leaves=6,
)


@settings(max_examples=700, deadline=None)
@given(CODE)
def test_whatever_is_read_is_what_python_says(text):
    try:
        value = read(text)
    except Unreadable:
        return
    # The text is made above from literals and pure built-ins, and was accepted: eval is the oracle.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # `0[0]` where it is never reached
        wanted = eval(text, {"__builtins__": {}}, PURE)
    assert repr(value) == repr(wanted)


@settings(max_examples=500, deadline=None)
@given(st.text(alphabet="@$#:()[]{}'\"+-*/%.,= abn0129_\n\\", max_size=60))
def test_any_text_is_read_or_refused(text):
    try:
        read(text)
    except (Unreadable, KeyError) as error:
        assert isinstance(error, Unreadable) or str(error).strip("'") not in VALUES
