"""AR teachers: one file a kind of soft target."""
