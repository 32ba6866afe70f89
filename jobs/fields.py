"""Fields of a configuration model: their help, the words for what they accept, and their parsers."""

import re
import types
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic.fields import FieldInfo
from pydantic_core.core_schema import ValidationInfo

OnOff = Literal["on", "off"]

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)
_KINDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "a non-empty string"}
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


class Options(BaseModel):
    """Base of configurations: frozen, unknown keys are errors, and booleans are not taken for numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _understand_booleans(cls, value: object, info: ValidationInfo) -> object:
        annotation: Any = cls.model_fields[info.field_name or ""].annotation
        if not isinstance(value, bool) or annotation is bool:
            return value
        if annotation == OnOff:  # YAML takes a bare `off` for false
            return "on" if value else "off"
        # Python counts True as 1, but `top_k: yes` in a YAML file is a mistake.
        raise ValueError("a boolean")


def parse_size(value: object) -> object:
    """Bytes of a size such as `4GiB`, `500MB` or `1073741824`; `auto` and non-strings pass unchanged.

    Raises:
        ValueError: the string is neither.
    """
    if not isinstance(value, str) or value == "auto":
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise ValueError(f"not a size: {value!r}")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** _POWERS[prefix.upper()])


def listed(value: object) -> object:
    """A single value given where a list is expected becomes a list of one."""
    return [value] if isinstance(value, str | int) else value


def describe(annotation: Any, metadata: Iterable[Any] = (), *, bounds_only: bool = False) -> str:
    """What a value of this annotated type must be, in words, for help texts and error messages."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *own = get_args(annotation)
        own = [m for item in own for m in (item.metadata if isinstance(item, FieldInfo) else [item])]
        return describe(inner, own, bounds_only=bounds_only)
    if origin is Literal:
        return (
            " or ".join(get_args(annotation))
            if len(get_args(annotation)) < 3
            else "one of " + ", ".join(get_args(annotation))
        )
    if origin in (Union, types.UnionType):
        branches = [branch for branch in get_args(annotation) if branch is not type(None)]
        return " or ".join(describe(branch, bounds_only=bounds_only) for branch in branches)
    words = [] if bounds_only else [_KINDS[annotation]]
    limits = [
        f"{phrase} {getattr(item, name)!r}".removesuffix(".0")
        for name, phrase in (("gt", "above"), ("ge", "at least"), ("le", "at most"))
        for item in metadata
        if getattr(item, name, None) is not None
    ]
    return " ".join([*words, " and ".join(limits)]).strip()


def option(default: Any, group: str, description: str, *, wanted: str = "", metavar: str = "", **bounds: Any) -> Any:
    """A field with its help text, help group and, where the type does not say it, what a value must be."""
    extra: dict[str, Any] = {"group": group, "wanted": wanted, "metavar": metavar}
    return Field(default, description=description, json_schema_extra=extra, **bounds)
