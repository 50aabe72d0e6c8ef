"""`aiopgsafe demo`: money moves while clients are cancelled, psycopg's pool beside ours.

In the order of reading:

- `bank`: the tables, what a client is to do, what is really in the tables;
- `wires`: a proxy for each connection, where it can be seen what went over it;
- `cancelling`, `native`: the ways to cancel;
- `clients`: what clients do, and what they are told;
- `figures`: the one compared with the other;
- `side`: one side from beginning to end; `main`: both; `interrupts`: Ctrl-C meanwhile;
- `display`, `logs`: what people see, and what they don't.

Everything here sees aiopgsafe's public names only.
"""

from .main import Options, main

__all__ = ["Options", "main"]
