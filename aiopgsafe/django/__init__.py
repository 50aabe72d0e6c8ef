"""A database backend for Django: ``"ENGINE": "aiopgsafe.django"``.

Django's own for PostgreSQL, on `aiopgsafe.Connection`: the COMMIT of an ``atomic`` block and its
``on_commit`` callbacks are one section. Exceptions of signal handlers (Celery's time limits and
shutdown, a supervisor's SystemExit), and those raised in a thread from outside (dramatiq, RQ),
wait until the outcome is known and the callbacks have run, and go on unchanged.
"""
