"""The parameters cell, and values brought to the types that it declares."""

import json
import math
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saftnb.batch.parameters import Kind, ParameterError, coerce, declared_parameters

finite = st.floats(allow_nan=False, allow_infinity=False)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | finite | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


def declared(source: str) -> dict:
    cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": source}
    text = {"cell_type": "markdown", "metadata": {}, "source": "x = 1"}
    return declared_parameters({"cells": [text, cell]})


@pytest.mark.parametrize(
    ("line", "kind", "default"),
    [
        ("x: int = 3  # steps, a = b", "int", 3),
        ("x: float = 1", "float", 1.0),
        ("x: float = -1e-3", "float", -0.001),
        ("x: str = 'a = b'", "str", "a = b"),
        ("x: bool = True", "bool", True),
        ("x: list[str] = ['a']", "list[str]", ["a"]),
        ("x: List[float] = [1, 2.5]", "list[float]", [1.0, 2.5]),
        ("x: list[int] | None = None", "list[int] | None", None),
        ("x: Optional[int] = None", "int | None", None),
        ("x: typing.Optional[float] = 1", "float | None", 1.0),
        ("x: Union[None, str] = 'a'", "str | None", "a"),
        ("x: 'int | None' = 2", "int | None", 2),
        ("x: dict = {'a': [1]}", "dict", {"a": [1]}),
        ("x: dict[str, float] = {}", "dict", {}),
        ("x = 3", "int", 3),
        ("x = 0.5", "float", 0.5),
        ("x = False", "bool", False),
        ("x = None", "any", None),
        ("x = [0.5, 1]", "list[float]", [0.5, 1.0]),
        ("x: list = [1]", "list[int]", [1]),
        ("x = [1, 'a']", "list", [1, "a"]),
    ],
)
def test_forms_of_a_declaration(line: str, kind: str, default: object) -> None:
    parameter = declared(f"'''Settings'''\nfrom typing import Optional\n{line}\n")["x"]
    assert (str(parameter.kind), parameter.default) == (kind, default)
    assert type(parameter.default) is type(default)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a = 1\nx = 2 * 3", "line 2 .*the default of x is not a literal"),
        ("x: Path = 'a'", "line 1 .*type Path is not one of int, float"),
        ("x: int | str = 1", "union other than with None"),
        ("x: int = 'a'", "line 1 .*x: 'a' is not of type int"),
        ("x: int", "not of the form"),
        ("x = y = 1", "not of the form"),
        ("x, y = 1, 2", "not of the form"),
        ("print(1)", "not of the form"),
        ("for x in []: pass", "not of the form"),
        ("x += 1", "x"),
        ("x = (1, 2)", "type tuple is not one of"),
        ("%matplotlib inline", "line 1 of the parameters cell: invalid syntax"),
    ],
)
def test_a_cell_that_cannot_be_read_says_where(source: str, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        declared(source)


def test_no_cell_declares_nothing_and_two_are_an_error() -> None:
    assert declared_parameters({"cells": [{"cell_type": "code", "metadata": {}, "source": "x = 1"}]}) == {}
    cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": ["x = 1\n", "y = 2"]}
    assert list(declared_parameters({"cells": [cell]})) == ["x", "y"]
    with pytest.raises(ParameterError, match="more than one"):
        declared_parameters({"cells": [cell, cell]})


def accepts(value: object, kind: Kind) -> bool:
    try:
        coerce(value, kind)
    except ParameterError:
        return False
    return True


@given(st.integers())
def test_whole_numbers(value: int) -> None:
    assert coerce(value, Kind("int")) == coerce(str(value), Kind("int")) == value
    assert type(coerce(str(value), Kind("int"))) is int
    assert not accepts(value, Kind("str"))
    assert not accepts(value, Kind("bool"))


@given(finite)
def test_floats_survive_every_spelling(value: float) -> None:
    for spelling in (value, repr(value), f"{value:e}" if float(f"{value:e}") == value else value):
        result = coerce(spelling, Kind("float"))
        assert type(result) is float
        assert result == value
    assert not accepts(value, Kind("int"))
    assert not accepts(value, Kind("str"))


@given(st.integers(-(2**53), 2**53))
def test_a_whole_number_is_a_float_where_one_is_declared(value: int) -> None:
    assert coerce(value, Kind("float")) == value
    assert type(coerce(value, Kind("float"))) is float


@given(st.text(alphabet=string.digits + "+-.eE_ xinfa", max_size=6))
def test_text_is_a_number_only_if_python_and_people_agree(text: str) -> None:
    if accepts(text, Kind("float")):
        assert math.isfinite(float(text))
        assert not set(text) & set("_ xinfa")
    if accepts(text, Kind("int")):
        assert str(int(text)) == text.lstrip("+") or text in ("-0",)


@given(st.booleans())
def test_a_bool_is_only_a_bool(value: bool) -> None:
    assert coerce(value, Kind("bool")) is value
    assert not any(accepts(value, Kind(base)) for base in ("int", "float", "str"))


@pytest.mark.parametrize("value", ["true", "yes", 0, 1, "", 1.0])
def test_nothing_else_is_a_bool(value: object) -> None:
    with pytest.raises(ParameterError, match="true or false"):
        coerce(value, Kind("bool"))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "nan", ".inf", "1e999", 10**400])
@pytest.mark.parametrize("kind", [Kind("float"), Kind("float", optional=True)])
def test_floats_are_finite(value: object, kind: Kind) -> None:
    assert not accepts(value, kind)


def test_text_from_yaml_becomes_the_declared_number() -> None:
    assert coerce("1e-3", Kind("float")) == 0.001
    assert coerce("1e3", Kind("float")) == 1000.0
    assert coerce(["1e-3", 1], Kind("list", "float")) == [0.001, 1.0]
    assert not accepts("1e3", Kind("int"))
    assert not accepts("012", Kind("int"))
    with pytest.raises(ParameterError, match="put it in quotes"):
        coerce(5, Kind("str"))


@given(plain)
def test_null_is_for_optional_and_untyped_parameters_only(value: object) -> None:
    assert coerce(value, Kind("any")) == value
    for base in ("int", "float", "str", "bool", "list", "dict"):
        assert coerce(None, Kind(base, optional=True)) is None
        assert not accepts(None, Kind(base))


@given(plain, st.sampled_from(["int", "float", "str", "bool", "list", "dict", "any"]))
def test_coercing_twice_changes_nothing(value: object, base: str) -> None:
    if accepts(value, Kind(base)):
        once = coerce(value, Kind(base))
        assert coerce(once, Kind(base)) == once
        assert base == "any" or type(once).__name__ == base


@given(plain)
def test_papermill_writes_what_we_hash(value: object) -> None:
    """The kernel executes papermill's text of the parameters; it has to mean the same values."""
    from papermill.translators import PythonTranslator

    scope: dict = {}
    exec(PythonTranslator.codify({"x": value}), scope)
    assert scope["x"] == value


def test_text_is_what_json_gives_back():
    halves = "\ud83d\ude00"  # as YAML reads an escaped emoji
    assert coerce(halves, Kind("str")) == coerce([halves], Kind("list"))[0] == json.loads(json.dumps(halves))
    with pytest.raises(ParameterError, match="half a character"):
        coerce("\ud83d", Kind("str"))
