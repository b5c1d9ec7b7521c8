"""The application around the library: configs, the loop on disk, hosts, signals."""
