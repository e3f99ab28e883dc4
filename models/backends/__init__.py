"""One file for each runtime; chosen by name, never by a static import."""
