"""The parts that the commands, bench and demo share: libraries, tables, progress, pictures, JSON.

The functions import rich and matplotlib when they are called: the bare installation has neither.
"""
