"""Records on disk: JSON documents that say what they are, such as "lab.run/1".

A schema is a family and a version.  Reading turns a document of an older version into one of the
newest, step by step, and refuses in one line what is newer, damaged or something else.  So that
nothing is read in part, a `msgspec.Struct` of a record forbids unknown fields.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import msgspec

from lab.errors import LabError, RunError

Upgrade = Callable[[dict[str, Any]], dict[str, Any]]

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Schema(Generic[_T]):
    """One family of records in its newest version.

    :param kind: what a document of the newest version is converted to.
    :param remedy: what to do about a file of something else.
    :param upgrades: version n -> what turns a document of version n into one of n + 1.
    :param key: which key of a document names the schema.
    :param error: what is raised.
    """

    family: str
    version: int
    kind: type[_T]
    remedy: str
    upgrades: Mapping[int, Upgrade] = field(default_factory=dict)
    key: str = "schema"
    error: type[LabError] = RunError

    def __str__(self) -> str:
        return f"{self.family}/{self.version}"

    def upgraded(self, document: object, where: object) -> dict[str, Any]:
        """Return a document in the newest version.

        :param where: the file, for the error when it is of another family, newer, or too old.
        """
        stated = document.get(self.key) if isinstance(document, dict) else None
        pattern = re.escape(self.family) + r"/([1-9][0-9]*)"
        match = re.fullmatch(pattern, stated) if isinstance(stated, str) else None
        if match is None or not isinstance(document, dict):
            raise self.error(f"{where} does not say that it is a {self.family} file", self.remedy)
        version = int(match.group(1))
        if version > self.version:
            raise self.error(
                f"{where} has {self.key} {stated}, newer than {self}, the newest this lab reads",
                "update the lab",
            )
        while version < self.version:
            if version not in self.upgrades:
                raise self.error(
                    f"{where} has {self.key} {stated}, too old to become {self}",
                    "use the version of the lab that wrote it",
                )
            document = self.upgrades[version](document)
            version += 1
        return document | {self.key: str(self)}

    def decode(self, raw: bytes, where: object) -> _T:
        """Return the record that a file holds."""
        try:
            return msgspec.convert(self.upgraded(msgspec.json.decode(raw), where), self.kind)
        except msgspec.DecodeError as error:
            # ValidationError is a DecodeError; its text names the key
            raise self.error(
                f"{where} is damaged or not a {self} file: {error}", "restore it from its source"
            ) from error

    def read(self, path: Path) -> _T:
        """Return the record in a file."""
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise self.error(f"cannot read {path}: {error.strerror}", self.remedy) from error
        return self.decode(raw, path)


def encode(record: object, order: Literal["deterministic"] | None = None) -> bytes:
    """A record, or its plain JSON types, as a file for people, too.

    :param order: of the keys of dictionaries: as they are, or by name.
    """
    return msgspec.json.format(msgspec.json.encode(record, order=order), indent=1) + b"\n"
