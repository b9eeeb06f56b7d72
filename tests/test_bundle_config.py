"""Config files, settings and references; MONAI's ConfigParser is the oracle where both read a value."""

import json

import pytest
from monai.bundle import ConfigParser
from pydantic import Field

from volcast.export.bundle_config import Config, read_data, shown, validated
from volcast.export.bundle_expression import Component, Unreadable
from volcast.runtime.frozen import Frozen

DATA = {
    "root": "/b",
    "sizes": ["@n", {"deep": [4, "$@n // 2"]}],
    "n": 8,
    "path": "$@root + '/x'",
    "nested": "@sizes::1::deep#1",
    "sum": "$@sizes#0 + @sizes::1::deep::0",
    "group": {"a": 3, "b": "@#a", "c": {"d": "@##a"}, "list": ["@##n_is_not_here", 5]},
    "alias": "@net",
    "net": {
        "_target_": "Net",
        "channels": ["@n", 2],
        "name": "@path",
        "_requires_": "@gone",
        "_disabled_": False,
    },
    "mail": "a@b",
    "loop": "@pool",
    "pool": ["@loop"],
    "macro": "%root",
}


def config(**settings):
    return Config(DATA, settings, frozenset({"scale_factor"}))


def test_values_as_monai_reads_them():
    data = {key: value for key, value in DATA.items() if key not in {"net", "alias", "loop", "pool", "macro"}}
    del data["group"]["list"]
    parser = ConfigParser(data)
    for id in ("sizes", "path", "nested", "sum", "group", "sizes::1::deep", "group#c#d", "mail"):
        assert config().get(id) == parser.get_parsed_content(id), id
    DATA["group"]["list"] = ["@##n_is_not_here", 5]


def test_components_stay_closed_and_their_arguments_are_read():
    assert config().get("net") == config().get("alias") == Component("net")
    assert config().arguments("net") == {"channels": [8, 2], "name": "/b/x"}
    assert config().targets() == {"net": "Net"}


@pytest.mark.parametrize("id", ["loop", "macro", "group#list", "nothing", "sizes#7", "sizes#1#deep#x", "n#0"])
def test_what_cannot_be_read(id):
    with pytest.raises(Unreadable):
        config().get(id)
    with pytest.raises(ValueError, match=rf"^\[bundle\] {id}.*; give its value with --set {id}=\.\.\.$"):
        config().need(id)


def test_settings_replace_by_id_and_refuse_misspelt_keys():
    changed = config(**{"sizes#1#deep": [1, 2], "net::channels#0": 64, "n": 16, "scale_factor": 2.0})
    assert changed.get("sizes") == [16, {"deep": [1, 2]}]
    assert changed.get("net::channels") == [64, 2] and changed.get("scale_factor") == 2.0
    assert DATA["net"]["channels"] == ["@n", 2]
    for id in ("scale_facto", "gone#a", "sizes#9", "n#a"):
        with pytest.raises(ValueError, match=rf"--set {id}: "):
            config(**{id: 1})


def test_references_that_grow_without_end_stay_cheap():
    data = {f"k{i}": [f"@k{i + 1}"] * 100 for i in range(40)} | {"k40": 0}
    value = Config(data, {}, frozenset()).get("k0")
    assert len(value) == 100 and len(shown(value)) <= 100
    chain = Config({f"k{i}": f"@k{i + 1}" for i in range(90)} | {"k90": 0}, {}, frozenset())
    with pytest.raises(Unreadable, match="references in a chain"):
        chain.get("k0")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", "{"),
        ("a.json", "[1]"),
        ("a.json", "[" * 100_000),
        ("a.json", '{"a": %s}' % ("1" * 5000)),
        ("a.json", '{"a\\n": 1}'),
        ("a.yaml", "a: !!python/object/apply:os.system ['touch canary']"),
        ("a.yaml", "a: !!bool x"),
        ("a.yaml", "a: !!int ''"),
        ("a.yaml", "a: !!timestamp x"),
        ("a.yaml", "1: 2"),
        ("a.yaml", "a: &x [*x]"),
        (
            "a.yaml",
            "a: &a [1,1]\n"
            + "".join(f"b{i}: &{chr(98 + i)} [*{chr(97 + i)},*{chr(97 + i)}]\n" for i in range(20)),
        ),
        ("a.yaml", "{: "),
        ("a.yaml", ""),
        ("a.json", " " * (2**20 + 1)),
    ],
)
def test_files_that_are_no_configs(tmp_path, monkeypatch, name, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=name) as caught:
        read_data(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "canary").exists()


def test_read_data_gives_the_digest_of_the_bytes(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"a": 1}))
    # sha256sum of the eight bytes {"a": 1}
    assert read_data(tmp_path / "a.json") == (
        {"a": 1},
        "f9d86028c6e0d64e225186f96acb69338b2c59764df79162107f5c4bb34d1310",
    )
    with pytest.raises(ValueError, match="No such file"):
        read_data(tmp_path / "b.json")


def test_validated_says_one_line():
    class Model(Frozen):
        a: int = Field(ge=1)

    with pytest.raises(
        ValueError, match=r"^\[bundle\] here: a=0: Input should be greater than or equal to 1$"
    ):
        validated(Model, {"a": 0}, "here")
    with pytest.raises(ValueError, match=r"^\[bundle\] here: a: Field required$"):
        validated(Model, {}, "here")
