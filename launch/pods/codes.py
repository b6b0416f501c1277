"""Exit statuses that a scheduler acts on; none is one that Python, a shell or a signal gives.

=====  ==========================================================================
status what happened, and what to do
=====  ==========================================================================
0      the run is complete
2      a mistake in the settings or the data: starting again would not help
69     this process lost the others, or never found them: start all again
75     stopped by SIGTERM, after saving where it was training (see ``stop``): start again with
       ``--resume``
76     the watchdog saw no step for too long: start again with ``--resume``
130    interrupted by Ctrl-C; saved where there was something to save
=====  ==========================================================================

69 and 75 are EX_UNAVAILABLE and EX_TEMPFAIL of sysexits.h.
"""

from __future__ import annotations

MISTAKE = 2
LOST = 69
REQUEUE = 75
HUNG = 76
INTERRUPTED = 130
# 128 + SIGKILL and SIGTERM, as a shell reports them.
KILLED = (137, 143)


def again(status: int) -> bool:
    """Whether a job that ended so should be started again: preempted, hung, killed or alone."""
    return status in (LOST, REQUEUE, HUNG) or status < 0 or (status > 128 and status != INTERRUPTED)
