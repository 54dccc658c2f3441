"""One teacher on one device: from requests to features.

The way of a request: it is one of the `jobs`, and waits in the `fair_queue`. The `runner`'s thread takes it and runs
its forward, alone, merged with others, or in parts if the device has no room (`split_on_oom`). Its features leave by
the `reply_pipeline`, and `answers` bring them back to the event loop. `engine` puts these together, `cache` keeps
features, and `unsent` and `shares` bound the bytes of features that clients have not read yet.
"""
