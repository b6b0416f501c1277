"""``steppe compare``: methods x seeds x training sizes x sources, and one table with a paired test.

settings.py   what is compared; an *arm* is a method with its settings and its grid of rho
material.py   splits, draws of training examples, wrong labels
trial.py      one training run and its scores; the program is shared by arms, radii and seeds
curvature.py  how flat the minimum is that a run found
journal.py    OUT/runs.jsonl: one line a finished trial, so that a comparison can be killed
schedule.py   which trials are left, in the order in which rows of the table become complete
table.py      mean, spread, the paired tests, table.json and table.md
estimate.py   what it would take
command.py    the command itself
"""

from steppe.launch.compare.settings import Arm, Cell, CompareConfig

__all__ = ["Arm", "Cell", "CompareConfig"]
