"""`rasd generate` with fake replicas, as a process that tests can kill.

python -m tests.fake_rasd SECONDS_A_ROW [LEDGER] --model m --prompts FILE --output DIR ...
"""

import sys

from jobs.config import GenerateConfig
from jobs.generation import generate
from jobs.options import Parser, add_options, build_config
from tests.fakes import FakeBackend, Faults


def parse(words: list[str]) -> GenerateConfig:
    """A configuration as `rasd generate` makes it."""
    parser = Parser(prog="rasd generate")
    add_options(parser, GenerateConfig)
    return build_config(GenerateConfig, *parser.parse_known_args(words))


if __name__ == "__main__":
    first_option = next(place for place, word in enumerate(sys.argv) if word.startswith("--"))
    seconds, *ledger = sys.argv[1:first_option]
    faults = Faults(seconds_a_row=float(seconds), ledger="".join(ledger))
    sys.exit(generate(parse(sys.argv[first_option:]), FakeBackend(faults)))
