"""ModelOpt's name of `schoolhouse.losses.balancers`."""

from schoolhouse.losses.balancers import *  # noqa: F403
