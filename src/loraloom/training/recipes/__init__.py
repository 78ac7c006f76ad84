"""The papers' experiments as RUN.yaml files; `loraloom recipes` lists and copies them.

The comment at the top of each names the source of its numbers, and says which are ours.
"""
