"""The Celery worker: `celery -A worker worker`, in this directory."""

import os
from functools import partial

import django
from celery import Celery

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "settings")
django.setup()

from django.db import transaction
from shop.models import Followed, Order

folder = os.environ["SHOP_BROKER"]
app = Celery("shop", broker="filesystem://")
app.conf.update(
    broker_transport_options={
        "data_folder_in": folder,
        "data_folder_out": folder,
        "processed_folder": folder,
        "control_folder": folder,
    },
    broker_connection_retry_on_startup=True,
    task_ignore_result=True,
    task_acks_late=False,
    worker_hijack_root_logger=False,
    worker_cancel_long_running_tasks_on_connection_loss=False,
)


def follow(name: str) -> None:
    Followed.objects.create(name=name)


@app.task(name="order")  # type: ignore[untyped-decorator]
def order(name: str) -> None:
    """One transaction; what comes after it is registered in it."""
    with transaction.atomic():
        Order.objects.create(name=name)
        transaction.on_commit(partial(follow, name))
