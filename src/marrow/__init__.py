"""Marrow: an infrastructure-first LLM stack, from raw rows to a served model."""

__version__ = "0.1.0"
