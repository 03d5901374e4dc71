"""Compiled models in the formats of other tools.

What is written comes from the plan of an artifact, the program that runs; no pass is written again
for a format. :mod:`fpcompiler.interop.formats` lists the formats. What writes one, and libraries
that it needs, are imported when it is used.
"""
