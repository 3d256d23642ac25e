"""Expert parallelism whose ranks meet on their devices: no message between hosts while all goes well.

A call is published and pulled. To publish it a rank stages its rows, with what goes with them, in a window of its own,
and writes a header with a flag into the board of every rank of its node (`board`). To pull, a kernel waits for the
headers of all and looks whether they agree. Kernels behind it count from everybody's routes where rows belong
(`ways`), fetch them from where they were staged straight to their place or, in combine, to their sum, and tell the
owner that they have been read (`kernels`). The host looks at what the first kernel found, in memory that device and
host share, and only when ranks differ, are late or are gone does it talk to the others, as `hal.portable.ep_post` does
(`meeting`).

For devices whose memory other processes of the machine open by address; between nodes `hal.portable.ep_packed` serves.
"""

from hal.portable.direct.engine import MOST_BINS, MOST_CHOICES, DirectEpEngine

__all__ = ["MOST_BINS", "MOST_CHOICES", "DirectEpEngine"]
