"""A small project. ENGINE comes from the environment, so that `show.py` can run it with either."""

import os

from psycopg.conninfo import conninfo_to_dict

_params = conninfo_to_dict(os.environ["SHOP_DSN"])

SECRET_KEY = "for an example"
USE_TZ = True
INSTALLED_APPS = ["shop"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
DATABASES = {
    "default": {
        "ENGINE": os.environ.get("SHOP_ENGINE", "aiopgsafe.django"),
        "NAME": _params["dbname"],
        "USER": _params["user"],
        "HOST": _params["host"],
        "PORT": _params["port"],
    }
}
