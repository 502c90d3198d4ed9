"""Reading profile files: one plain YAML mapping each, checked against a schema, with every fault told in one line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from hwmodels.errors import ProfileError

PROFILES = Path(__file__).resolve().parents[1] / "profiles"

T = TypeVar("T")


class _PlainLoader(yaml.SafeLoader):
    """YAML without tags, anchors, aliases, merge keys and repeated keys: what is written is what is meant."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise ValueError(f"line {line}: anchors and aliases are not allowed; write the value out")
        if getattr(event, "tag", None) is not None:
            raise ValueError(f"line {line}: the tag {event.tag!r} is not allowed; write a plain value")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str" or key.value in seen:
                shown = getattr(key, "value", "?")
                raise ValueError(f"line {key.start_mark.line + 1}: key {shown!r}: expected a word not used before")
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


class _PlainDumper(yaml.SafeDumper):
    """Quotes what _PlainLoader would not read as text."""


# YAML 1.2 floats: 1e9 and 2.5e6 are numbers too, which PyYAML's 1.1 rules read as text.
for _side in (_PlainLoader, _PlainDumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def dumped(content: Any) -> str:
    """The content as YAML that `plain` reads back, keys in their order.

    >>> dumped({"name": "1e9", "size": 2})
    "name: '1e9'\\nsize: 2\\n"
    """
    return str(yaml.dump(content, Dumper=_PlainDumper, sort_keys=False, allow_unicode=True, width=118))


def plain(text: str) -> Any:
    """What a YAML text says; ValueError for one that is broken or uses tags, anchors or repeated keys."""
    try:
        return yaml.load(text, Loader=_PlainLoader)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def shortened(text: str, most: int = 300) -> str:
    """The text in one line of at most `most` characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 3] + "..."


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in the YAML file at `path`.

    Raises ProfileError if it cannot be read, is not one mapping, or uses tags, anchors or repeated keys.
    """
    try:
        text = path.read_text(encoding="utf-8")
        data = plain(text)
    except OSError as error:
        raise ProfileError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None
    except UnicodeDecodeError:
        raise ProfileError(f"{path}: is not UTF-8 text; expected a YAML mapping") from None
    except ValueError as error:
        raise ProfileError(f"{path}: {shortened(str(error))}; expected a plain YAML mapping") from None
    if not isinstance(data, dict):
        raise ProfileError(f"{path}: is a {type(data).__name__}; expected a YAML mapping (key: value lines)")
    return data


def validated(schema: type[T], data: dict[str, Any], path: Path) -> T:
    """`data` as a `schema` (a pydantic model or dataclass); ProfileError names `path` and the first wrong value."""
    try:
        return TypeAdapter(schema).validate_python(data)
    except ValidationError as error:
        first, *others = error.errors()
        where = ".".join(str(part) for part in first["loc"]) or "file"
        more = f" (and {len(others)} more)" if others else ""
        if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            raise ProfileError(f"{path}: unknown key {where}; remove it or correct its spelling{more}") from None
        if first["type"] in ("missing", "missing_argument"):
            raise ProfileError(f"{path}: {where} is missing; add it{more}") from None
        given = " ".join(repr(first["input"]).split())
        given = given if len(given) <= 60 else given[:57] + "..."
        message = first["msg"].removeprefix("Value error, ")
        raise ProfileError(f"{path}: {where} = {given}: {message}{more}") from None


def read_as(schema: type[T], path: Path) -> T:
    """The file at `path` as a `schema`; raises ProfileError as read_mapping and validated do."""
    return validated(schema, read_mapping(path), path)


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ProfileError:
    """The error for a name nobody knows, with the nearest known ones."""
    near = ", ".join(nearest(name, known))
    return ProfileError(f"unknown {kind} {name!r}; nearest: {near} (or give the path of a YAML file)")


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """The known names most like this one, the likest first: three, or where none is alike, five.

    >>> nearest("lamma", ["llama", "phi", "yi"])
    ['llama']
    """
    names = sorted(known)
    alike = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.4)
    return alike or difflib.get_close_matches(name.lower(), names, n=5, cutoff=0.0)


def is_path(name: str) -> bool:
    """Whether `name` is meant as a file rather than as the name of a shipped profile."""
    return name.endswith((".yaml", ".yml")) or "/" in name or "\\" in name


def named(kind: str, name: str, folder: Path) -> Path:
    """The file of the `kind` called `name`: a profile shipped in `folder`, or `name` itself if it looks like a path.

    Raises ProfileError for a name that is not shipped, offering the nearest ones.
    """
    if is_path(name):
        return Path(name)
    known = {path.stem: path for path in folder.glob("*.yaml")}
    if name not in known:
        raise unknown_name(kind, name, known)
    return known[name]
