"""ModelOpt's name of `schoolhouse.distill.layerwise`."""

from schoolhouse.distill.layerwise import *  # noqa: F403
