"""The grammar of normalizer names: every legal pair, canonical printing, and messages that help."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchless.nn import PRESETS, Normalizer, parse_normalizer

ACTS = ("bn", "frozen-bn", "sync-bn", "gn", "ln", "in", "bcn", "bcn-micro", "none")
WEIGHTS = (None, "ws", "sws", "wn", "cwn")

whole = st.integers(1, 10**6)
positive = st.floats(min_value=1e-300, max_value=1e300, allow_subnormal=False)
boolean = st.sampled_from(["true", "false", "True", "FALSE"])
preset = st.sampled_from(list(PRESETS))
SETTINGS: dict[str, dict[str, st.SearchStrategy[object]]] = {
    "gn": {"groups": whole},
    "bcn": {"groups": whole, "eps": positive},
    "bcn-micro": {
        "groups": whole,
        "memory": st.floats(1, 1e9) | whole | st.just("inf"),
        "update": st.sampled_from(["step", "forward"]),
        "warmup": boolean,
    },
    "ws": {"preset": preset, "eps": positive},
    "sws": {
        "gain": boolean,
        "gamma": positive | st.sampled_from(["activation", "constant"]),
        "preset": preset,
        "eps": positive,
    },
}
blank = st.sampled_from(["", " ", "  "])


@st.composite
def parts(draw: st.DrawFn, names: tuple[str, ...]) -> str:
    """A part with any of its settings in any order, with blanks anywhere between tokens."""
    name = draw(st.sampled_from(names))
    possible = SETTINGS.get(name, {})
    chosen = draw(st.permutations(sorted(possible)))[: draw(st.integers(0, len(possible)))]
    items = [f"{draw(blank)}{key}{draw(blank)}={draw(blank)}{draw(possible[key])}{draw(blank)}" for key in chosen]
    parentheses = bool(items) or draw(st.booleans())
    return name + (f"{draw(blank)}({','.join(items)})" if parentheses else "")


@st.composite
def names(draw: st.DrawFn) -> str:
    name = draw(blank) + draw(parts(ACTS)) + draw(blank)
    if draw(st.booleans()):
        name += "+" + draw(blank) + draw(parts(WEIGHTS[1:])) + draw(blank)
    return name


@given(names())
@settings(max_examples=200)
def test_printing_what_was_parsed_is_canonical(name):
    parsed = parse_normalizer(name)
    printed = str(parsed)
    assert parse_normalizer(printed) == parsed
    assert str(parse_normalizer(printed)) == printed
    assert " " not in printed


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_every_pair_is_legal_and_its_own_canonical_name(act, weight):
    name = act if weight is None else f"{act}+{weight}"
    parsed = parse_normalizer(name)
    assert str(parsed) == name
    assert parsed.act.name == act
    assert (parsed.weight and parsed.weight.name) == weight


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("gn(groups=16)+ws(preset=authors)", "gn(groups=16)+ws(preset=authors)"),
        (" gn ( groups = 32 ) + ws ( ) ", "gn+ws"),
        ("bcn-micro(warmup=TRUE, memory=200)", "bcn-micro"),
        ("bcn-micro(update=forward,memory=5e2,groups=8)", "bcn-micro(groups=8,memory=500,update=forward)"),
        ("bcn(eps=0.00001)+wn", "bcn+wn"),
        ("none+sws(gamma=constant,gain=true)", "none+sws(gain=true,gamma=constant)"),
        ("none+sws(gamma=1.5)", "none+sws(gamma=1.5)"),
        ("none+sws(gamma=activation)", "none+sws"),
    ],
)
def test_canonical_names(name, canonical):
    assert str(parse_normalizer(name)) == canonical


@pytest.mark.parametrize("name", ["ws", "sws+gn", "ws(preset=authors)"])
def test_a_weight_reparameterization_alone_is_no_normalizer(name):
    with pytest.raises(ValueError, match="unknown normalization"):
        parse_normalizer(name)


def test_defaults_are_the_definitions():
    micro = parse_normalizer("bcn-micro+ws")
    assert (micro.act.groups, micro.act.memory, micro.act.update, micro.act.warmup) == (32, 200, "step", True)
    assert micro.weight.preset == "timm"
    scaled = parse_normalizer("none+sws").weight
    assert (scaled.gain, scaled.gamma) == (False, "activation")


def test_a_parsed_name_is_returned_as_it_is():
    parsed = parse_normalizer("gn+ws")
    assert parse_normalizer(parsed) is parsed
    assert isinstance(parsed, Normalizer)


def test_names_are_values():
    assert parse_normalizer("gn(groups=32)+ws") == parse_normalizer("gn+ws")
    assert len({parse_normalizer(name) for name in ("gn", "gn(groups=32)", "gn(groups=16)")}) == 2


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("bcnn", "bcn"),
        ("bcn_micro+ws", "bcn-micro"),
        ("frozen_bn", "frozen-bn"),
        ("batchnorm-sync-bn", "sync-bn"),
        ("gn+wss", "ws"),
        ("none+scws", "sws"),
        ("gn(group=4)", "groups"),
        ("bcn-micro(memmory=4)", "memory"),
        ("gn+ws(presets=timm)", "preset"),
    ],
)
def test_a_wrong_name_has_its_nearest_match(name, nearest):
    with pytest.raises(ValueError, match=f"did you mean '{nearest}'"):
        parse_normalizer(name)


def test_a_wrong_name_lists_what_is_possible():
    with pytest.raises(ValueError, match="'xyz'") as error:
        parse_normalizer("xyz+ws")
    assert all(name in str(error.value) for name in (*ACTS, *WEIGHTS[1:]))
    with pytest.raises(ValueError, match="'xyz'") as error:
        parse_normalizer("gn+xyz")
    assert all(name in str(error.value) for name in WEIGHTS[1:])
    with pytest.raises(ValueError, match="'xyz=1'") as error:
        parse_normalizer("bcn-micro(xyz=1)")
    assert all(name in str(error.value) for name in ("groups", "memory", "update", "warmup"))
    with pytest.raises(ValueError, match="'xyz'") as error:
        parse_normalizer("gn+ws(preset=xyz)")
    assert all(name in str(error.value) for name in PRESETS)


@pytest.mark.parametrize(
    "name",
    [
        "gn(groups=4,groups=8)",
        "gn(groups=4,groups=4)",
        "bcn-micro(memory=1,update=step,memory=2)",
        "gn+ws(eps=1,eps=1)",
    ],
)
def test_a_setting_given_twice_is_refused(name):
    with pytest.raises(ValueError, match="given twice"):
        parse_normalizer(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gn(groups=0)", "1 or more, got 0"),
        ("gn(groups=-4)", "1 or more, got -4"),
        ("gn(groups=4.5)", "'4.5': expected a whole number"),
        ("gn(groups=)", "expected a whole number"),
        ("gn(groups)", "no setting 'groups'"),
        ("bcn(groups=0)", "1 or more"),
        ("bcn(eps=0)", "above 0"),
        ("bcn(eps=nan)", "above 0"),
        ("bcn-micro(memory=0.5)", "1 or more, got 0.5"),
        ("bcn-micro(memory=nan)", "1 or more"),
        ("bcn-micro(update=steps)", "'step' or 'forward'"),
        ("bcn-micro(warmup=1)", "true or false"),
        ("gn+ws(eps=-1e-6)", "above 0"),
        ("gn+ws(eps=nan)", "above 0"),
        ("gn+ws(eps=small)", "'small': expected a number"),
        ("none+sws(gamma=0)", "positive"),
        ("none+sws(gamma=inf)", "positive"),
        ("none+sws(gamma=relu)", "'activation' or 'constant' or a number"),
        ("bn(groups=4)", "it takes no settings"),
        ("gn+wn(eps=1)", "it takes no settings"),
    ],
)
def test_wrong_values_are_refused_with_what_is_possible(name, message):
    with pytest.raises(ValueError, match=message):
        parse_normalizer(name)


@pytest.mark.parametrize(
    "name", ["", " ", "+", "gn+", "+ws", "gn+ws+wn", "gn((groups=4))", "gn(groups=4", "gn groups=4", "gn ws"]
)
def test_unreadable_names_show_the_grammar(name):
    with pytest.raises(ValueError, match="expected one of bn, frozen-bn"):
        parse_normalizer(name)


@given(st.text() | st.text(alphabet="bcngwsmiro-+(),= 0123456789.e") | st.builds("gn(groups={})".format, st.text()))
@settings(max_examples=300)
def test_garbage_never_raises_anything_but_value_error(text):
    message = refusal(text)
    if message is None:
        parsed = parse_normalizer(text)
        assert parse_normalizer(str(parsed)) == parsed
    else:
        assert message
        assert "\n" not in message


def refusal(text: str) -> str | None:
    """The message of the ValueError, None if the name is read; any other exception passes."""
    try:
        parse_normalizer(text)
    except ValueError as error:
        return str(error)
    return None


@given(st.floats())
def test_every_number_of_a_memory_is_read_back_or_refused(memory):
    name = f"bcn-micro(memory={memory!r})"
    if memory >= 1:
        assert parse_normalizer(name).act.memory == memory
        assert parse_normalizer(str(parse_normalizer(name))).act.memory == memory
    else:
        assert not memory >= 1 or math.isnan(memory)
        with pytest.raises(ValueError, match="1 or more"):
            parse_normalizer(name)
