"""Videos: brought here, looked into, sampled into frame caches."""
