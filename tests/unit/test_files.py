"""Files with a version: what is refused, in which words."""

from __future__ import annotations

import json
import math
from pathlib import PurePosixPath

import numpy as np
import pytest

from trl_parity.errors import ConfigError, DataError
from trl_parity.files import check_version, jsonable, read_versioned, write_atomic

GOOD = {"schema_version": 2, "name": "a", "count": 3}
KINDS = {"name": str, "count": int}


def read(path, **more):
    return read_versioned(path, (1, 2), KINDS, expected="a note", remedy="write it again", damaged=DataError, **more)


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "made" / "x.json"
    write_atomic(path, json.dumps(GOOD | {"later": 1}))
    assert read(path) == GOOD | {"later": 1}
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        ("{", DataError, r"x\.json is not valid JSON \(.*\)\. Expected a note; write it again\."),
        ("[" * 100_000, DataError, r"x\.json is not valid JSON"),
        ("[1]", DataError, r"x\.json holds a list\. Expected a mapping, a note; write it again\."),
        (GOOD | {"schema_version": 3}, ConfigError, r"schema_version 3\. Expected one of \(1, 2\): .*update this one"),
        (GOOD | {"schema_version": "2"}, ConfigError, r"'2'\. .*: read it with the trl-parity that wrote it\."),
        (GOOD | {"schema_version": True}, ConfigError, "schema_version True"),
        ({"name": "a", "count": 3}, ConfigError, "schema_version None"),
        (GOOD | {"count": True}, DataError, r"x\.json has count as bool\. Expected a note; write it again\."),
        (GOOD | {"count": "3"}, DataError, "count as str"),
        ({"schema_version": 1, "name": "a"}, DataError, "has no count"),
    ],
)  # fmt: skip
def test_what_is_none_is_refused_by_name(tmp_path, content, error, words):
    path = tmp_path / "x.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(error, match=words):
        read(path)


def test_a_file_that_is_not_there_or_too_large(tmp_path):
    path = tmp_path / "x.json"
    with pytest.raises(ConfigError, match=r"cannot read .*x\.json: No such file.*Expected a note; write it again\."):
        read(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not valid JSON"):
        read(path)
    path.write_text(json.dumps(GOOD))
    assert read(path, largest=100)["count"] == 3
    with pytest.raises(DataError, match=r"has \d+ bytes\. Expected a note"):
        read(path, largest=10)


def test_a_version_has_its_own_error_and_remedy(tmp_path):
    check_version(tmp_path, 1, (1,))
    with pytest.raises(DataError, match=r"has schema_version 2\. Expected 1: drop it\."):
        check_version(tmp_path, 2, (1,), DataError, "drop it")


def test_jsonable_is_strict_json():
    value = {
        1: (math.inf, -math.nan),
        "a": np.float64(math.inf),
        "b": np.arange(2),
        "c": {True},
        "d": PurePosixPath("d"),
    }
    found = jsonable(value)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found == {"1": ["inf", "nan"], "a": "inf", "b": [0, 1], "c": [True], "d": "d"}
