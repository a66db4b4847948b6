"""The files a run leaves: one home for each format's writer, reader and version."""
