"""Planted bugs: backends that are wrong in one realistic way each, and the table that shows the suite kills them all.

``python -m mutants`` (with ``tests`` on the path) prints the kill table and fails when a mutant survives or dies in
another level than the one that claims it, or when a correct backend does not survive.
"""
