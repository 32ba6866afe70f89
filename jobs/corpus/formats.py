"""Which files hold documents: those of rows, as for prompts, and prose and source code, a document a file."""

from pathlib import Path

from jobs.readers import ROW_FORMATS, Formats, file_format, open_reader
from jobs.readers.base import Reader
from jobs.readers.json_list import json_layout
from jobs.readers.whole_file import WholeFileReader

PROSE = (".txt", ".md", ".rst", ".tex", ".adoc", ".org", ".html", ".htm", ".xml")
SOURCE = (
    *(".py", ".pyi", ".pyx", ".ipynb", ".c", ".h", ".cc", ".cpp", ".cxx", ".hh", ".hpp", ".cu", ".cuh", ".m", ".mm"),
    *(".rs", ".go", ".java", ".kt", ".kts", ".scala", ".cs", ".swift", ".js", ".jsx", ".mjs", ".ts", ".tsx", ".vue"),
    *(".rb", ".php", ".pl", ".pm", ".lua", ".r", ".jl", ".hs", ".ml", ".mli", ".ex", ".exs", ".erl", ".clj", ".dart"),
    *(".sh", ".bash", ".zsh", ".ps1", ".sql", ".proto", ".cmake", ".gradle", ".tf", ".toml", ".yaml", ".yml", ".ini"),
    *(".cfg", ".css", ".scss", ".f90", ".zig", ".nim", ".v", ".sv", ".vhd", ".lean"),
)
WHOLE_FILES = (*PROSE, *SOURCE)


def corpus_formats(text_column: str) -> Formats:
    """Rows whose column `text_column` holds a document, and files that are one; their text becomes that column."""

    def open_document(path: Path, name: str) -> Reader:
        is_object = file_format(path, (".json",)) is not None and json_layout(path) == "object"
        if is_object or file_format(path, WHOLE_FILES) is not None:
            return WholeFileReader(path, name, text_column)
        return open_reader(path, name, text_column)

    return Formats("documents", (*ROW_FORMATS, *WHOLE_FILES), open_document)
