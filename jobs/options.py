"""From the command line and a YAML file to a validated configuration; every problem becomes one clear line.

Flags are the model's fields with hyphens. Precedence: flag, then YAML, then default.
"""

import argparse
import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from jobs.fields import describe
from pipeline.errors import ConfigError

M = TypeVar("M", bound=BaseModel)


class Parser(argparse.ArgumentParser):
    """An argparse parser that takes no abbreviations and reports misuse as ConfigError."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. See {self.prog} --help.")


def flag_of(name: str) -> str:
    """`top_p` -> `--top-p`."""
    return "--" + name.replace("_", "-")


def add_options(parser: argparse.ArgumentParser, model: type[BaseModel]) -> None:
    """Add `--config` and one flag for each field, grouped, with its default in the help."""
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of the options below; flags override it.")
    groups: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        title = _extra(field, "group")
        group = groups.setdefault(title, None) or parser.add_argument_group(title)
        groups[title] = group
        group.add_argument(flag_of(name), dest=name, default=None, help=_help(field), **_action(field))


def build_config(model: type[M], arguments: argparse.Namespace, unknown: Sequence[str]) -> M:
    """Merge flags over YAML and validate.

    Args:
        arguments: what `add_options` parsed; None means not given.
        unknown: what argparse could not place.

    Raises:
        ConfigError: one line that names the option, its value and what it must be.
    """
    _reject_unknown(unknown, [flag_of(name) for name in model.model_fields])
    flags = {name: value for name in model.model_fields if (value := getattr(arguments, name)) is not None}
    path = arguments.config
    from_file = _read_yaml(Path(path), model.model_fields) if path is not None else {}
    try:
        return model.model_validate({**from_file, **flags})
    except ValidationError as error:
        raise ConfigError(explain(error, model, flags, path)) from None


def _extra(field: FieldInfo, key: str) -> str:
    extra = field.json_schema_extra
    return str(extra.get(key, "")) if isinstance(extra, Mapping) else ""


def _help(field: FieldInfo) -> str:
    default = field.default
    if field.is_required():
        note = " (required)"
    elif default is None or default is False or default == ():
        note = ""
    else:
        note = f" (default: {default})"
    return f"{field.description}{note}".replace("%", "%%")


def _action(field: FieldInfo) -> dict[str, Any]:
    if field.annotation is bool:
        return {"action": argparse.BooleanOptionalAction}
    metavar = _extra(field, "metavar")
    if get_origin(field.annotation) is tuple:
        return {"action": "extend", "nargs": "+", "metavar": metavar or "TEXT"}
    return {"metavar": metavar or _metavar(field.annotation)}


def _metavar(annotation: Any) -> str:
    words = {int: "N", float: "X", str: "TEXT", type(None): ""}
    if annotation in words:
        return words[annotation]
    parts = get_args(annotation)
    return "|".join(filter(None, (part if isinstance(part, str) else _metavar(part) for part in _flat(parts))))


def _flat(parts: Iterable[Any]) -> Iterable[Any]:
    # Annotated[int, ...] | Literal["auto"]: only the type of an Annotated matters here.
    return (get_args(part)[0] if hasattr(part, "__metadata__") else part for part in parts)


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else "."


def _reject_unknown(unknown: Sequence[str], flags: Sequence[str]) -> None:
    for word in unknown:
        if word.startswith("-"):
            flag = word.partition("=")[0]
            raise ConfigError(f"unknown option {flag}{_nearest(flag, [*flags, '--config'])}")
    if unknown:
        raise ConfigError(
            f"unexpected argument {unknown[0]!r}; options start with -- and take their values after them."
        )


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML without silent loss: a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", node.start_mark)
        return dict(super().construct_mapping(node, deep))


def _read_yaml(path: Path, fields: Mapping[str, FieldInfo]) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config is {str(path)!r}; it cannot be read: {error}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict | None):
        raise ConfigError(
            f"--config {path} holds a {type(values).__name__}; it must be a mapping of options to values."
        )
    named = {str(key).replace("-", "_"): value for key, value in (values or {}).items()}
    for name in named:
        if name not in fields:
            raise ConfigError(f"unknown key {name!r} in {path}{_nearest(name, fields)}")
    return named


def explain(error: ValidationError, model: type[BaseModel], flags: Mapping[str, Any], path: str | None) -> str:
    """The first problem as one line; `flags` are the options given, the others come from the file at `path`."""
    # A wrong value first: what is missing may only be so because of a mistake in what is there.
    first = min(error.errors(include_url=False), key=lambda problem: problem["type"] == "missing")
    name = str(first["loc"][0])
    field = model.model_fields[name]
    where = flag_of(name) if name in flags or path is None else f"{name} in {path}"
    out_of_bounds = first["type"].startswith(("greater_than", "less_than"))
    wanted = _extra(field, "wanted") or describe(field.annotation, field.metadata, bounds_only=out_of_bounds)
    if first["type"] == "missing":
        return f"{flag_of(name)} is missing; it must be {wanted}."
    return f"{where} is {_shown(first['input'])}; it must be {wanted}."


def _shown(value: Any) -> str:
    # Flags arrive as strings: a number reads best without quotes, anything else with them.
    try:
        float(value)
    except (TypeError, ValueError):
        return repr(value)
    return str(value)
