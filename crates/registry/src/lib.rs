//! A small OCI registry in memory or a directory, for the demo and for tests with faults.
