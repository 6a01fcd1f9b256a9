"""A record on disk is read whole, upgraded step by step, or refused in one line."""

from pathlib import Path
from typing import Literal

import msgspec
import pytest

from lab.errors import LabError, RestoreError, RunError
from lab.records import Schema, encode


class Note(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    schema: str
    text: str
    colour: str = "blue"


NOTES = Schema(
    family="lab.note",
    version=3,
    kind=Note,
    remedy="name a note",
    upgrades={2: lambda document: {"text": document["words"]}},
)


@pytest.mark.parametrize("order", [None, "deterministic"])
def test_what_is_written_is_read_again(
    tmp_path: Path, order: Literal["deterministic"] | None
) -> None:
    note = Note(schema=str(NOTES), text="a", colour="red")
    (tmp_path / "note.json").write_bytes(encode(note, order=order))
    assert NOTES.read(tmp_path / "note.json") == note


def test_an_older_record_becomes_one_of_the_newest_version() -> None:
    raw = b'{"schema": "lab.note/2", "words": "a"}'
    assert NOTES.decode(raw, "it") == Note(schema="lab.note/3", text="a")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"schema": "lab.note/4", "text": "a"}', "it has schema lab.note/4, newer than"),
        (b'{"schema": "lab.note/1", "text": "a"}', "too old to become lab.note/3"),
        (b'{"schema": "lab.notes/3", "text": "a"}', "does not say that it is a lab.note"),
        (b'{"schema": 3, "text": "a"}', "does not say that it is a lab.note"),
        (b'{"text": "a"}', "does not say that it is a lab.note file; name a note"),
        (b"[]", "does not say that it is a lab.note"),
        (b"{", "it is damaged or not a lab.note/3 file"),
        (b'{"schema": "lab.note/3", "text": 1}', r"damaged.*got `int` - at `\$.text`"),
        (b'{"schema": "lab.note/3", "text": "a", "size": 1}', "unknown field `size`"),
    ],
)
def test_anything_else_is_refused_in_one_line(raw: bytes, message: str) -> None:
    with pytest.raises(RunError, match=message) as caught:
        NOTES.decode(raw, "it")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [RunError, RestoreError])
def test_a_file_that_is_not_there_is_refused_by_name(tmp_path: Path, error: type[LabError]) -> None:
    schema = Schema(family="lab.note", version=1, kind=Note, remedy="name a note", error=error)
    with pytest.raises(error, match=r"cannot read .*note\.json: No such file.*; name a note"):
        schema.read(tmp_path / "note.json")
