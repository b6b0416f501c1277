"""Several processes: ranks of a run, ``steppe launch`` on one host, ``steppe submit`` on many."""

from __future__ import annotations
