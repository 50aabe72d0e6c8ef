"""Break PostgreSQL for real in your own tests.

- `TemporaryServer`: a server of one's own: stop, kill, freeze, restart it;
- `FaultProxy`: between client and server, delays, cuts or freezes a chosen message;
- `CancelSweep`: cancels an async function at its 1st, 2nd, ... k-th suspension point.

The first two are synchronous and live in processes and threads of their own: the
same beside asyncio, uvloop and trio, and out of reach of what is being tested.
"""

from ._faults import Cut, Delay, Fault, Freeze, Stats
from ._protocol import Message, cancel_request, command_complete, query
from ._proxy import FaultProxy
from ._server import TemporaryServer
from ._sweep import CancelSweep, Trial
from ._system import find_servers

__all__ = [
    "CancelSweep",
    "Cut",
    "Delay",
    "Fault",
    "FaultProxy",
    "Freeze",
    "Message",
    "Stats",
    "TemporaryServer",
    "Trial",
    "cancel_request",
    "command_complete",
    "find_servers",
    "query",
]
