"""The append-only, hash-chained logs of a server and its sites: written, read, compared and shown."""
