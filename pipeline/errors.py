"""The errors a user can meet, as one small tree.

    RasdError
    |-- ConfigError     an option or a combination of options is wrong            (exit code 2)
    |-- InputError      a file, directory or data set cannot be read at all       (exit code 2)
    |-- ModelError      the model or tokenizer cannot be loaded or is unsupported (exit code 2)
    |-- DatastoreError  a datastore is damaged, or does not fit the model         (exit code 2)
    |-- RowError        one input row is bad: it becomes an error row, the job goes on
    `-- JobError        the job failed and can be resumed                         (exit code 1)

Every message says what was wrong, the value, and what to do about it.
"""


class RasdError(Exception):
    """Base of all errors raised on purpose by this project."""


class ConfigError(RasdError):
    """An option, or a combination of options, is wrong."""


class InputError(RasdError):
    """A file, directory or data set cannot be read at all."""


class ModelError(RasdError):
    """A model or tokenizer cannot be loaded, or its architecture is not supported."""


class DatastoreError(RasdError):
    """A datastore is damaged, incomplete, or was made for another tokenizer or format."""


class RowError(RasdError):
    """One row cannot be generated; it becomes an error row.

    Args:
        error_type: short stable name for the `error_type` column, e.g. `prompt_too_long`.
        message: what was wrong, the value, and the remedy, for the `error_message` column.
    """

    def __init__(self, error_type: str, message: str) -> None:
        super().__init__(message)
        self.error_type = error_type

    def __reduce__(self) -> tuple[type["RowError"], tuple[str, str]]:
        return RowError, (self.error_type, str(self))  # pickling passes `args` alone otherwise


class JobError(RasdError):
    """The job failed; what is committed stays, and the same command resumes it."""
