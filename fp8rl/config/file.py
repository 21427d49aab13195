"""A configuration from a YAML file and ``a.b=c`` overrides, and back.

Unknown keys are refused with the nearest known one, and every complaint names its key. A run's is
the usual one; ``load`` and ``parse`` take any other model, such as a study's.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from fp8rl.config.run import RunConfig
from fp8rl.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's YAML file; see ``load``."""
    return load(RunConfig, path, overrides)


def parse_config(raw: dict[str, Any], *, origin: str = "config") -> RunConfig:
    """Validate a run's nested dict; see ``parse``."""
    return parse(RunConfig, raw, origin=origin)


def load(kind: type[Model], path: Path, overrides: Sequence[str] = ()) -> Model:
    """Read a YAML file, apply ``a.b=c`` overrides, validate.

    Raises:
        ConfigError: no such file, not YAML, an unknown key, or a value out of range. The message
            names each key, what was found and what would do.
    """
    try:
        raw = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not YAML: {error}") from error
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: holds a {type(raw).__name__}, expected keys and values")
    for override in overrides:
        _apply_override(raw, override)
    return parse(kind, raw, origin=str(path))


def parse(kind: type[Model], raw: dict[str, Any], *, origin: str) -> Model:
    """Validate a nested dict; raises ConfigError (see ``load``)."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(dict(item), kind) for item in error.errors()]
        raise ConfigError(f"{origin}: " + "; ".join(lines)) from error


def dump_config(config: BaseModel) -> str:
    """The whole configuration, defaults included, as YAML that ``load`` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def set_key(raw: dict[str, Any], key: str, value: Any) -> None:
    """Set the dotted ``key`` of a nested dict; sections that are absent or empty are made.

    Raises:
        ConfigError: a section of the key is a value.
    """
    *sections, leaf = key.split(".")
    node = raw
    for section in sections:
        if node.get(section) is None:  # absent, or a section left empty in the file
            node[section] = {}
        node = node[section]
        if not isinstance(node, dict):
            raise ConfigError(f"{key}: {section!r} is a value, not a section")
    node[leaf] = value


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise ConfigError(f"override {override!r} is not of the form a.b=c")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML: {error}") from error
    try:
        set_key(raw, key, value)
    except ConfigError as error:
        raise ConfigError(f"override {override!r}: {error}") from error


def _explain(item: dict[str, Any], kind: type[BaseModel]) -> str:
    """One of pydantic's complaints about a ``kind`` as one sentence."""
    where, known, kinds = _locate(item["loc"], kind)
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(where.rpartition(".")[2], known, n=1, cutoff=0.0)
        return f"unknown key {where!r}; did you mean {near[0]!r}?"
    if item["type"] == "union_tag_not_found":
        return f"{where}: has no kind; set {where}.kind to one of {', '.join(kinds)}"
    message = str(item["msg"]).removeprefix("Value error, ")
    found = item["input"]
    shown = "" if isinstance(found, dict | BaseModel) else f" (found {found!r})"
    return f"{where or 'config'}: {message}{shown}"


def _locate(
    location: Sequence[str | int], model: type[BaseModel]
) -> tuple[str, list[str], list[str]]:
    """The dotted key that a location means, the keys known where it stands, the kinds it may have.

    Inside a tagged union pydantic adds the tag to the location; a tag is no key and is left out.
    """
    variants: dict[str | int, type[BaseModel]] = {}
    path: list[str] = []
    known: list[str] = []
    for part in location:
        if part in variants:
            model, variants = variants[part], {}
            continue
        path.append(str(part))
        if isinstance(part, int):  # an item of a list, of the same kinds
            continue
        known = list(model.model_fields)
        field = model.model_fields.get(str(part))
        kinds = _models_in(field.annotation) if field else []
        if len(kinds) == 1:
            model = kinds[0]
        variants = {kind.model_fields["kind"].default: kind for kind in kinds if len(kinds) > 1}
    return ".".join(path), known, [str(kind) for kind in variants]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models that a value of this type may hold: itself, a union's members, a list's items."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [kind for member in get_args(annotation) for kind in _models_in(member)]
