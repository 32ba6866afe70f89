"""Command-line drivers: parse, build the configuration, call, write; the only place that touches user files."""
