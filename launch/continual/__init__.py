"""``steppe continual``: tasks one after the other, by several methods, and what is left of each.

settings.py   what is run
material.py   the tasks' data and the classes of the head that they share
command.py    the command itself
table.py      results.json and table.md
"""
