"""A reference data set on disk: made, read, refused."""
