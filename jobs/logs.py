"""How log lines look on stderr: text for people, or JSON, one object a line, for what collects logs."""

import json
import logging
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Literal

from jobs.fields import option

LogFormat = Literal["text", "json"]
_PACKAGES = ("jobs", "actors", "pipeline", "datastore")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """`time` (ISO 8601, UTC), `level`, `logger` and `message`, after whatever `extra` the caller gave."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {name: value for name, value in vars(record).items() if name not in _STANDARD}
        entry |= {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def set_up() -> None:
    """Text, until the options are known."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    use("text")


def use(log_format: LogFormat) -> None:
    """Change the root handlers' format; JSON also has debug lines, such as one for each shard committed."""
    is_json = log_format == "json"
    for handler in _handlers():
        handler.setFormatter(JsonFormatter() if is_json else logging.Formatter("rasd: %(message)s"))
    for package in _PACKAGES:
        logging.getLogger(package).setLevel(logging.DEBUG if is_json else logging.INFO)
    logging.captureWarnings(is_json)
    # Whenever transformers looks for torchao, torch warns of its import, past our handlers, and torchao of kernels that
    # other machines have.
    for name in ("torch.utils._pytree", "torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)


def is_json() -> bool:
    """Whether lines on stderr are to be JSON."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in _handlers())


def _handlers() -> Iterator[logging.Handler]:
    """Those of `set_up`, not those that others, such as pytest, have added."""
    return (handler for handler in logging.getLogger().handlers if type(handler) is logging.StreamHandler)


def log_format_option(group: str) -> Any:
    """The field `log_format` of a configuration."""
    return option("text", group, "Lines on stderr: text, or json, one object a line with its fields.")
