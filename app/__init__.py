"""Sluice: a batch completion service for language models that needs nothing but PostgreSQL."""

__version__ = "0.1.0"
