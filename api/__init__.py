"""The types of the API and the pure decisions on them: no I/O, no clock of its own.

The capturer's worker runs on the standard library alone, so nothing is imported here.
"""
