"""Which every room uses: errors, files, locks, batches of items, servers and HTTP. It knows nothing of videos."""
