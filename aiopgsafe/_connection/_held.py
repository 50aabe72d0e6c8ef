"""The blocks that a connection is in, and whose it is."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from psycopg.rows import Row

from .._outcome import ACTIVE, ROLLED_BACK
from ._riding import Riding

if TYPE_CHECKING:
    from .._base_block import BaseBlock

__all__ = ["Blocks"]

logger = logging.getLogger("aiopgsafe")


class Blocks(Riding[Row]):
    """The part of a connection that knows who is in it.

    :ivar _holder: the pool that has lent it; None if it is there. A connection of one's own has
        no such attribute.
    """

    _holder: Any

    # psycopg refuses commit(), set_autocommit() ... inside a block by its count.

    def _push_block(self, tx: BaseBlock[Any]) -> None:
        self._blocks.append(tx)
        self._num_transactions = len(self._blocks)

    def _remove_block(self, tx: BaseBlock[Any]) -> None:
        if self._blocks and self._blocks[-1] is tx:
            self._blocks.pop()
        elif tx in self._blocks:
            self._blocks.remove(tx)
        self._num_transactions = len(self._blocks)

    @property
    def _pool(self) -> Any:
        """Of a pool's only: psycopg doesn't warn of those that are left open."""
        return self._holder

    @_pool.setter
    def _pool(self, pool: Any) -> None:
        # psycopg's pools take a connection back that looks idle: where BEGIN waits, it does.
        if pool is None and self._blocks:
            logger.warning("%s was given back inside a transaction block", self)
            unit = self._blocks[0]._unit
            self._forget_blocks()
            if unit.state is ACTIVE:
                unit.advance(ROLLED_BACK)
        self._holder = pool

    def _forget_blocks(self) -> None:
        """For its next holder, between transactions: what the last one never left."""
        for block in self._blocks:
            block._left = True
        self._blocks.clear()
        self._forget_queue()
        self._num_transactions = 0
        self._tpc = None
