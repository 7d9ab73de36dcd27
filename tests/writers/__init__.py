"""The matrix of real writers: for each writer and case, the adapter's file merged by doraxp.

A module for each writer registers its cases. `nox -s writers` runs them and writes
docs/reference/writers.md.
"""
