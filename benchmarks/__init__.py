"""Measurements behind every figure in the docs. Each module is a command; paths of prompts are arguments."""
