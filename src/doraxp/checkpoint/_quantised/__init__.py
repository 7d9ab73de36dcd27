"""Quantised weights: one module a format, and the registry of all of them."""

from __future__ import annotations
