"""Read, compose, override and explain configuration.

A configuration is YAML checked by pydantic models. A mapping may open with `base: other.yaml` (relative to
the file it stands in): the base is read first and the mapping is merged over it. Dotted overrides from the
command line (`stages.decoder.train.optim.lr=1e-3`) are merged last. Where a block carries a `kind`, changing the
kind replaces the whole block, because the fields of one kind mean nothing to another.
"""

from __future__ import annotations

import difflib
import json
import os
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, ValidationError, model_validator


class _Where:
    """Marks a setting that says where something is."""


WHERE = _Where()
Location = Annotated[str, WHERE]
"""A path or URI of something outside the pipeline.

A relative path is taken from the folder of the file that it is written in (of an override: the working folder), `~` is
the home folder. A configuration that genpipe ships is taken to lie in the working folder. It is left out of the
fingerprint, where a digest must stand for what lies there.
"""


SHIPPED = Path(__file__).parent / "configs"
"""The configurations that the package holds."""


class Config(BaseModel):
    """Base of every configuration block: immutable, and strict about unknown keys and about numbers that are none."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _keep_defaults(cls, values: Any) -> Any:
        """A block that is given in part keeps the rest of its default, unless it names another `kind`."""
        if not isinstance(values, Mapping):
            return values
        completed = dict(values)
        for name, info in cls.model_fields.items():
            default, given = info.default, values.get(name)
            if isinstance(default, Config) and isinstance(given, Mapping):
                kind = getattr(default, "kind", None)
                if given.get("kind", kind) == kind:
                    completed[name] = {**{key: getattr(default, key) for key in default.model_fields_set}, **given}
        return completed


def by_kind(default: str) -> Discriminator:
    """Tells the models of a union apart by their `kind`; a block that names none is of the `default` kind.

    `Annotated[Annotated[Cube, Tag("cube")] | Annotated[Ball, Tag("ball")], by_kind("cube")]`
    """

    def kind(value: Any) -> Any:
        return value.get("kind", default) if isinstance(value, Mapping) else getattr(value, "kind", default)

    return Discriminator(kind)


class ConfigError(ValueError):
    """The user's configuration is wrong; the message names the file, the setting and the remedy."""


M = TypeVar("M", bound=BaseModel)
Loc = tuple[str, ...]


@dataclass(frozen=True)
class Tree:
    """A configuration as read: plain values, and the file (or override) that each leaf came from."""

    values: dict[str, Any]
    origin: dict[Loc, str] = field(default_factory=dict)
    source: str = "<config>"

    def at(self, *path: str) -> Tree:
        """The subtree under `path`; raises ConfigError if it is not a mapping there."""
        values: Any = self.values
        for depth, key in enumerate(path):
            if not isinstance(values, Mapping) or not isinstance(values.get(key), Mapping):
                where = ".".join(path[: depth + 1])
                raise ConfigError(f"{self.source}: {where}: expected a block of settings here")
            values = values[key]
        n = len(path)
        origin = {loc[n:]: file for loc, file in self.origin.items() if loc[:n] == path}
        return Tree(dict(values), origin, self.source)

    def without(self, *keys: str) -> Tree:
        """This tree less some keys of its top level."""
        values = {key: value for key, value in self.values.items() if key not in keys}
        return Tree(
            values,
            {loc: file for loc, file in self.origin.items() if loc[:1] not in [(key,) for key in keys]},
            self.source,
        )

    def origin_of(self, loc: Loc) -> str:
        """The file that set `loc`, or the nearest enclosing block that is known."""
        for end in range(len(loc), 0, -1):
            if loc[:end] in self.origin:
                return self.origin[loc[:end]]
            for known, file in self.origin.items():
                if known[:end] == loc[:end]:
                    return file
        return self.source


def load(path: str | Path, overrides: Sequence[str] = ()) -> Tree:
    """Read a YAML file with its bases, then apply `key.path=value` overrides.

    Where there is no such file, it is one that genpipe ships: `configs/pipeline/demo.yaml` is known in any folder.
    Raises ConfigError for a missing file, broken YAML, a cycle of bases, or a malformed override.
    """
    return _overridden(_read(Path(path), ()), overrides)


def load_text(text: str | bytes, overrides: Sequence[str] = (), *, source: str) -> Tree:
    """As `load` does, of what stands in `source`, a file without bases. Raises ConfigError."""
    return _overridden(Tree(_parse_yaml(text, source), {}, source), overrides)


def _overridden(tree: Tree, overrides: Sequence[str]) -> Tree:
    for text in overrides:
        tree = _merge(tree, _parse_override(text))
    return tree


def parse(model: type[M], tree: Tree, *, prefix: str = "") -> M:
    """Check `tree` against `model`, and resolve its locations; raises ConfigError with one line for each fault."""
    try:
        return _located(model.model_validate(tree.values), tree, ())
    except ValidationError as error:
        lines = [_explain(model, tree, prefix, fault) for fault in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def _located(config: M, tree: Tree, at: Loc) -> M:
    """`config` with every `Location` absolute."""
    found: dict[str, Any] = {}
    for name, info in type(config).model_fields.items():
        value = getattr(config, name)
        here = WHERE in info.metadata and isinstance(value, str)
        found[name] = _absolute(value, tree.origin_of((*at, name))) if here else _located_in(value, tree, (*at, name))
    changes = {name: value for name, value in found.items() if value != getattr(config, name)}
    return config.model_copy(update=changes) if changes else config


def _located_in(value: Any, tree: Tree, at: Loc) -> Any:
    if isinstance(value, BaseModel):
        return _located(value, tree, at)
    if isinstance(value, Mapping):
        return {key: _located_in(inner, tree, (*at, str(key))) for key, inner in value.items()}
    if isinstance(value, tuple):
        return tuple(_located_in(inner, tree, at) for inner in value)
    return value


def locations(config: BaseModel, prefix: str = "") -> dict[str, str]:
    """Every `Location` in `config` that is set, by its dotted path after `prefix`."""
    found: dict[str, str] = {}
    for name, info in type(config).model_fields.items():
        value = getattr(config, name)
        if WHERE in info.metadata:
            found |= {f"{prefix}{name}": value} if value else {}
        else:
            found |= _locations_in(value, f"{prefix}{name}")
    return found


def _locations_in(value: Any, at: str) -> dict[str, str]:
    if isinstance(value, BaseModel):
        return locations(value, f"{at}.")
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, tuple) else ()
    return {path: place for key, each in items for path, place in _locations_in(each, f"{at}.{key}").items()}


def _absolute(location: str, origin: str) -> str:
    if "://" in location or not location:
        return location
    folder = Path(origin).parent if _here_or_shipped(Path(origin)).is_file() else Path()
    return os.path.normpath(_here_or_shipped(folder / Path(location).expanduser()).absolute())


def _here_or_shipped(path: Path) -> Path:
    """`path`, or the file that genpipe ships under that name if there is none."""
    shipped = SHIPPED.parent / os.path.normpath(path)
    return shipped if not path.exists() and SHIPPED in shipped.parents and shipped.is_file() else path


def resolved(config: BaseModel, *, without: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Every setting of `config`, defaults included, as JSON values; top-level keys in `without` left out."""
    return {k: v for k, v in config.model_dump(mode="json").items() if k not in without}


def changed(config: BaseModel, *, without: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The settings of `config` that differ from their defaults, as JSON values; of such blocks also the `kind`.

    Top-level keys in `without` are left out. Two configurations of one class that differ give different values, and a
    setting that is added later, with a default, changes none. Locations are left out.
    """
    dumped = config.model_dump(mode="json")
    found = {}
    for name, info in type(config).model_fields.items():
        value = getattr(config, name)
        if name in without or WHERE in info.metadata:
            continue
        if name == "kind" or value != info.get_default(call_default_factory=True):
            found[name] = _changed_in(value, dumped[name])
    return found


def _changed_in(value: Any, dumped: Any) -> Any:
    if isinstance(value, BaseModel):
        return changed(value)
    if isinstance(value, list | tuple):
        return [_changed_in(*pair) for pair in zip(value, dumped, strict=True)]
    if isinstance(value, Mapping):
        return {key: _changed_in(value[key], inner) for key, inner in dumped.items()}
    return dumped


def canonical_json(value: Any) -> str:
    """One spelling of a JSON value: sorted keys, no spaces. Raises ValueError on NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _read(path: Path, seen: tuple[Path, ...]) -> Tree:
    if path.resolve() in (p.resolve() for p in seen):
        raise ConfigError(f"{path}: `base` runs in a circle: {' -> '.join(str(p) for p in (*seen, path))}")
    try:
        text = _here_or_shipped(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        by = f" (named as base by {seen[-1]})" if seen else ""
        raise ConfigError(f"{path}: no such configuration file{by}{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    return _resolve_bases(_parse_yaml(text, str(path)), path, (*seen, path))


def _parse_yaml(text: str | bytes, source: str) -> dict[str, Any]:
    try:
        values = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: expected a mapping of settings, got {type(values).__name__}")
    return values


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which YAML itself would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As the base class does. Raises ConstructorError where a key stands twice."""
        seen: dict[Any, yaml.Node] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                first = seen[key].start_mark.line + 1
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"{key!r} stands here again after line {first}; join the two blocks",
                    key_node.start_mark,
                )
            seen[key] = key_node
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping


def _resolve_bases(values: dict[str, Any], path: Path, seen: tuple[Path, ...]) -> Tree:
    tree = Tree({}, {}, str(path))
    if isinstance(base := values.get("base"), str):
        tree = _merge(tree, _read(path.parent / base, seen))
        values = {k: v for k, v in values.items() if k != "base"}
    for key, value in values.items():
        if isinstance(value, dict):
            inner = _resolve_bases(value, path, seen)
            origin = {(str(key), *loc): file for loc, file in inner.origin.items()}
            origin = origin or {(str(key),): str(path)}
            tree = _merge(tree, Tree({str(key): inner.values}, origin, str(path)))
        else:
            tree = _merge(tree, Tree({str(key): value}, {(str(key),): str(path)}, str(path)))
    return Tree(tree.values, tree.origin, str(path))


def _merge(below: Tree, above: Tree) -> Tree:
    origin = dict(below.origin)

    def merge(low: Mapping[str, Any], high: Mapping[str, Any], at: Loc) -> dict[str, Any]:
        if "kind" in high and "kind" in low and low["kind"] != high["kind"]:
            low = {}
            for loc in [loc for loc in origin if loc[: len(at)] == at]:
                del origin[loc]
        out = dict(low)
        for key, value in high.items():
            both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
            out[key] = merge(out[key], value, (*at, key)) if both else value
        return out

    values = merge(below.values, above.values, ())
    return Tree(values, origin | above.origin, below.source)


def override(tree: Tree, path: Sequence[str], value: Any, *, origin: str) -> Tree:
    """`tree` with `value` in the place of what stands at `path`; `origin` says where that came from."""
    leaf = value
    for key in reversed(path):
        leaf = {key: leaf}
    return _merge(tree, Tree(leaf, {(*path, *inner): origin for inner in _leaves(value)}))


def _parse_override(text: str) -> Tree:
    path, eq, value = text.partition("=")
    keys = tuple(path.strip().split("."))
    if not eq or not all(keys):
        raise ConfigError(f"override {text!r}: write it as path=value, e.g. stages.decoder.train.optim.lr=1e-3")
    try:
        leaf = _typed(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {text!r}: the value is not valid YAML: {error}") from None
    origin = {(*keys, *inner): f"override {text!r}" for inner in _leaves(leaf)}
    for key in reversed(keys):
        leaf = {key: leaf}
    return Tree(leaf, origin)


def _typed(value: str) -> Any:
    """What an override's value stands for: YAML in brackets, braces or quotes, else all of it as one scalar."""
    if value[:1] in ("[", "{", '"', "'"):
        return yaml.load(value, _Loader)
    loader = _Loader("")
    tag = loader.resolve(yaml.ScalarNode, value, (True, False))
    return loader.construct_object(yaml.ScalarNode(tag, value))


def _leaves(value: Any) -> Iterator[Loc]:
    """The paths of what is no mapping; of an empty one, its own."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from ((str(key), *loc) for loc in _leaves(inner))
    else:
        yield ()


def _explain(model: type[BaseModel], tree: Tree, prefix: str, fault: Any) -> str:
    loc = tuple(_visible(fault["loc"], tree.values, missing=fault["type"] == "missing"))
    dotted = ".".join(([prefix] if prefix else []) + list(loc))
    where = f"{tree.origin_of(loc)}: {dotted or '(top level)'}"
    if fault["type"] == "extra_forbidden":
        known = sorted(_known_keys(model, loc[:-1], tree.values))
        if loc[-1] in known:
            return f"{where}: is a setting of another kind; set `kind` beside it"
        near = difflib.get_close_matches(loc[-1], known, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{where}: unknown key; {remedy}"
    if fault["type"] == "missing":
        return f"{where}: this setting is required and has no default; add it"
    if fault["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"{where}: expected a block of settings here, got {fault['input']!r}"
    if fault["type"].startswith("union_tag"):
        return _explain_kind(tree.origin_of((*loc, "kind")), dotted, fault)
    if fault["type"] == "string_type" and isinstance(fault["input"], int | float):
        return f"{where}: expected text, got the number {fault['input']!r}; write it in quotes"
    message = fault["msg"].removeprefix("Value error, ")
    got = "" if isinstance(fault["input"], Mapping) else f", got {fault['input']!r}"
    meaning = None if fault["type"] == "value_error" else _description(model, loc, tree.values)
    return f"{where}: {message[0].lower()}{message[1:]}{got}" + (f" ({meaning})" if meaning else "")


def _explain_kind(source: str, dotted: str, fault: Any) -> str:
    """A block whose `kind` is missing or names none of the kinds there are."""
    context = fault["ctx"]
    if "tag" not in context:
        return f"{source}: {dotted}: has no `kind`, which says what its settings mean; add one"
    kinds = context["expected_tags"]
    near = difflib.get_close_matches(repr(context["tag"]), kinds.split(", "), n=1)
    remedy = f"did you mean {near[0]}?" if near else f"known kinds: {kinds}"
    return f"{source}: {dotted}.kind: unknown kind {context['tag']!r}; {remedy}"


def _visible(loc: Sequence[int | str], values: Any, *, missing: bool) -> Iterator[str]:
    """pydantic's location without the union tags that it adds and the user never wrote.

    `missing`: the last part is a setting that is not there, and no tag.
    """
    for position, part in enumerate(loc):
        last = position == len(loc) - 1
        if isinstance(values, Mapping) and part not in values and not (last and missing):
            continue
        yield str(part)
        if not last:
            try:
                values = values[part]
            except (KeyError, IndexError, TypeError):
                values = None


def _known_keys(model: Any, loc: Loc, values: Any) -> set[str]:
    """The field names of the block at `loc`."""
    return {name for m in _blocks_at(model, loc, values) for name in m.model_fields}


def _description(model: Any, loc: Loc, values: Any) -> str | None:
    """What the setting at `loc` means, where its block says so."""
    fields = (m.model_fields.get(loc[-1]) for m in _blocks_at(model, loc[:-1], values)) if loc else ()
    return next((field.description for field in fields if field is not None), None)


def _blocks_at(model: Any, loc: Loc, values: Any) -> list[type[BaseModel]]:
    """The models that the block at `loc` may be, following unions by the `kind` that the user wrote."""
    models = list(_models_in(model))
    for key in loc:
        values = values.get(key) if isinstance(values, Mapping) else None
        inner = [m for owner in models if key in owner.model_fields for m in _field_models(owner, key)]
        models = inner or models  # a key that is no field is one of a mapping of models
    if isinstance(values, Mapping) and "kind" in values:
        chosen = [m for m in models if values["kind"] in get_args(_annotation(m, "kind"))]
        models = chosen or models
    return models


def _annotation(model: type[BaseModel], name: str) -> Any:
    return model.model_fields[name].annotation if name in model.model_fields else None


def _field_models(owner: type[BaseModel], name: str) -> Iterator[type[BaseModel]]:
    yield from _models_in(_annotation(owner, name))


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Annotated, Union, types.UnionType, list, tuple, dict):
        for inner in get_args(annotation):
            yield from _models_in(inner)
