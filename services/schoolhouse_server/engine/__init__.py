"""One teacher on one device: from requests to features.

A request's way: it is one of the `jobs`, waits in the `fair_queue`, is taken by the `runner`'s thread, alone or
merged with others, or in parts where the device has no room (`split_on_oom`), and its features leave by the
`reply_pipeline`. `engine` puts these together, `cache` keeps features, `unsent` bounds what clients have not taken.
"""
