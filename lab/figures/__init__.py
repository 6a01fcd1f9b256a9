"""Drawings: one function per figure, each beside its title, its caption and its limits.

A figure draws a run set, or the table that its first parameter names.  They draw what they are
given and compute nothing of their own.
"""
