"""A service one would keep: transfers with an idempotency key, and a page that shows them live."""
