"""ModelOpt's name of `schoolhouse.distill.config`."""

from schoolhouse.distill.config import *  # noqa: F403
