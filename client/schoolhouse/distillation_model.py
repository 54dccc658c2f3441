"""ModelOpt's name of `schoolhouse.distill.model`."""

from schoolhouse.distill.model import *  # noqa: F403
