"""Instruction sets, benchmarks and prompts. Only `tokenisation` imports a heavy library."""
