"""Shows SQLAlchemy's async engine and session on connections of ours: `async_creator`.

    python examples/sqlalchemy_engine.py [DSN]

Nothing else changes. A cancellation that arrives in COMMIT is held back until the server has
answered, and says in a note what became of the transaction. But for `sessionmaker.begin()`: that
one commits in a task of SQLAlchemy's own and doesn't wait for it when it is cancelled. Take
`async with sessions() as session, session.begin()` instead, or `await session.commit()`.
"""

from __future__ import annotations

import asyncio
from functools import partial

from _server import database
from sqlalchemy import select
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from aiopgsafe import AsyncConnection


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "sqlalchemy_account"
    name: Mapped[str] = mapped_column(primary_key=True)
    balance: Mapped[int]


async def main(dsn: str) -> None:
    engine = create_async_engine(
        "postgresql+psycopg://", async_creator=partial(AsyncConnection.connect, dsn)
    )
    sessions = async_sessionmaker(engine, expire_on_commit=False)
    async with engine.begin() as conn:
        await conn.run_sync(Base.metadata.drop_all)
        await conn.run_sync(Base.metadata.create_all)
    async with sessions() as session, session.begin():
        session.add_all([Account(name="a", balance=10), Account(name="b", balance=0)])

    async def move(amount: int) -> None:
        async with sessions() as session, session.begin():
            source, target = [await session.get_one(Account, name) for name in ("a", "b")]
            source.balance -= amount
            target.balance += amount

    await move(3)
    for milliseconds in range(5, 40, 5):
        task = asyncio.create_task(move(1))
        await asyncio.sleep(milliseconds / 1000)
        task.cancel()
        try:
            await task
            print(f"after {milliseconds} ms: done")
        except asyncio.CancelledError as exc:
            print(
                f"after {milliseconds} ms: cancelled;",
                *getattr(exc, "__notes__", ["it had not got to its COMMIT"]),
            )
    async with sessions() as session:
        for account in await session.scalars(select(Account).order_by(Account.name)):
            print(account.name, account.balance)
    await engine.dispose()


if __name__ == "__main__":
    with database() as dsn:
        asyncio.run(main(dsn))
