"""Sources: values for rows out of a TOML file, the environment and flags, with all problems collected.

This module knows rows, not settings: `streamd.config` has the rows, and builds its tables from the collected values.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from streamd.files import read_regular, why_unreadable
from streamd.rows import ENV_PREFIX, Kind, Refused, Row
from streamd.tomllines import KeyPath, lines_of

# A thousand upstreams of 300 B, ten times over.
FILE_BYTES_MAX: Final = 4 * 1024 * 1024

# Kubernetes puts these into every container beside a service named "streamd"; they aren't settings.
_KUBERNETES = re.compile(r"STREAMD_(SERVICE_(HOST|PORT(_\w+)?)|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)")
# STREAMD__… passes between streamd's own processes; STREAMD_CONFIG names the file.
_NOT_SETTINGS = ("STREAMD__", "STREAMD_CONFIG")


class ConfigProblem(NamedTuple):
    """A mistake in the settings: its place, the key, the value (secrets left out), and the allowed values."""

    where: str
    key: str
    value: str
    allowed: str

    def __str__(self) -> str:
        value = f" = {self.value}" if self.value else ""
        return f"{self.where}: {self.key}{value}: {self.allowed}" if self.key else f"{self.where}: {self.allowed}"


class ConfigError(Exception):
    """Settings that can't be used; `problems` has all mistakes, in the order of the sources."""

    def __init__(self, problems: Sequence[ConfigProblem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = tuple(problems)


class Sources:
    """A pass over the sources: values by attribute, the source of each, and all problems."""

    def __init__(self, rows: Sequence[Row], tables: Sequence[str], environ: Mapping[str, str]) -> None:
        self.environ = environ
        self.values: dict[str, Any] = {}
        self.problems: list[ConfigProblem] = []
        self._where: dict[str, str] = {}  # attribute -> the source that won
        self._rows: dict[KeyPath, Row] = {tuple(row.key.split(".")): row for row in rows}
        self._by_old_key: dict[KeyPath, Row] = {(row.old_key,): row for row in rows if row.old_key}
        self._tables = tables  # the keys of arrays of tables, which the caller takes
        self._lines: dict[KeyPath, int] = {}
        self._file = ""
        self._folder = Path()

    def refuse(self, where: str, key: str, value: object, allowed: str) -> None:
        """Note a problem; `value` None shows none."""
        self.problems.append(ConfigProblem(where, key, shown(key, value), allowed))

    def where(self, attribute: str) -> str:
        """The source of an attribute's value."""
        return self._where.get(attribute, "default")

    def at(self, *path: str | int) -> str:
        """The place of a key of the file, as `file:line`."""
        return f"{self._file}:{self._lines.get(path, 1)}"

    def keep(self, attribute: str, value: object, where: str) -> None:
        """Take a value; it replaces that of any source before."""
        self.values[attribute] = value
        self._where[attribute] = where

    def take(self, row: Row, raw: object, where: str) -> None:
        """Parse a source's value for a row and keep it, or note a problem."""
        self.take_into(self.values, row, raw, where, row.key)
        self._where[row.attribute] = where

    def take_into(self, values: dict[str, Any], row: Row, raw: object, where: str, name: str) -> None:
        """Parse a value into `values`, or note a problem under `name`."""
        try:
            value = row.parse(raw)
            if row.kind is Kind.PATH and value:
                value = self._located(row, str(value), where)
        except Refused as refused:
            self.refuse(where, name, None if row.kind is Kind.TABLE else raw, f"must be {refused}")
        else:
            values[row.attribute] = value

    def _located(self, row: Row, path: str, where: str) -> str:
        """A path made absolute: `credential:NAME` is systemd's, other paths in a file start beside that file."""
        folder = self._folder if self._file and where.startswith(f"{self._file}:") else Path.cwd()
        if path.startswith("credential:"):
            path = path.removeprefix("credential:")
            credentials = self.environ.get("CREDENTIALS_DIRECTORY", "")
            if not credentials or "/" in path or path in ("", ".", ".."):
                raise Refused("the name of a credential that the systemd unit loads with LoadCredential=NAME:…")
            folder = Path(credentials)
        found = folder / path
        if row.exists and (why := why_unreadable(found)):
            raise Refused(f"a file that streamd can read; {why}")
        return str(found)

    # file

    def read(self, file: Path) -> Mapping[str, Any]:
        """Take a TOML file's values; return its arrays of tables, unread, for the caller."""
        self._file, self._folder = str(file), file.absolute().parent
        text = ""
        try:
            content = read_regular(file, FILE_BYTES_MAX)
            if len(content) > FILE_BYTES_MAX:
                self.refuse(self._file, "", None, f"must not be larger than {FILE_BYTES_MAX} bytes")
                return {}
            text = content.decode("utf-8-sig")  # editors on Windows put a byte order mark in front
            document = tomllib.loads(text)
        except OSError as error:
            self.refuse(self._file, "", None, error.strerror or "cannot be read")
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            self.refuse(f"{self._file}:{line}", "", None, "must be UTF-8")
        except tomllib.TOMLDecodeError as error:
            place = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)", str(error))
            line = int(place[1]) if place and place[1] else text.count("\n") + 1
            self.refuse(f"{self._file}:{line}", "", None, f"not TOML: {str(error).partition(' (at ')[0]}")
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, or brackets without end
            self.refuse(self._file, "", None, f"not TOML that can be read: {str(error).partition(';')[0]}")
        else:
            self._lines = lines_of(text)
            for path, raw in self._leaves(document):
                self._take_from_file(path, raw)
            return {key: document[key] for key in self._tables if key in document}
        return {}

    def _leaves(self, document: Mapping[str, Any]) -> Iterator[tuple[KeyPath, object]]:
        sections = {path[0] for path in self._rows if len(path) > 1}
        for key, raw in document.items():
            if key in sections and isinstance(raw, dict):
                for inner, value in raw.items():
                    yield (key, inner), value
            elif key not in self._tables:
                yield (key,), raw

    def _take_from_file(self, path: KeyPath, raw: object) -> None:
        if (row := self._rows.get(path)) is not None:
            self.take(row, raw, self.at(*path))
        elif (row := self._by_old_key.get(path)) is not None:
            self._take_old(row, raw, self.at(*path), row.old_key)
        else:
            self._unknown(path, raw, [".".join(map(str, known)) for known in self._rows] + list(self._tables))

    def _take_old(self, row: Row, raw: object, where: str, name: str) -> None:
        """Take a value under an earlier name of its row, unless the same source has the row under its present name."""
        of_file = (row.key,) in self._lines and where.startswith(f"{self._file}:")
        if of_file or (row.variable in self.environ and where.startswith("environment ")):
            self.refuse(where, name, raw, f"is an earlier name of {row.key}, which is set beside it")
        else:
            self.take(row, raw, where)

    def _unknown(self, path: KeyPath, raw: object, known: Sequence[str]) -> None:
        name = str(path[-1])
        if len(path) > 1 and (name,) in self._rows:
            hint = f"{name} belongs at the top of the file, above the first [table]"
        else:
            hint = did_you_mean(name, known)
        key = ".".join(part for part in path if isinstance(part, str))  # the line says which of several tables
        self.refuse(self.at(*path), key, raw, f"unknown key; {hint}")

    def tables(self, key: str, raw: object, rows: Sequence[Row]) -> Iterator[tuple[int, dict[str, Any]]]:
        """The values of each table of an array, with its index; a table with a problem in it is left out."""
        if not isinstance(raw, list) or not all(isinstance(table, dict) for table in raw):
            self.refuse(self.at(key), key, raw, f"must be tables: [[{key}]]")
            return
        by_key = {row.key: row for row in rows}
        for index, table in enumerate(raw):
            values: dict[str, Any] = {}
            problems = len(self.problems)
            for inner, value in table.items():
                if inner in by_key:
                    self.take_into(values, by_key[inner], value, self.at(key, index, inner), f"{key}.{inner}")
                else:
                    self._unknown((key, index, inner), value, list(by_key))
            if len(self.problems) == problems:
                yield index, values

    # environment and flags

    def read_environment(self, others: Sequence[str]) -> None:
        """Take STREAMD_… variables; a variable that is neither a row's nor in `others` is a problem."""
        by_variable = {row.variable: row for row in self._rows.values()}
        by_old_variable = {row.old_variable: row for row in self._by_old_key.values()}
        for variable in sorted(name for name in self.environ if name.startswith(ENV_PREFIX)):
            raw = self.environ[variable]
            if variable in by_variable:
                row = by_variable[variable]
                self.take(row, split_list(raw) if row.kind is Kind.LIST else raw, f"environment {variable}")
            elif variable in by_old_variable:
                self._take_old(by_old_variable[variable], raw, f"environment {variable}", "")
            elif (
                variable not in others
                and not variable.startswith(_NOT_SETTINGS)
                and not _KUBERNETES.fullmatch(variable)
            ):
                known = [*by_variable, *others]
                self.refuse(f"environment {variable}", "", None, f"unknown setting; {did_you_mean(variable, known)}")

    def read_flags(self, flags: Mapping[str, object], others: Sequence[str]) -> None:
        """Take flags by the rows' `dest`; None is "not given". An unknown flag is the caller's mistake: KeyError."""
        by_dest = {row.dest: row for row in self._rows.values()}
        for dest, raw in flags.items():
            if dest not in others and raw is not None:
                self.take(by_dest[dest], raw, f"flag {by_dest[dest].flag}")


def split_list(text: str) -> list[str]:
    """The entries of a variable's list, which commas or blanks separate."""
    return [entry for entry in re.split(r"[,\s]+", text) if entry]


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """A hint: the nearest of the known names as a question, or the command that lists them all."""
    bare = name.removesuffix("_s").removesuffix("_bytes").replace("-", "_")
    near = [bare] if bare in known else difflib.get_close_matches(name, known, 1, 0.6)
    return f"did you mean {near[0]}?" if near else "`streamd config-reference` lists all"


def shown(key: str, value: object) -> str:
    """A value for a problem's line: short, on one line, and hidden where it might be a secret."""
    if value is None or value == "":
        return "" if value is None else '""'
    if re.search(r"key$|secret$|token$|password|authorization|header", key, re.I):
        return "(not shown)"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(list(value)) if isinstance(value, tuple) else repr(value)
    text = re.sub(r"//[^/@\s]*@", "//(not shown)@", text)
    return text if len(text) <= 120 else text[:117] + "…"
