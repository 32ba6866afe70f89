"""Configuration of `rasd simulate`; flags and YAML derive from it. Every field's description is its help text."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from jobs.config import Auto, Count
from jobs.fields import OnOff, Options, listed, option


class SimulateConfig(Options):
    """Everything that `rasd simulate` can be told."""

    answers: str = option(
        ...,
        "input and output",
        "Output of `rasd generate` with this model, whose rows are played again.",
        wanted="an output directory of rasd generate",
        metavar="DIR",
        min_length=1,
    )
    recording: str = option(
        ...,
        "input and output",
        "File that holds what the draft says at every place of the answers; made if it is not there yet.",
        wanted="a file's path, ending in .npz",
        metavar="FILE",
        min_length=1,
    )
    num_rows: int = option(64, "input and output", "Rows played, evenly spaced over the answers.", ge=1)
    quiet: bool = option(False, "input and output", "No table; the last line is still printed.")

    model: str = option(..., "models", "Target model, as for `rasd generate`.", wanted="a model's name, path or hub id")
    revision: str | None = option(None, "models", "Branch, tag or commit of a hub model.")
    trust_remote_code: bool = option(False, "models", "Run Python code that comes with the model.")
    draft: str | None = option(None, "models", "Draft head or model, as for `rasd generate`.", metavar="head|MODEL")
    dtype: Literal["float32", "bfloat16", "float16"] = option("bfloat16", "models", "Type of the weights.")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "models", "Where it is recorded; auto takes a GPU if any.")

    methods: Annotated[tuple[str, ...], BeforeValidator(listed)] = option(
        ("plain", "context", "draft", "switch", "rasd-fixed", "rasd"),
        "simulation",
        "Methods to play.",
        wanted="methods of rasd generate",
        metavar="METHOD",
    )
    budgets: Annotated[tuple[Annotated[int, Field(ge=1)] | Auto, ...], BeforeValidator(listed)] = option(
        ("auto", 16, 32), "simulation", "Budgets to play each method with.", wanted="numbers or auto", metavar="N|auto"
    )
    slots: Count = option(1, "simulation", "Sequences decoded at once.")
    datastore: str | None = option(None, "simulation", "Datastore, as for `rasd generate`.", metavar="DIR")
    live: OnOff = option("on", "simulation", "Search the finished outputs, too.", metavar="on|off")
    passages: int = option(4, "simulation", "Passages of the datastore looked up for each prompt.", ge=0)
