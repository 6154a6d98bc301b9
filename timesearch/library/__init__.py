"""Many videos: indexed, searched, and asked about."""
