"""ModelOpt's name of `schoolhouse.distill.convert`."""

from schoolhouse.distill.convert import *  # noqa: F403
