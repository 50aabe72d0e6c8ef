"""An order, and what follows from it once it is committed."""

from django.db import models


class Order(models.Model):  # type: ignore[misc]
    """What the task's transaction writes."""

    name = models.CharField(max_length=100, unique=True)

    class Meta:
        app_label = "shop"


class Followed(models.Model):  # type: ignore[misc]
    """What its `on_commit` callback writes: in life, the next task that it queues."""

    name = models.CharField(max_length=100, unique=True)

    class Meta:
        app_label = "shop"
