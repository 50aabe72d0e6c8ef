"""A pool of connections: nothing is lost, wherever a client is cancelled.

`_places` decides, in plain synchronous code that no cancellation can interrupt;
`_pool` does what waits: connecting, cleaning, checking.
"""

from ._pool import AsyncConnectionPool

__all__ = ["AsyncConnectionPool"]
