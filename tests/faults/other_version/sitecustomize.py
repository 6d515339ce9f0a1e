"""A site whose worker writes and reads messages of the next schema, as after an upgrade of this site alone."""

import sys

if "fedspan.site.worker" in sys.orig_argv:
    from fedspan.wire import framing

    framing.SCHEMA += 1
